"""Sampling the next frame's tokens from a prediction, for all scripts."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.keyframes import VISIBLE
from rollout.world_model import WorldModel
from runtime.config import SettingError

PASSES_BETWEEN = 2  # at most, for a frame that does not become a keyframe
CELLS_STEP = 64  # numbers of cells to sample again are rounded up to multiples of it
SHARED_NOISE = 0.7  # share of the variance of a cell's noise that its neighbours have, too ...
SMOOTHING_CELLS = 1.5  # ... smoothed by a Gaussian of this standard deviation
CARRIED_NOISE = 0.95  # share of its variance that the noise keeps in a step while it moves with the view
TOP_P_CODES = 256  # top-p considers no more codes: sorting all of them would cost more than the model


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled from logits.

    `top_k` 0 and `top_p` 1 keep all codes. `greedy` takes the most likely code everywhere.

    Visible cells, which are warped from earlier frames, take the most likely code (`visible_temperature` 0):
    noise there would be warped on from frame to frame. `passes` above 1 is masked parallel decoding (MaskGIT,
    arXiv 2202.04200): some cells are sampled first, and the others are conditioned on them.

    `trust` is added to the gate of the prior in visible cells: gates are trained on short windows and close
    too early in a long rollout, which then drifts to the most frequent codes. Cells that are sampled do
    without: they would nearly all stay as they are.

    `code_balance` scales the shift of the logits that keeps codes as frequent as they were recorded
    (code_balance.py).
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    visible_temperature: float = 0.0
    passes: int = 1
    trust: float = 0.0
    code_balance: float = 0.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise SettingError(f"temperature {self.temperature}: must be above 0 (use greedy for 0)")
        if self.top_k < 0:
            raise SettingError(f"top_k {self.top_k}: must be 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p {self.top_p}: must be above 0 and 1 at most (all codes)")
        if self.passes < 1:
            raise SettingError(f"passes {self.passes}: must be 1 (one pass) or more")
        if self.code_balance < 0:
            raise SettingError(f"code_balance {self.code_balance}: must be 0 (none) or more")


# For play and evaluation; chosen on training clips, see docs/experiments.md.
PLAY = SamplingConfig(temperature=1.0, top_p=0.97, passes=1, trust=6.0, code_balance=1.0)


def correlated_noise(
    shape: tuple[int, int, int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise [B, H, W] for sampling, of which neighbouring cells have similar values.

    The share SHARED_NOISE of its variance is smoothed over SMOOTHING_CELLS. Through the cumulative
    distribution it becomes the uniform numbers that sampling takes (a Gaussian copula): each cell is sampled
    from its own distribution, as with independent numbers, but neighbours whose distributions are alike tend
    to take codes of the same rank: patches instead of single cells.
    """
    B, H, W = shape
    reach = math.ceil(3 * SMOOTHING_CELLS)
    at = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    bell = torch.exp(-((at / SMOOTHING_CELLS) ** 2) / 2)
    bell = bell / bell.norm()  # so the smoothed noise has a variance of 1
    size = (B, 1, H + 2 * reach, W + 2 * reach)
    smooth = torch.randn(size, generator=generator, device=device)
    smooth = F.conv2d(F.conv2d(smooth, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))[:, 0]
    own = torch.randn(shape, generator=generator, device=device)
    return SHARED_NOISE**0.5 * smooth + (1 - SHARED_NOISE) ** 0.5 * own


def carry_noise(last: Tensor, fresh: Tensor, source_grid: Tensor, visible_mask: Tensor) -> Tensor:
    """The noise [B, H, W] of the next frame, standard normal as both of `last` and `fresh` [B, H, W].

    That of the last frame moves with what its cells show, so that a cell which is sampled anew in the next
    keyframe tends to take the code that it had: the texture does not flicker. Each step mixes in some of
    `fresh`, which disoccluded cells take alone. source_grid [B, H, W, 2] and visible_mask [B, H, W] as in
    `ComposedView`.
    """
    grid = source_grid.to(last.dtype)
    moved = F.grid_sample(last[:, None], grid, "nearest", "border", align_corners=False)
    mixed = CARRIED_NOISE**0.5 * moved[:, 0] + (1 - CARRIED_NOISE) ** 0.5 * fresh
    seen = (visible_mask > VISIBLE) & (grid.abs() <= 1).all(-1)
    return torch.where(seen, mixed, fresh)


@torch.no_grad()
def sample_from_logits(
    logits: Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    visible_mask: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Logits [B, V, H, W] -> tokens [B, H, W] int64.

    The cumulative distribution is inverted at one uniform number per cell: `noise` [B, H, W], or drawn from
    `generator` (on the logits' device; the global one if None). `visible_mask` [B, H, W]: the share of each
    cell that earlier frames show; None: all cells are disoccluded. `shift` [B, H, W, V] is added to the
    logits of disoccluded cells, unless the sampling is greedy.
    """
    if sampling.greedy:
        return logits.argmax(1)
    if noise is None:
        B, _, H, W = logits.shape
        noise = torch.rand(B, H, W, generator=generator, device=logits.device)
    scores = logits.movedim(1, -1)
    if visible_mask is None:
        return _sample(scores if shift is None else scores + shift, noise, sampling.temperature, sampling)
    visible = visible_mask > VISIBLE
    tokens, disoccluded = logits.argmax(1), scores[~visible]
    if shift is not None:
        disoccluded = disoccluded + shift[~visible]
    tokens[~visible] = _sample(disoccluded, noise[~visible], sampling.temperature, sampling)
    if sampling.visible_temperature:
        tokens[visible] = _sample(scores[visible], noise[visible], sampling.visible_temperature, sampling)
    return tokens


def _sample(logits: Tensor, noise: Tensor, temperature: float, sampling: SamplingConfig) -> Tensor:
    """Logits [..., V], noise [...] in 0..1 -> codes [...]."""
    scores, codes = logits.float() / temperature, None
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, codes = scores.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        scores, codes = scores.topk(min(TOP_P_CODES, scores.shape[-1]), dim=-1)
    probabilities = scores.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # The most likely codes that together reach top_p: those with less than that before them.
        probabilities = probabilities * (cumulative - probabilities < sampling.top_p)
        cumulative = probabilities.cumsum(-1)
    # Scaled by the last sum, which rounding may leave a little off 1.
    index = torch.searchsorted(cumulative, (noise[..., None] * cumulative[..., -1:]).contiguous())
    index = index.clamp_(max=scores.shape[-1] - 1)
    if codes is not None:
        index = codes.gather(-1, index)
    return index[..., 0]


@torch.no_grad()
def sample_tokens(
    model: WorldModel, prediction, sampling: SamplingConfig, noise: Tensor, shift: Tensor | None = None
) -> Tensor:
    """A prediction -> the next frame's tokens [B, H, W], in `sampling.passes` passes; noise [B, H, W].

    Cells that are refined (`Prediction.refined`) are sampled like disoccluded ones. `shift` as in
    `sample_from_logits`.

    The first pass samples all cells, and visible ones are final. Each further pass samples a part of the
    other cells again, conditioned on the rest: after pass p of P, the share cos(pi p / 2P) of them. The order
    is random. MaskGIT's, the most confident first, prefers plain codes, and a long rollout loses its detail.
    Frames that do not become keyframes take PASSES_BETWEEN passes at most. A prediction without a visible
    mask takes one pass.
    """
    visible_mask, trust = prediction.visible_mask, sampling.trust
    if visible_mask is not None:
        kept = ~prediction.refined
        visible_mask, trust = visible_mask * kept, trust * kept
    logits = model.logits(prediction, trust=trust)
    tokens = sample_from_logits(logits, sampling, noise=noise, visible_mask=visible_mask, shift=shift)
    if sampling.passes == 1 or sampling.greedy or visible_mask is None:
        return tokens
    disoccluded = (visible_mask <= VISIBLE).flatten(1)  # [B, H*W]
    count = disoccluded.sum(1)
    most = int(count.max())
    if not most:
        return tokens
    # The disoccluded cells, in as many columns as the world with most of them needs, rounded up: libraries
    # may keep a kernel for each size that they have met, which would be hundreds in a long play.
    most = min(-(-most // CELLS_STEP) * CELLS_STEP, disoccluded.shape[1])
    cells = disoccluded.float().topk(most, 1).indices  # [B, most]
    valid = torch.arange(most, device=cells.device) < count[:, None]
    noise, flat = noise.flatten(1).gather(1, cells), tokens.flatten(1).clone()
    sampled = flat.gather(1, cells)
    # From later digits of the noise: independent of what is sampled, and the same if the noise is.
    rank = (noise * 4096).frac().masked_fill(~valid, torch.inf).argsort(1).argsort(1)
    passes = torch.where(prediction.keyframe_due, sampling.passes, min(sampling.passes, PASSES_BETWEEN))
    for p in range(1, sampling.passes):
        remaining = (count * (math.pi / 2 * (p / passes).clamp(max=1)).cos()).long()
        if not remaining.any():
            break
        again = rank < remaining[:, None]
        given = torch.ones_like(disoccluded).scatter(1, cells, ~again).view_as(tokens)
        conditioned = model.condition_on_tokens(prediction, flat.view_as(tokens), given)
        logits = model.logits(conditioned, cells, trust)
        if shift is not None:
            logits = logits + shift.flatten(1, 2).take_along_dim(cells[..., None], 1)
        sampled = torch.where(again, _sample(logits, noise, sampling.temperature, sampling), sampled)
        flat = flat.scatter(1, cells, sampled)
    return flat.view_as(tokens)
