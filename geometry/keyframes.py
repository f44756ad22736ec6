"""Keyframes: the memory of a rollout, and the next view composed from it.

A keyframe is a whole frame (picture, tokens, inverse ray distances) with its pose. It is written once and
never changed. Views are composed from keyframes rather than from the last frame wherever that costs nothing,
so little is resampled more than once.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera
from geometry.warping import ComposedView, SourceFrames, compose_view

HALF_WEIGHT_METRES = 2.0  # distance at which a keyframe has half the weight of one at the view's own place
GENERATION_DECAY = 0.8  # weight of a generated keyframe over that of its source
NEWER = 1e-3  # gain in weight of the newest keyframe: of several at one pose, a still player sees the newest
NEW_DEGREES, NEW_METRES = 2.0, 0.25  # observed keyframes are kept so far apart
NEW_GENERATED_DEGREES, NEW_GENERATED_METRES = 8.0, 1.5  # generated frames become keyframes so far apart
GENERATED_PENALTY = 0.1  # of a generated source's score in compose_view, for each generation
RESAMPLED_PENALTY = 5.0  # of the last frame's if it was generated: it was resampled in every step
VISIBLE = 0.5  # a cell counts as visible in a warped view if the source shows more of it than this
REFINE_BELOW = 0.7  # a visible cell of a lower resolution is sampled anew when a keyframe is written
REFINE_SHARE = 0.5  # a keyframe is also written when so much of the view has a lower one


@dataclass
class Keyframes:
    """Keyframes of B worlds, M slots each. Values, not a network: no gradient passes through them."""

    picture: Tensor  # [B, M, 3, Hp, Wp] uint8
    tokens: Tensor  # [B, M, H, W] int64
    inverse_ray_distance: Tensor  # [B, M, 2H, 2W] 1/m
    pose: Tensor  # [B, M, 5]
    resolution: Tensor  # [B, M, H, W] as in `SourceFrames`
    generation: Tensor  # [B, M] 0: observed; n: generated from generation n-1
    order: Tensor  # [B, M] 1 for the keyframe written first, 2 for the next, ...; 0 for a free slot

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        picture: tuple[int, int],
        latent: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> "Keyframes":
        """No keyframe yet; `picture` and `latent` are (height, width) of pictures and token grids."""
        H, W = latent
        lead = (batch, capacity)
        return cls(
            picture=torch.zeros(*lead, 3, *picture, dtype=torch.uint8, device=device),
            tokens=torch.zeros(*lead, H, W, dtype=torch.long, device=device),
            inverse_ray_distance=torch.zeros(*lead, 2 * H, 2 * W, device=device),
            pose=torch.zeros(*lead, 5, device=device),
            resolution=torch.ones(*lead, H, W, device=device),
            generation=torch.zeros(lead, device=device),
            order=torch.zeros(lead, device=device),
        )

    @property
    def capacity(self) -> int:
        """Slots of each world."""
        return self.order.shape[1]

    def __getitem__(self, index: slice | Tensor) -> "Keyframes":
        """Some of the worlds."""
        return Keyframes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def write(
        self, where: Tensor, frame: SourceFrames, generation: Tensor, over: Tensor | None = None
    ) -> "Keyframes":
        """Adds the frames of the worlds `where` [B] bool; changes nothing in place.

        A full memory loses its oldest keyframe. `frame` is of B frames, `generation` [B]. Where `over` [B]
        bool is true the newest keyframe is replaced.
        """
        worlds = where.nonzero()[:, 0]
        if not len(worlds) or not self.capacity:
            return self
        slot = self.order[worlds].argmin(1)
        if over is not None:
            slot = torch.where(over[worlds], self.order[worlds].argmax(1), slot)
        new = {
            "picture": frame.picture.detach().clamp(0, 1).mul(255).round().byte(),
            "tokens": frame.tokens,
            "inverse_ray_distance": frame.inverse_ray_distance.detach(),
            "pose": frame.pose,
            "resolution": frame.resolution,
            "generation": generation,
            "order": self.order.amax(1) + 1,
        }
        changed = {}
        for name, value in new.items():
            slots = getattr(self, name).clone()
            slots[worlds, slot] = value[worlds].to(slots.dtype)
            changed[name] = slots
        return replace(self, **changed)

    def add_observed(self, frame: SourceFrames, observed: Tensor) -> "Keyframes":
        """Adds recorded frames, in the worlds `observed` [B] bool.

        The newest recorded frame is always a keyframe. If the one before is not far enough from its
        predecessor (NEW_METRES, NEW_DEGREES), the new one takes its place.
        """
        if self.capacity < 2:
            return self.write(observed, frame, torch.zeros_like(frame.pose[:, 0]))
        order, slots = self.order.topk(2, 1)
        newest, before = self.pose.gather(1, slots[..., None].expand(-1, -1, 5)).unbind(1)
        metres, degrees = distance(newest, before)
        near = (metres <= NEW_METRES) & (degrees <= NEW_DEGREES) & (order[:, 1] > 0)
        return self.write(observed, frame, torch.zeros_like(metres), over=near)

    def is_new(self, pose: Tensor) -> Tensor:
        """[B] bool: a generated frame at `pose` [B, 5] becomes a keyframe: it is far from the newest one."""
        metres, degrees = self.distance_to_newest(pose)
        return (metres > NEW_GENERATED_METRES) | (degrees > NEW_GENERATED_DEGREES)

    def is_due(self, pose: Tensor, refinable: Tensor) -> Tensor:
        """[B] bool: the frame at `pose` [B, 5] becomes a keyframe if it is generated, because it is new or
        much of it is `refinable` [B, H, W] bool, as before an obstacle that is near."""
        return self.is_new(pose) | (refinable.flatten(1).float().mean(1) > REFINE_SHARE)

    def distance_to_newest(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Metres and degrees (the larger of yaw and pitch) from the newest keyframe: [B] each.

        Infinite where there is none.
        """
        if not self.capacity:
            return pose.new_zeros(len(pose)), pose.new_zeros(len(pose))
        newest, slot = self.order.max(1)
        last = self.pose[torch.arange(len(pose), device=pose.device), slot]
        metres, degrees = distance(pose, last)
        missing = torch.where(newest > 0, 0.0, torch.inf)
        return metres + missing, degrees + missing

    def select(self, pose_to: Tensor, inverse: Tensor, sources: int, fov: float) -> tuple[Tensor, Tensor]:
        """The keyframes that show most of the view at `pose_to` [B, 5]: slots [B, K] and whether each adds
        something, [B, K] bool.

        `inverse` [B, h, w] (1/m) are assumed inverse ray distances of the view on a coarse grid. Greedy: the
        first has the greatest weight times visible share, each next one adds most to those before it. K is
        `sources`, or the capacity if that is less.
        """
        B, M = self.order.shape
        h, w = inverse.shape[-2:]
        _, visible = camera.reproject(
            camera.relative_to(self.pose, pose_to[:, None]).flatten(0, 1),
            camera.relative_to(pose_to, pose_to).repeat_interleave(M, 0),
            inverse.repeat_interleave(M, 0),
            h,
            w,
            fov,
        )
        metres, _ = distance(self.pose, pose_to[:, None])
        newer = 1 + NEWER * self.order / self.order.amax(1, keepdim=True).clamp(min=1)
        weight = (self.order > 0) * GENERATION_DECAY**self.generation / (1 + metres / HALF_WEIGHT_METRES)
        value = visible.view(B, M, h * w) * (weight * newer)[..., None]
        best, selected, useful = torch.zeros(B, h * w, device=value.device), [], []
        for _ in range(min(sources, M)):
            gain, slot = (value - best[:, None]).clamp_min(0).sum(-1).max(1)
            best = torch.maximum(best, value[torch.arange(B, device=slot.device), slot])
            selected.append(slot)
            useful.append(gain > 0)
        return torch.stack(selected, 1), torch.stack(useful, 1)

    def gather(self, slots: Tensor) -> SourceFrames:
        """The keyframes in `slots` [B, K] as B*K frames."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        return SourceFrames(
            picture=self.picture[rows, slots].flatten(0, 1).float() / 255,
            tokens=self.tokens[rows, slots].flatten(0, 1),
            inverse_ray_distance=self.inverse_ray_distance[rows, slots].flatten(0, 1),
            pose=self.pose[rows, slots].flatten(0, 1),
            resolution=self.resolution[rows, slots].flatten(0, 1),
        )


def distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Metres, and degrees (the larger of yaw and pitch), between poses [..., 5]: [...] each."""
    turned = (a - b)[..., 3:]
    return (a - b)[..., :3].norm(dim=-1), ((turned + 180) % 360 - 180).abs().amax(-1)


def compose_next_view(
    frame: SourceFrames,
    observed: Tensor,
    keyframes: Keyframes,
    pose: Tensor,
    ground: Tensor,
    sources: int,
    fov: float,
) -> tuple[ComposedView, Tensor]:
    """The view at `pose` [B, 5] from the last frame (source 0) and up to `sources` keyframes.

    `observed` [B] bool: the last frame is recorded, not generated. `ground` [B, 2H, 2W] (1/m): the flat
    ground seen from `pose`, assumed where no source shows anything. Returns the view and the generation of
    each of its cells, [B, H, W]: 0 if observed; the last frame counts as one more than the newest keyframes.
    """
    B = len(pose)
    newest = keyframes.generation.amax(1) if keyframes.capacity else torch.zeros_like(pose[:, 0])
    generation = torch.where(observed, 0.0, 1 + newest)[:, None]
    usable = torch.ones(B, 1, dtype=torch.bool, device=pose.device)
    penalty = RESAMPLED_PENALTY * (~observed).float()[:, None]
    if keyframes.capacity:
        slots, useful = keyframes.select(pose, F.avg_pool2d(ground[:, None], 4)[:, 0], sources, fov)
        older = keyframes.generation.gather(1, slots)
        usable, generation = torch.cat([usable, useful], 1), torch.cat([generation, older], 1)
        penalty = torch.cat([penalty, GENERATED_PENALTY * older], 1)
        frame = interleave(frame, keyframes.gather(slots), B)
    view = compose_view(frame, usable, penalty, pose, ground, fov)
    cells = generation[:, :, None, None].expand(-1, -1, *view.source.shape[1:])
    return view, cells.gather(1, view.source[:, None])[:, 0]


def interleave(frame: SourceFrames, others: SourceFrames, worlds: int) -> SourceFrames:
    """B frames and B*K others -> B*(1+K) frames, each world's own frame first."""
    parts = {}
    for f in fields(SourceFrames):
        first, rest = getattr(frame, f.name), getattr(others, f.name)
        joined = torch.cat([first[:, None], rest.view(worlds, -1, *rest.shape[1:])], 1)
        parts[f.name] = joined.flatten(0, 1)
    return SourceFrames(**parts)
