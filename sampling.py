"""Choosing tokens from logits and rolling the world model out: the one place for all scripts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from device import autocast
from model_convGru import ConvGRUWorldModel
from vq_vae.vq_vae import VQVAE

# At play and in evaluation. On training clips the shipped world then uses about as many different codes in a
# frame as the truth does; at 1.0 it uses 1.28 times as many, at 0.7 only 0.76.
PLAY_TEMPERATURE = 0.85


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from its logits. `top_k` 0 keeps all codes; `greedy` takes the likeliest."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0 (use greedy for 0)")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all codes) or more")


@torch.no_grad()
def choose_tokens(logits: Tensor, choice: Choice, generator: torch.Generator | None = None) -> Tensor:
    """Logits [B, V, H, W] -> tokens [B, H, W] int64.

    Sampling inverts the cumulative distribution at one uniform number a cell, drawn from `generator` (on the
    logits' device; the global one if None).
    """
    if choice.greedy:
        return logits.argmax(1)
    scores = logits.float().movedim(1, -1) / choice.temperature  # [B, H, W, V]
    codes = None
    if 0 < choice.top_k < scores.shape[-1]:
        scores, codes = scores.topk(choice.top_k, dim=-1)
    cumulative = scores.softmax(-1).cumsum(-1)
    uniform = torch.rand(scores.shape[:-1], generator=generator, device=scores.device)[..., None]
    # Scaled by the last sum, which rounding may leave a little off 1.
    index = torch.searchsorted(cumulative, uniform * cumulative[..., -1:]).clamp_(max=scores.shape[-1] - 1)
    if codes is not None:
        index = codes.gather(-1, index)
    return index[..., 0]


class Dream:
    """A running world: the model's state, the current tokens, and how the next ones are chosen.

    `prime` shows it what was really seen; each `step` then takes an action and makes the next frame's tokens.
    """

    def __init__(
        self,
        model: ConvGRUWorldModel,
        tokenizer: VQVAE,
        choice: Choice | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.choice = Choice() if choice is None else choice
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.seed = seed
        self.state: Tensor | None = None  # [L, B, C, H, W]
        self.tokens: Tensor | None = None  # [B, H, W]

    @torch.inference_mode()
    def prime(self, tokens: Tensor, actions: Tensor) -> None:
        """Starts anew and takes in tokens [B, T, H, W] and the actions [B, T-1, 5] between them."""
        if tokens.shape[1] != actions.shape[1] + 1:
            raise ValueError(
                f"{tokens.shape[1]} frames need {tokens.shape[1] - 1} actions, got {actions.shape[1]}"
            )
        self.generator.manual_seed(self.seed)
        tokens, actions = tokens.to(self.device).long(), actions.to(self.device).float()
        self.state = self.model.init_state(len(tokens), self.device)
        with autocast(self.device, self.dtype):
            embedded, film = self.model.compute_embeddings(tokens[:, :-1]), self.model.compute_film(actions)
            for t in range(actions.shape[1]):
                _, self.state = self.model.recur(embedded[:, t], film[:, t], self.state)
        self.tokens = tokens[:, -1]

    @torch.inference_mode()
    def step(self, actions: Tensor) -> Tensor:
        """Actions [B, 5] -> the next frame's tokens [B, H, W]."""
        if self.tokens is None:
            raise RuntimeError("prime the dream with at least one frame before the first step")
        with autocast(self.device, self.dtype):
            logits, self.state = self.model.step(self.tokens, actions.to(self.device).float(), self.state)
        self.tokens = choose_tokens(logits, self.choice, self.generator)
        return self.tokens

    @torch.inference_mode()
    def pictures(self) -> Tensor:
        """The current tokens as pictures [B, Hp, Wp, 3] uint8 on the CPU."""
        with autocast(self.device, self.dtype):
            return to_uint8(self.tokenizer.decode_code(self.tokens))

    def rollout(self, actions: Tensor) -> Tensor:
        """Actions [B, N, 5] -> the N next frames' tokens [B, N, H, W]."""
        return torch.stack([self.step(actions[:, t]) for t in range(actions.shape[1])], 1)


def to_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, Hp, Wp] in [0, 1] -> [B, Hp, Wp, 3] uint8 on the CPU."""
    return pictures.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()


def to_float(pictures: Tensor) -> Tensor:
    """[B, Hp, Wp, 3] uint8 -> [B, 3, Hp, Wp] float32 in [0, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div(255)
