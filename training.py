"""One training window: what the model is fed and what it is charged."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import losses
from model_convGru import ConvGRUWorldModel
from sampling import Choice, choose_tokens
from vq_vae.vq_vae import VQVAE


@dataclass(frozen=True)
class LossWeights:
    """Weight and settings of each term of the loss (functions of losses.py); a term of weight 0 is not
    computed."""

    ce: float = 1.0
    label_smoothing: float = 0.0
    neighbor: float = 0.0
    neighbor_kernel: int = 3
    neighbor_exact_mix: float = 0.0
    semantic: float = 0.0
    entropy: float = 0.0
    entropy_floor: float = 0.0  # nats
    sharpness: float = 0.0
    temporal: float = 0.0
    perceptual: float = 0.0


@dataclass(frozen=True)
class Feeding:
    """What the model is shown at each step of a window."""

    ar_len: int = 0  # the window's last steps that may be self-fed; never its first
    teacher_prob: float = 1.0  # that such a step is shown the truth after all
    choice: Choice = field(default_factory=Choice)  # how the tokens that are fed back are chosen
    token_noise: float = 0.0  # each sample's share of random input tokens is drawn from 0..this
    latent_noise: float = 0.0  # standard deviation of Gaussian noise on the embedded input


@dataclass(frozen=True)
class Terms:
    """The loss of one step; the model that is trained has no part in it."""

    tokenizer: VQVAE
    distance: nn.Module | None  # perceptual distance, where its weight is not 0
    weights: LossWeights

    def __call__(self, logits: Tensor, target: Tensor, previous: Tensor | None) -> tuple[dict, Tensor]:
        """One step: logits [B, V, H, W], target [B, H, W], the step before's log-probabilities or None
        -> {term: [B]} for the terms whose weight is not 0, and this step's log-probabilities [B, H, W, V]."""
        with torch.autocast(logits.device.type, enabled=False):
            return self._in_float32(logits, target, previous)

    def _in_float32(self, logits: Tensor, target: Tensor, previous: Tensor | None) -> tuple[dict, Tensor]:
        w = self.weights
        log_probs = losses.log_probabilities(logits)
        found = {}
        if w.ce:
            found["ce"] = w.ce * losses.cross_entropy(log_probs, target, w.label_smoothing)
        if w.neighbor:
            found["neighbor"] = w.neighbor * losses.neighbourhood_loss(
                log_probs, target, w.neighbor_kernel, w.neighbor_exact_mix
            )
        if w.semantic:
            found["semantic"] = w.semantic * losses.semantic_loss(
                log_probs, target, self.tokenizer.quantizer.codebook
            )
        if w.entropy:
            found["entropy_floor"] = w.entropy * losses.entropy_floor_loss(log_probs, w.entropy_floor)
        if w.sharpness:
            found["sharpness"] = w.sharpness * losses.sharpness_loss(log_probs)
        if w.temporal and previous is not None:
            found["temporal"] = w.temporal * losses.temporal_loss(log_probs, previous)
        if w.perceptual:
            found["perceptual"] = w.perceptual * losses.perceptual_loss(
                log_probs, target, self.tokenizer, self.distance
            )
        return found, log_probs


@dataclass
class WindowResult:
    """What `window_loss` returns. Shapes: T steps, B samples."""

    loss: Tensor  # scalar, the mean over steps and samples
    terms: dict[str, Tensor]  # scalar each, weighted
    step_loss: Tensor  # [T, B] detached
    self_fed: Tensor  # [T, B] bool: this sample's input at this step was its own sample
    last_log_probs: Tensor  # [B, H, W, V] of the last step, detached
    film: Tensor  # [B, T, L, 2, C] detached


def add_noise(tokens: Tensor, codebook_size: int, most: float) -> Tensor:
    """Replaces a random share (0..most, drawn for each sample) of [B, T, H, W] tokens by random codes."""
    if most == 0:
        return tokens
    level = most * torch.rand(len(tokens), 1, 1, 1, device=tokens.device)
    hit = torch.rand(tokens.shape, device=tokens.device) < level
    return torch.where(hit, torch.randint_like(tokens, codebook_size), tokens)


def window_loss(
    model: ConvGRUWorldModel, terms: Terms, tokens: Tensor, actions: Tensor, feeding: Feeding
) -> WindowResult:
    """Streams a window through the model: tokens [B, T+1, H, W], actions [B, T, 5].

    The input of each of the last `ar_len` steps is, with probability 1 - teacher_prob (drawn for each sample
    and step), what the model itself chose for that frame.
    """
    B, T = actions.shape[:2]
    shown = add_noise(tokens[:, :-1], model.config.codebook_size, feeding.token_noise)
    embedded = model.compute_embeddings(shown)  # [B, T, C, H, W]
    if feeding.latent_noise:
        embedded = embedded + feeding.latent_noise * torch.randn_like(embedded)
    film = model.compute_film(actions)
    state = model.init_state(B, tokens.device)
    step_losses, fed, sums = [], [], {}
    log_probs = logits = None
    for t in range(T):
        x = embedded[:, t]
        own = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        if t >= T - feeding.ar_len and logits is not None:
            own = torch.rand(B, device=tokens.device) >= feeding.teacher_prob
            # Chosen tokens carry no gradient; only the samples that are fed themselves are embedded anew.
            if own.any():
                chosen = model.compute_embeddings(choose_tokens(logits.detach()[own], feeding.choice))
                x = x.index_put((own.nonzero()[:, 0],), chosen.to(x.dtype))
        features, state = model.recur(x, film[:, t], state)
        logits = model.head(features)
        found, log_probs = terms(logits, tokens[:, t + 1], log_probs)
        step_losses.append(torch.stack(list(found.values())).sum(0))
        fed.append(own)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.mean()
    step_loss = torch.stack(step_losses)
    return WindowResult(
        loss=step_loss.mean(),
        terms={name: value.detach() / T for name, value in sums.items()},
        step_loss=step_loss.detach(),
        self_fed=torch.stack(fed),
        last_log_probs=log_probs.detach(),
        film=film.detach(),
    )
