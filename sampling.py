"""Choosing tokens from logits and rolling the world model out: the one place for all scripts."""

import math
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint import WorldModel
from device import autocast
from vq_vae.vq_vae import VQVAE

TOP_P_CODES = 256  # top-p looks no farther: sorting all codes would cost more than the model
CARRIED = 0.5  # a cell of which so much was seen before is carried, not invented


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from its logits. `top_k` 0 keeps all codes, `top_p` 1 too; `greedy` takes the
    likeliest everywhere.

    Cells that are carried from what was seen take the likeliest code (`carried_temperature` 0): noise there
    would be carried on, frame by frame. `passes` above 1 is masked parallel decoding: the surest cells are
    chosen first and the others see them (MaskGIT, arXiv 2202.04200); 1 is the plain head.

    `trust` and `continuation` open the gates of what is carried and of the continued border farther than
    was learnt (see `GeometryWorldModel.logits`): learnt where the frame before is true or nearly so, they
    give way too easily in a long dream, which then drifts to what is likeliest anywhere. `redraw`: cells
    whose source is enlarged so far that less than this share of a cell, by length, fills one of the view are
    trusted like a continued border, and drawn like new ones: walking on, what comes near would else only be
    blown up.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    carried_temperature: float = 0.0
    passes: int = 1
    trust: float = 0.0
    continuation: float = 0.0
    redraw: float = 0.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0 (use greedy for 0)")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and 1 at most (all codes)")
        if self.passes < 1:
            raise ValueError(f"passes {self.passes}: must be 1 (the plain head) or more")


# At play and in evaluation; found on training clips, see CHANGELOG.
PLAY = Choice(temperature=1.0, top_p=0.95, passes=2, trust=6.0, continuation=2.5, redraw=0.5)


@torch.no_grad()
def choose_tokens(
    logits: Tensor,
    choice: Choice,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Logits [B, V, H, W] -> tokens [B, H, W] int64.

    Sampling inverts the cumulative distribution at one uniform number a cell: `noise` [B, H, W], or drawn
    from `generator` (on the logits' device; the global one if None). `seen` [B, H, W]: how much of each cell
    is carried; None where nothing is.
    """
    if choice.greedy:
        return logits.argmax(1)
    if noise is None:
        B, _, H, W = logits.shape
        noise = torch.rand(B, H, W, generator=generator, device=logits.device)
    if seen is None:
        return _sample(logits.movedim(1, -1), noise, choice.temperature, choice)
    carried = seen > CARRIED
    tokens = logits.argmax(1)
    for cells, temperature in ((~carried, choice.temperature), (carried, choice.carried_temperature)):
        if temperature:
            tokens[cells] = _sample(logits.movedim(1, -1)[cells], noise[cells], temperature, choice)
    return tokens


def _sample(logits: Tensor, noise: Tensor, temperature: float, choice: Choice) -> Tensor:
    """Logits [..., V], noise [...] in 0..1 -> codes [...]."""
    scores, codes = logits.float() / temperature, None
    if 0 < choice.top_k < scores.shape[-1]:
        scores, codes = scores.topk(choice.top_k, dim=-1)
    elif choice.top_p < 1:
        scores, codes = scores.topk(min(TOP_P_CODES, scores.shape[-1]), dim=-1)
    shares = scores.softmax(-1)
    cumulative = shares.cumsum(-1)
    if choice.top_p < 1:
        # The likeliest codes that together reach top_p: those before which less than that has been summed up.
        shares = shares * (cumulative - shares < choice.top_p)
        cumulative = shares.cumsum(-1)
    # Scaled by the last sum, which rounding may leave a little off 1.
    index = torch.searchsorted(cumulative, (noise[..., None] * cumulative[..., -1:]).contiguous())
    index = index.clamp_(max=scores.shape[-1] - 1)
    if codes is not None:
        index = codes.gather(-1, index)
    return index[..., 0]


@torch.no_grad()
def decide(model: WorldModel, prediction, choice: Choice, noise: Tensor) -> Tensor:
    """A model's prediction -> the next frame's tokens [B, H, W], in `choice.passes` passes; noise [B, H, W].

    The first pass chooses all cells. Those that are carried are then settled; of those that come into view
    each further pass opens again the least sure, which then see the others: after pass p of P the share
    cos(pi p / 2P) of them is open. A model without a light head (`revealed`) takes one pass.
    """
    trust, seen = (choice.trust, choice.continuation), prediction.seen
    if choice.redraw and seen is not None:
        fine = prediction.fineness >= choice.redraw
        trust, seen = (torch.where(fine, choice.trust, choice.continuation), choice.continuation), seen * fine
    logits = model.logits(prediction, trust=trust)
    tokens = choose_tokens(logits, choice, noise=noise, seen=seen)
    if choice.passes == 1 or choice.greedy or not hasattr(model, "revealed"):
        return tokens
    new = (seen <= CARRIED).flatten(1)  # [B, H*W]
    count = new.sum(1)
    most = int(count.max())
    if not most:
        return tokens
    # The cells that come into view, in as many columns as the world with most of them needs.
    cells = new.float().topk(most, 1).indices  # [B, most]
    counted = torch.arange(most, device=new.device) < count[:, None]
    logits = logits.flatten(2).gather(2, cells[:, None].expand(-1, logits.shape[1], -1)).mT
    noise, flat = noise.flatten(1).gather(1, cells), tokens.flatten(1).clone()
    chosen = flat.gather(1, cells)
    for p in range(1, choice.passes):
        sure = logits.log_softmax(-1).gather(2, chosen[..., None])[..., 0].masked_fill(~counted, torch.inf)
        left = (count * math.cos(math.pi / 2 * p / choice.passes)).long()
        rank = sure.argsort(1).argsort(1)  # 0 is the least sure
        again = rank < left[:, None]
        shown = torch.ones_like(new).scatter(1, cells, ~again).view_as(tokens)
        logits = model.logits(model.revealed(prediction, flat.view_as(tokens), shown), cells, trust)
        chosen = torch.where(again, _sample(logits, noise, choice.temperature, choice), chosen)
        flat = flat.scatter(1, cells, chosen)
    return flat.view_as(tokens)


def from_origin(pose: Tensor) -> Tensor:
    """Poses [B, T, 5] with x, y, z from each sequence's first on; float32 would lose centimetres far out."""
    return torch.cat([pose[..., :3] - pose[:, :1, :3], pose[..., 3:]], -1)


class Dream:
    """A running world: the model's state, the current tokens, and how the next ones are chosen.

    `prime` shows it what was really seen; each `step` then takes an action and makes the next frame's tokens.
    """

    def __init__(
        self,
        model: WorldModel,
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
        self.state = None  # the model's
        self.tokens: Tensor | None = None  # [B, H, W]
        self.observed = True  # whether they are a recording's
        self._pose: Tensor | None = None  # [B, 5] of the last frame that was shown, where known
        self._picture: Tensor | None = None  # the tokens decoded, once they have been
        self._noise: Tensor | None = None  # [B, H, W]

    @torch.inference_mode()
    def prime(self, tokens: Tensor, actions: Tensor, pose: Tensor | None = None) -> None:
        """Starts anew and takes in tokens [B, T, H, W] and the actions [B, T-1, 5] between them.

        `pose` [B, T, 5] x, y, z, yaw, pitch of each (metres, degrees), NaN where unknown: the camera is then
        taken to have looked level at first.
        """
        if tokens.shape[1] != actions.shape[1] + 1:
            raise ValueError(
                f"{tokens.shape[1]} frames need {tokens.shape[1] - 1} actions, got {actions.shape[1]}"
            )
        self.generator.manual_seed(self.seed)
        tokens, actions = tokens.to(self.device).long(), actions.to(self.device).float()
        if pose is None:
            pose = torch.full((*tokens.shape[:2], 5), torch.nan)
        pose = from_origin(pose).to(self.device)
        self.state = self.model.init_state(len(tokens), self.device)
        with autocast(self.device, self.dtype):
            for t in range(actions.shape[1]):
                _, self.state = self.model.predict(tokens[:, t], actions[:, t], self.state, pose=pose[:, t])
        self.tokens, self.observed, self._pose = tokens[:, -1], True, pose[:, -1]
        self._picture = self._noise = None

    def copy(self) -> "Dream":
        """This dream once more, to go on otherwise: what was seen need not be shown twice."""
        other = copy(self)  # no step changes a state in place
        other.generator = torch.Generator(self.device)
        other.generator.set_state(self.generator.get_state())
        return other

    @torch.inference_mode()
    def step(self, actions: Tensor) -> Tensor:
        """Actions [B, 5] -> the next frame's tokens [B, H, W]."""
        prediction = self.foresee(actions)
        self.take(prediction)
        return self.tokens

    @torch.inference_mode()
    def foresee(self, actions: Tensor):
        """The first half of `step`: the model's prediction; the state is then that after the step."""
        if self.tokens is None:
            raise RuntimeError("prime the dream with at least one frame before the first step")
        actions = actions.to(self.device).float()
        with autocast(self.device, self.dtype):
            prediction, self.state = self.model.predict(
                self.tokens, actions, self.state, self.observed, self._picture, self._pose
            )
        # While the camera rests, each cell keeps its uniform number, so that what is still does not shimmer.
        fresh = torch.rand(self.tokens.shape, generator=self.generator, device=self.device)
        if self._noise is not None and prediction.seen is not None:
            rests = (actions == 0).all(1)[:, None, None]
            fresh = torch.where(rests, self._noise, fresh)
        self._noise = fresh
        return prediction

    @torch.inference_mode()
    def take(self, prediction) -> None:
        """The second half of `step`: chooses the next frame's tokens."""
        with autocast(self.device, self.dtype):
            self.tokens = decide(self.model, prediction, self.choice, self._noise)
        self.observed, self._pose, self._picture = False, None, None

    @torch.inference_mode()
    def pictures(self) -> Tensor:
        """The current tokens as pictures [B, Hp, Wp, 3] uint8 on the CPU."""
        if self._picture is None:
            with autocast(self.device, self.dtype):
                self._picture = self.tokenizer.decode_code(self.tokens).clamp(0, 1)
        return to_uint8(self._picture)

    def rollout(self, actions: Tensor) -> Tensor:
        """Actions [B, N, 5] -> the N next frames' tokens [B, N, H, W]."""
        return torch.stack([self.step(actions[:, t]) for t in range(actions.shape[1])], 1)


def to_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, Hp, Wp] in [0, 1] -> [B, Hp, Wp, 3] uint8 on the CPU."""
    return pictures.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()


def to_float(pictures: Tensor) -> Tensor:
    """[B, Hp, Wp, 3] uint8 -> [B, 3, Hp, Wp] float32 in [0, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div(255)
