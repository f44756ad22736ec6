"""Keyframes: the memory of a rollout, and the next view warped from it.

A keyframe is a whole frame (picture, tokens, inverse ray distances) with its pose. It is written once and
never changed, and each view is warped straight from keyframes, so nothing is resampled more than once.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera
from geometry.warping import SourceFrames, WarpedView, fuse_views, warp_view

HALF_WEIGHT_METRES = 2.0  # distance at which a keyframe has half the weight of one at the view's own place
GENERATION_DECAY = 0.8  # weight of a generated keyframe over that of its source
NEW_DEGREES, NEW_METRES = 2.0, 0.25  # an observed frame is kept if it is so far from the newest keyframe
NEW_DISOCCLUDED = 0.08  # a generated frame is kept if no keyframe shows so large a share of it ...
NEW_GENERATED_METRES = 1.5  # ... or if it is so far from the newest keyframe
VISIBLE = 0.5  # a cell counts as visible in a warped view if the source shows more of it than this


@dataclass
class Keyframes:
    """Keyframes of B worlds, M slots each. Values, not a network: no gradient passes through them."""

    picture: Tensor  # [B, M, 3, Hp, Wp] uint8
    tokens: Tensor  # [B, M, H, W] int64
    inverse_ray_distance: Tensor  # [B, M, 2H, 2W] 1/m
    pose: Tensor  # [B, M, 5]
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

    def write(self, where: Tensor, frame: SourceFrames, generation: Tensor) -> "Keyframes":
        """Adds the frames of the worlds `where` [B] bool; changes nothing in place.

        A full memory loses its oldest keyframe. `frame` is of B frames, `generation` [B].
        """
        worlds = where.nonzero()[:, 0]
        if not len(worlds) or not self.capacity:
            return self
        slot = self.order[worlds].argmin(1)
        new = {
            "picture": frame.picture.detach().clamp(0, 1).mul(255).round().byte(),
            "tokens": frame.tokens,
            "inverse_ray_distance": frame.inverse_ray_distance.detach(),
            "pose": frame.pose,
            "generation": generation,
            "order": self.order.amax(1) + 1,
        }
        changed = {}
        for name, value in new.items():
            slots = getattr(self, name).clone()
            slots[worlds, slot] = value[worlds].to(slots.dtype)
            changed[name] = slots
        return replace(self, **changed)

    def add_if_new(
        self, frame: SourceFrames, generation: Tensor, observed: Tensor, disoccluded_share: Tensor
    ) -> "Keyframes":
        """Adds the frames that are far enough from the newest keyframe (constants above).

        `observed` [B] bool: the frame is recorded, not generated; `disoccluded_share` [B]: the share of it
        that no keyframe shows.
        """
        metres, degrees = self.distance_to_newest(frame.pose)
        new = (metres > NEW_METRES) | (degrees > NEW_DEGREES)
        new &= observed | (disoccluded_share > NEW_DISOCCLUDED) | (metres > NEW_GENERATED_METRES)
        return self.write(new, frame, generation)

    def distance_to_newest(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Metres and degrees (the larger of yaw and pitch) from the newest keyframe: [B] each.

        Infinite where there is none.
        """
        if not self.capacity:
            return pose.new_zeros(len(pose)), pose.new_zeros(len(pose))
        newest, slot = self.order.max(1)
        last = self.pose[torch.arange(len(pose), device=pose.device), slot]
        metres = (pose - last)[:, :3].norm(dim=-1)
        turned = (pose - last)[:, 3:]
        degrees = ((turned + 180) % 360 - 180).abs().amax(-1)
        missing = torch.where(newest > 0, 0.0, torch.inf)
        return metres + missing, degrees + missing

    def select(self, pose_to: Tensor, inverse: Tensor, sources: int, fov: float) -> tuple[Tensor, Tensor]:
        """The keyframes that show most of the view at `pose_to` [B, 5]: slots [B, K] and weights [B, K].

        `inverse` [B, h, w] (1/m) are assumed inverse ray distances of the view on a coarse grid. Greedy: the
        first has the greatest weight times visible share, each next one adds most to those before it. K is
        `sources`, or the capacity if that is less. The weight of a free slot is 0.
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
        distance = (self.pose - pose_to[:, None])[..., :3].norm(dim=-1)
        weight = (self.order > 0) * GENERATION_DECAY**self.generation / (1 + distance / HALF_WEIGHT_METRES)
        value = visible.view(B, M, h * w) * weight[..., None]
        best, selected = torch.zeros(B, h * w, device=value.device), []
        for _ in range(min(sources, M)):
            slot = (value - best[:, None]).clamp_min(0).sum(-1).argmax(1)
            best = torch.maximum(best, value[torch.arange(B, device=slot.device), slot])
            selected.append(slot)
        slots = torch.stack(selected, 1)
        return slots, weight.gather(1, slots)

    def gather(self, slots: Tensor) -> SourceFrames:
        """The keyframes in `slots` [B, K] as B*K frames."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        return SourceFrames(
            picture=self.picture[rows, slots].flatten(0, 1).float() / 255,
            tokens=self.tokens[rows, slots].flatten(0, 1),
            inverse_ray_distance=self.inverse_ray_distance[rows, slots].flatten(0, 1),
            pose=self.pose[rows, slots].flatten(0, 1),
        )


def warp_next_view(
    frame: SourceFrames,
    generation: Tensor,
    keyframes: Keyframes,
    pose: Tensor,
    ground: Tensor,
    sources: int,
    fov: float,
) -> tuple[WarpedView, WarpedView]:
    """The view at `pose` [B, 5], warped from the last frame and from up to `sources` keyframes.

    `generation` [B] is that of the last frame; `ground` [B, 2H, 2W] (1/m) the flat ground seen from `pose`.
    """
    B = len(pose)
    if not keyframes.capacity:
        last = warp_view(frame, pose, ground, fov)
        last.generation = generation[:, None, None].expand_as(last.visible_mask)
        return last, replace(last, visible_mask=torch.zeros_like(last.visible_mask))
    coarse = F.avg_pool2d(ground[:, None], 4)[:, 0]
    slots, weight = keyframes.select(pose, coarse, sources, fov)
    K = slots.shape[1]
    # All views in one batch, the last frame's first.
    views = warp_view(
        SourceFrames.cat(frame, keyframes.gather(slots)),
        torch.cat([pose, pose.repeat_interleave(K, 0)]),
        torch.cat([ground, ground.repeat_interleave(K, 0)]),
        fov,
    )
    last = views[:B]
    last.generation = generation[:, None, None].expand_as(last.visible_mask)
    memory = fuse_views(views[B:], weight, keyframes.generation.gather(1, slots))
    # What no keyframe shows is taken from the last frame, whose border is repeated.
    missing = (memory.visible_mask <= VISIBLE)[:, None].float()
    pixels = F.interpolate(missing, size=memory.picture.shape[-2:], mode="nearest").bool()
    cells = missing[:, 0].bool()
    memory.picture = torch.where(pixels, last.picture, memory.picture)
    memory.exact = torch.where(cells, last.exact, memory.exact)
    memory.tokens = torch.where(cells, last.tokens, memory.tokens)
    return last, memory
