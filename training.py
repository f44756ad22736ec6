"""One training window: what the model is fed and what it is charged."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import camera
import losses
from data import TokenClips
from model_convGru import ConvGRUWorldModel
from model_geometry import GeometryWorldModel, Motion, Prediction
from sampling import CARRIED, Choice, choose_tokens
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
    # of the geometry model alone
    reprojection: float = 0.0
    smoothness: float = 0.0
    motion: float = 0.0
    revealed: float = 1.0  # what a cell that comes into view counts; one that was seen counts 1
    cells: float = 1.0  # share of the cells that is drawn for the loss, by what they count


@dataclass(frozen=True)
class Feeding:
    """What the model is shown at each step of a window."""

    ar_len: int = 0  # the window's last steps that may be self-fed; never its first
    teacher_prob: float = 1.0  # that such a step is shown the truth after all
    choice: Choice = field(default_factory=Choice)  # how the tokens that are fed back are chosen
    token_noise: float = 0.0  # each sample's share of random input tokens is drawn from 0..this
    latent_noise: float = 0.0  # standard deviation of Gaussian noise on the embedded input
    # of the geometry model alone
    near_codes: float = 0.0  # share of the random input tokens that are codes like the true one
    reveal: float = 0.0  # share of the samples to which part of the answer is shown, for the light head


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
    film: Tensor | None  # [B, T, L, 2, C] detached; of the plain model


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


# ---------------------------------------------------------------- the geometry model

MOTION_BATCH, MOTION_FRAMES, MOTION_SEEN = (
    64,
    32,
    6,
)  # windows, their frames, and those of them before free running


def teach_motion(model: GeometryWorldModel, clips: TokenClips, steps: int, seed: int) -> float:
    """Trains what foretells the displacement, on actions and poses alone -> the last step's mean error in
    metres; NaN where no clip has poses.

    Frames without pictures cost next to nothing, and every other mechanism leans on this one. Every second
    batch runs free after MOTION_SEEN frames: it goes on from its own displacements, as at play.
    """
    rng, device = np.random.default_rng([seed, 2]), next(model.parameters()).device
    usable = [c for c, pose in enumerate(clips.pose) if len(pose) > MOTION_FRAMES and np.isfinite(pose).all()]
    if not usable or not steps:
        return math.nan
    optimizer = torch.optim.Adam([*model.pace.parameters(), *model.stride.parameters()], 2e-3)
    for step in tqdm(range(steps), desc="motion", unit="step", leave=False, mininterval=2):
        actions, moved = [], []
        for clip in rng.choice(usable, MOTION_BATCH):
            start = rng.integers(len(clips.pose[clip]) - MOTION_FRAMES)
            pose = torch.from_numpy(clips.pose[clip][start : start + MOTION_FRAMES + 1]).double()
            moved.append(model.moved_between(pose[:-1], pose[1:]).float())
            actions.append(torch.from_numpy(clips.actions[clip][start : start + MOTION_FRAMES]))
        actions, moved = torch.stack(actions, 1).to(device), torch.stack(moved, 1).to(device)  # [T, B, ...]
        before, motion = (
            torch.zeros_like(moved[0]),
            model.init_state(MOTION_BATCH, device, keyframes=0).motion,
        )
        made, errors = [], []
        for t in range(MOTION_FRAMES):
            foretold, motion = model.foretell_motion(actions[t], before, motion)
            made.append(foretold.likeliest.detach())
            errors.append(motion_error(foretold, moved[t], model.REST))
            before = made[-1] if step % 2 and t >= MOTION_SEEN else moved[t]
        error = torch.stack(errors).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float((torch.stack(made) - moved).norm(dim=-1).mean())


def motion_error(foretold: Motion, moved: Tensor, rest: float) -> Tensor:
    """What a foretold displacement is charged, [B], against the true one [B, 3]: where the player moved
    (by `rest` metres or more), how far it is off; everywhere, whether rest was foretold."""
    rests = moved.norm(dim=1) < rest
    off = torch.nn.functional.smooth_l1_loss(foretold.moved, moved, reduction="none", beta=METRES).sum(1)
    whether = torch.nn.functional.binary_cross_entropy_with_logits(
        foretold.rest, rests.float(), reduction="none"
    )
    return off * ~rests + REST_WEIGHT * whether


BASELINE = 8  # frames at most between the two of a reprojection
ALIKE = 16  # codes that count as like another
METRES = 0.05  # error of a displacement beyond which it is charged linearly
REST_WEIGHT = 0.05  # of whether the player rests, against metres


def corrupt(tokens: Tensor, codes: Tensor, most: float, near: float, alike: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces tokens [B, T, H, W] by others -> the tokens and the level [B]: the share that was replaced.

    Half of the samples stay as they are; of each of the others a share in 0..`most` is replaced, `near` of it
    by one of the codes like the true one (`alike` [V, ALIKE]) and the rest by random ones.
    """
    B, device = len(tokens), tokens.device
    level = most * torch.rand(B, device=device) * (torch.rand(B, device=device) < 0.5)
    if most == 0:
        return tokens, level
    hit = torch.rand(tokens.shape, device=device) < level[:, None, None, None]
    like = alike[tokens, torch.randint_like(tokens, alike.shape[1])]
    other = torch.randint_like(tokens, len(codes))
    other = torch.where(torch.rand(tokens.shape, device=device) < near, like, other)
    return torch.where(hit, other, tokens), level


def geometry_window_loss(
    model: GeometryWorldModel,
    terms: Terms,
    tokens: Tensor,
    actions: Tensor,
    pose: Tensor,
    feeding: Feeding,
) -> WindowResult:
    """Streams a window through the geometry model: tokens [B, T+1, H, W], actions [B, T, 5] and pose
    [B, T+1, 5].

    Each sample is self-fed in its last 0..`ar_len` steps (drawn for each), on tokens that it chose itself;
    the camera goes where the recorded one went, so what was really seen stays comparable. Where a self-fed
    cell shows what the dream itself invented, nothing is charged: the recording shows something else there.
    """
    B, T = actions.shape[:2]
    w, device = terms.weights, tokens.device
    codes = model.codes
    with torch.no_grad():
        alike = torch.cdist(codes, codes).topk(min(ALIKE + 1, len(codes)), largest=False).indices[:, 1:]
        shown, level = corrupt(tokens[:, :-1], codes, feeding.token_noise, feeding.near_codes, alike)
        flat = torch.cat([shown, tokens[:, -1:]], 1).flatten(0, 1)
        pictures = terms.tokenizer.decode_code(flat).clamp(0, 1).unflatten(0, (B, T + 1))
        own_steps = torch.randint(0, feeding.ar_len + 1, (B,), device=device)
        own_steps *= torch.rand(B, device=device) >= feeding.teacher_prob
    state = model.init_state(B, device, keyframes=min(T, model.config.keyframes))
    state.pose = torch.where(pose[:, 0].isfinite(), pose[:, 0], state.pose)
    frames: list[
        tuple[Tensor, Tensor, Tensor]
    ] = []  # pictures, inverse distances, poses of the frames so far
    known = torch.ones(tokens[:, 0].shape, device=device)  # 0 where the frame shows what the dream invented
    step_losses, fed, sums = [], [], {}
    prediction = None
    for t in range(T):
        own = t >= T - own_steps
        now, picture = shown[:, t], pictures[:, t]
        if prediction is None:
            own = torch.zeros_like(own)
        elif own.any():
            chosen = choose_own(model, prediction, own, feeding.choice)
            now, picture = now.clone(), picture.clone()
            now[own] = chosen
            with torch.no_grad():
                picture[own] = terms.tokenizer.decode_code(chosen).clamp(0, 1)
        known = torch.where(own[:, None, None], known, 1.0)
        before = state.pose
        prediction, state = model.predict(
            now,
            actions[:, t],
            state,
            observed=~own,
            picture=picture,
            next_pose=pose[:, t + 1],
            level=torch.where(own, 0.0, level),
        )
        with torch.no_grad():
            moved_known = torch.nn.functional.grid_sample(
                known[:, None], prediction.cells, padding_mode="zeros", align_corners=False
            )[:, 0]
            known = torch.maximum(moved_known, prediction.known)
            new = (prediction.seen <= CARRIED).float()
            counts = torch.where(new.bool(), w.revealed, (known > CARRIED).float())
        frames.append((picture, prediction.inverse, before))
        found = token_terms(model, terms, prediction, tokens[:, t + 1], counts, feeding.reveal)
        if model.config.depth and w.reprojection:
            found |= depth_terms(model, w, frames, pictures[:, t + 1], state.pose)
        if w.motion:
            true = model.moved_between(before, state.pose)
            error = motion_error(prediction.motion, true, model.REST)
            found["motion"] = w.motion * error * pose[:, t + 1].isfinite().all(1)
        step_losses.append(torch.stack(list(found.values())).sum(0))
        fed.append(own)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.mean()
    step_loss = torch.stack(step_losses)
    with torch.no_grad():
        log_probs = losses.log_probabilities(model.logits(prediction))
    return WindowResult(
        loss=step_loss.mean(),
        terms={name: value.detach() / T for name, value in sums.items()},
        step_loss=step_loss.detach(),
        self_fed=torch.stack(fed),
        last_log_probs=log_probs,
        film=None,
    )


@torch.no_grad()
def choose_own(model: GeometryWorldModel, prediction: Prediction, own: Tensor, choice: Choice) -> Tensor:
    """What the model itself chooses in the samples `own` [B] bool: [n, H, W]."""
    logits = model.logits(
        replace(
            prediction,
            features=prediction.features[own],
            z=tuple(z[own] for z in prediction.z),
            trusted=prediction.trusted[own],
        )
    )
    return choose_tokens(logits, choice, seen=prediction.seen[own])


def token_terms(
    model: GeometryWorldModel,
    terms: Terms,
    prediction: Prediction,
    target: Tensor,
    counts: Tensor,
    reveal: float,
) -> dict[str, Tensor]:
    """Cross entropy of one step, {name: [B]}: over a share of the cells, drawn by what they count [B, H, W].

    To `reveal` of the samples a random share of the answer is shown, and only the rest is charged.
    """
    w, (B, H, W) = terms.weights, target.shape
    if reveal:
        ratio = torch.rand(B, 1, 1, device=target.device) * (
            torch.rand(B, 1, 1, device=target.device) < reveal
        )
        shown = torch.rand(target.shape, device=target.device) < ratio
        prediction = model.revealed(prediction, target, shown)
        counts = counts * ~shown
    weight = counts.flatten(1)
    charged = weight.sum(1) > 0
    n = max(1, round(w.cells * H * W))
    cells = torch.multinomial(weight + 1e-9, n)
    real = weight.gather(1, cells) > 0  # where fewer cells count than are drawn
    log_probs = model.logits(prediction, cells).log_softmax(-1)
    exact = -log_probs.gather(-1, target.flatten(1).gather(1, cells)[..., None])[..., 0]
    if w.label_smoothing:
        exact = (1 - w.label_smoothing) * exact - w.label_smoothing * log_probs.mean(-1)
    mean = (exact * real).sum(1) / real.sum(1).clamp_min(1)
    found = {"ce": w.ce * mean * charged}
    if w.perceptual:
        full = losses.log_probabilities(model.logits(prediction))
        found["perceptual"] = w.perceptual * losses.perceptual_loss(
            full, target, terms.tokenizer, terms.distance
        )
    return found


def depth_terms(
    model: GeometryWorldModel,
    w: LossWeights,
    frames: list[tuple[Tensor, Tensor, Tensor]],
    target: Tensor,
    pose: Tensor,
) -> dict[str, Tensor]:
    """What the distances of one of the last BASELINE frames, drawn at random, are charged: {name: [B]}.

    `reprojection`: absolute difference of the next picture `target` [B, 3, Hp, Wp], seen from `pose` [B, 5],
    from that frame drawn as seen from there, at two pixels a cell, where it shows anything. `smoothness`: how
    steep the distances' logarithm is where the picture is not (as in monodepth, arXiv 1609.03677).
    """
    with torch.autocast(target.device.type, enabled=False):
        first = max(0, len(frames) - BASELINE)
        picture, inverse, before = frames[int(torch.randint(first, len(frames), ()))]
        inverse = inverse.float()
        fov, size = model.config.vertical_fov_degrees, inverse.shape[-2:]
        small, goal = (torch.nn.functional.adaptive_avg_pool2d(p, size) for p in (picture, target))
        carried = camera.carry_inverse_distance(inverse, before, pose, model.ground(pose), fov)
        grid, seen = camera.reproject(before, pose, carried, *size, fov)
        error = (camera.warp(small, grid) - goal).abs().mean(1)
        found = (error * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp_min(1)
        terms = {"reprojection": w.reprojection * found}
        if w.smoothness:
            steep = 0.0
            for axis in (1, 2):
                edge = small.diff(dim=axis + 1).abs().mean(1)
                steep = steep + (inverse.log().diff(dim=axis).abs() * (-10 * edge).exp()).flatten(1).mean(1)
            terms["smoothness"] = w.smoothness * steep
    return terms
