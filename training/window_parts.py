"""What the window losses of both models share: settings, the corruption of inputs, and the result."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rollout.sampling import SamplingConfig
from training import loss_terms
from vq_vae.tokenizer import Tokenizer

SIMILAR_COUNT = 16  # this many nearest codes are similar to a code
CLEAN_SHARE = 0.5  # share of the samples that are not corrupted


@dataclass(frozen=True)
class LossWeights:
    """Weight and settings of each loss term (functions of loss_terms.py). A term of weight 0 is skipped."""

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
    adversarial: float = 0.0
    # of the geometry model only
    disoccluded: float = 1.0  # weight of a disoccluded cell in the cross-entropy; a visible one has 1
    magnified: float = 1.0  # of a magnified visible cell, in pairs
    cells: float = 1.0  # share of the cells that is sampled, by weight, for the cross-entropy


@dataclass(frozen=True)
class InputConfig:
    """What the model is given at each step of a window: true tokens, corrupted ones, or its own samples."""

    ar_len: int = 0  # the last steps of the window that may be self-fed; never the first
    teacher_prob: float = 1.0  # probability that such a step is given the true tokens after all
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # of self-fed tokens
    token_noise: float = 0.0  # each sample's share of corrupted input tokens is uniform in 0..this
    latent_noise: float = 0.0  # standard deviation of Gaussian noise on the embedded input
    # of the geometry model only
    similar_share: float = 0.0  # share of the corrupted tokens that are replaced by similar codes
    masked_decoding: float = 0.0  # share of the samples that are given part of the target tokens


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, from the tokenizer, the perceptual distance (None if unused) and the weights."""

    tokenizer: Tokenizer
    distance: nn.Module | None
    weights: LossWeights

    def __call__(
        self, logits: Tensor, target: Tensor, previous: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """-> {term: [B]} of the terms whose weight is not 0, and log-probabilities [B, H, W, V].

        logits [B, V, H, W], target [B, H, W]; previous: log-probabilities of the step before, or None.
        """
        with torch.autocast(logits.device.type, enabled=False):
            return self._in_float32(logits, target, previous)

    def _in_float32(
        self, logits: Tensor, target: Tensor, previous: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        w = self.weights
        log_probs = loss_terms.log_probabilities(logits)
        terms = {}
        if w.ce:
            terms["ce"] = w.ce * loss_terms.cross_entropy(log_probs, target, w.label_smoothing)
        if w.neighbor:
            terms["neighbor"] = w.neighbor * loss_terms.neighbourhood_loss(
                log_probs, target, w.neighbor_kernel, w.neighbor_exact_mix
            )
        if w.semantic:
            codebook = self.tokenizer.codebook
            terms["semantic"] = w.semantic * loss_terms.semantic_loss(log_probs, target, codebook)
        if w.entropy:
            terms["entropy_floor"] = w.entropy * loss_terms.entropy_floor_loss(log_probs, w.entropy_floor)
        if w.sharpness:
            terms["sharpness"] = w.sharpness * loss_terms.sharpness_loss(log_probs)
        if w.temporal and previous is not None:
            terms["temporal"] = w.temporal * loss_terms.temporal_loss(log_probs, previous)
        if w.perceptual:
            terms["perceptual"] = w.perceptual * loss_terms.perceptual_loss(
                log_probs, target, self.tokenizer, self.distance
            )
        return terms, log_probs


@dataclass
class WindowResult:
    """What a window loss returns. T steps, B samples."""

    loss: Tensor  # scalar: mean over steps and samples
    terms: dict[str, Tensor]  # scalar each, weighted, detached
    step_loss: Tensor  # [T, B] detached
    self_fed: Tensor  # [T, B] bool: at this step the model was given its own sample
    last_log_probs: Tensor  # [B, H, W, V] of the last step, detached
    film: Tensor | None = None  # [B, T, L, 2, C] detached; of the baseline

    @classmethod
    def of_steps(
        cls,
        steps: list[dict[str, Tensor]],
        self_fed: list[Tensor],
        last_log_probs: Tensor,
        film: Tensor | None = None,
    ) -> "WindowResult":
        """From the terms {name: [B]} of each step."""
        step_loss = torch.stack([torch.stack(list(terms.values())).sum(0) for terms in steps])
        sums: dict[str, Tensor] = {}
        for terms in steps:
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.mean()
        return cls(
            loss=step_loss.mean(),
            terms={name: value.detach() / len(steps) for name, value in sums.items()},
            step_loss=step_loss.detach(),
            self_fed=torch.stack(self_fed),
            last_log_probs=last_log_probs.detach(),
            film=film,
        )


def corrupt_tokens(
    tokens: Tensor,
    codebook_size: int,
    most: float,
    clean_share: float = 0.0,
    similar: Tensor | None = None,
    similar_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Replaces some tokens [B, T, H, W] by random codes -> the tokens, and each sample's share [B] of them.

    The share is uniform in 0..`most`, and 0 for `clean_share` of the samples. With `similar` [V, n] (the
    nearest codes of each code), `similar_share` of the replacements come from there, the others from the
    whole codebook.
    """
    B, device = len(tokens), tokens.device
    if most == 0:
        return tokens, torch.zeros(B, device=device)
    level = most * torch.rand(B, device=device)
    if clean_share:
        level = level * (torch.rand(B, device=device) < 1 - clean_share)
    replaced = torch.rand(tokens.shape, device=device) < level[:, None, None, None]
    if similar is None:
        other = torch.randint_like(tokens, codebook_size)
    else:
        near = similar[tokens, torch.randint_like(tokens, similar.shape[1])]
        other = torch.randint_like(tokens, codebook_size)
        other = torch.where(torch.rand(tokens.shape, device=device) < similar_share, near, other)
    return torch.where(replaced, other, tokens), level
