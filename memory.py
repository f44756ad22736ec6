"""What the player has seen and may see again: keyframes, and what of them shows in the view that comes next.

A keyframe is a whole frame (its picture, codes and inverse distances) with the pose from which it was seen.
It is written once and never changed, so that nothing fades by being looked at: each new view is drawn
straight from the keyframes that show it best, not from a copy of a copy.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import camera

NEAR = 2.0  # metres from a keyframe at which it is worth half of one on the spot
INVENTED = 0.8  # worth of a dreamt keyframe against one that it was dreamt from
NEW_DEGREES, NEW_METRES = 2.0, 0.25  # an observed frame is kept if it is so far from the last one that was
UNCOVERED = 0.08  # a dreamt frame is kept if so large a share of it shows what no keyframe does ...
WALKED = 1.5  # ... or if so many metres were walked since the last one that was kept
EXACT = 0.1  # cells: a picture that is shifted by whole cells but for so much still has the same codes
UNSEEN = 0.5  # a cell less than so far covered by what a source shows is not carried from it


@dataclass
class Source:
    """Frames from which others are drawn. N frames of H x W cells, Hp x Wp pixels."""

    picture: Tensor  # [N, 3, Hp, Wp] in [0, 1]
    tokens: Tensor  # [N, H, W]
    inverse: Tensor  # [N, 2H, 2W] inverse distances in 1/m
    pose: Tensor  # [N, 5]


@dataclass
class Carried:
    """A view as it is drawn from what was seen before."""

    picture: Tensor  # [N, 3, Hp, Wp]; its border is continued where nothing is known
    tokens: Tensor  # [N, H, W] the code that stood where each cell now is, or nearest to it
    exact: Tensor  # [N, H, W] 0..1: 1 where the cell lies on that very code, so that nothing is resampled
    mask: Tensor  # [N, H, W] 0..1: how much of the cell was seen
    inverse: Tensor  # [N, 2H, 2W] 1/m, as the new view has them
    cells: Tensor  # [N, H, W, 2] where each cell's centre lay in the old picture, for `camera.warp`
    fineness: Tensor  # [N, H, W] cells of the old picture in one of the view, by length; 0.5: twice enlarged
    distance: Tensor  # [N, H, W] metres between the two poses
    generation: Tensor  # [N, H, W] 0 what was observed, 1 what was dreamt from it, ...

    def __getitem__(self, index: slice) -> "Carried":
        """Some of the views."""
        return Carried(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def carry(source: Source, pose_to: Tensor, guess: Tensor, fov: float) -> Carried:
    """Draws the views at `pose_to` [N, 5] from N frames; `guess` [N, 2H, 2W] is where the search for the
    inverse distances begins. Computed in float32; no gradient."""
    N, H, W = source.tokens.shape
    size = 2 * H, 2 * W
    inverse = camera.carry_inverse_distance(source.inverse, source.pose, pose_to, guess, fov)
    grid, seen = camera.reproject(source.pose, pose_to, inverse, *size, fov)
    offset = grid.movedim(-1, 1) - camera.identity_grid(*size, grid.device)  # [N, 2, 2H, 2W]
    # The offset is smooth, so it may be enlarged; enlarging the places would cut them short at the border.
    full = F.interpolate(offset, source.picture.shape[-2:], mode="bilinear")
    full = (full + camera.identity_grid(*source.picture.shape[-2:], grid.device)).movedim(1, -1)
    shift = offset * offset.new_tensor([W / 2, H / 2])[:, None, None]  # in cells
    whole = F.avg_pool2d(shift, 2).round()
    rest = (shift - F.interpolate(whole, scale_factor=2.0, mode="nearest")).abs().amax(1, keepdim=True)
    column = (torch.arange(W, device=grid.device) + whole[:, 0]).clamp(0, W - 1)
    row = (torch.arange(H, device=grid.device)[:, None] + whole[:, 1]).clamp(0, H - 1)
    place = (row * W + column).long().flatten(1)
    moved = (pose_to - source.pose)[:, :3].norm(dim=-1)
    cells = F.avg_pool2d(grid.movedim(-1, 1), 2).movedim(1, -1)
    return Carried(
        picture=camera.warp(source.picture, full),
        tokens=source.tokens.flatten(1).gather(1, place).view(N, H, W),
        exact=(-(F.max_pool2d(rest, 2)[:, 0] / EXACT).square()).exp(),
        mask=F.avg_pool2d(seen.float()[:, None], 2)[:, 0],
        inverse=inverse,
        cells=cells,
        fineness=fineness(cells),
        distance=moved[:, None, None].expand(N, H, W),
        generation=torch.zeros(N, H, W, device=grid.device),
    )


def fineness(cells: Tensor) -> Tensor:
    """Where each cell of a view lay in the old picture, [N, H, W, 2] as in `Carried` -> how many of its cells
    lie in one of the view, by length: the root of the Jacobian's determinant, [N, H, W]."""
    _, H, W, _ = cells.shape
    down, right = torch.gradient(cells * cells.new_tensor([W / 2, H / 2]), dim=(1, 2))
    return (right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]).abs().sqrt()


@dataclass
class Keyframes:
    """The keyframes of B worlds, M places each. Values, not a network: no gradient passes through them."""

    picture: Tensor  # [B, M, 3, Hp, Wp] uint8
    tokens: Tensor  # [B, M, H, W] int64
    inverse: Tensor  # [B, M, 2H, 2W]
    pose: Tensor  # [B, M, 5]
    generation: Tensor  # [B, M]
    written: Tensor  # [B, M] the how-manieth of its world, from 1; 0 for a free place

    @classmethod
    def empty(
        cls,
        batch: int,
        places: int,
        picture: tuple[int, int],
        latent: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> "Keyframes":
        """None written yet; sizes are (height, width) of pictures and token grids."""
        H, W = latent
        lead = (batch, places)
        return cls(
            picture=torch.zeros(*lead, 3, *picture, dtype=torch.uint8, device=device),
            tokens=torch.zeros(*lead, H, W, dtype=torch.long, device=device),
            inverse=torch.zeros(*lead, 2 * H, 2 * W, device=device),
            pose=torch.zeros(*lead, 5, device=device),
            generation=torch.zeros(lead, device=device),
            written=torch.zeros(lead, device=device),
        )

    @property
    def places(self) -> int:
        """How many keyframes a world can hold."""
        return self.written.shape[1]

    def __getitem__(self, index: slice | Tensor) -> "Keyframes":
        """Some of the worlds."""
        return Keyframes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def write(self, where: Tensor, frame: Source, generation: Tensor) -> "Keyframes":
        """With the frames of the worlds `where` [B] bool added, each over its world's oldest keyframe if all
        places are taken; `generation` [B]. Changes nothing in place."""
        worlds = where.nonzero()[:, 0]
        if not len(worlds) or not self.places:
            return self
        place = self.written[worlds].argmin(1)
        new = {
            "picture": frame.picture.detach().clamp(0, 1).mul(255).round().byte(),
            "tokens": frame.tokens,
            "inverse": frame.inverse.detach(),
            "pose": frame.pose,
            "generation": generation,
            "written": self.written.amax(1) + 1,
        }
        changed = {}
        for name, value in new.items():
            kept = getattr(self, name).clone()
            kept[worlds, place] = value[worlds].to(kept.dtype)
            changed[name] = kept
        return replace(self, **changed)

    def away(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Metres and degrees (the larger of yaw and pitch) from the keyframe written last, [B] each; infinite
        where there is none."""
        if not self.places:
            return pose.new_zeros(len(pose)), pose.new_zeros(len(pose))
        newest, place = self.written.max(1)
        last = self.pose[torch.arange(len(pose), device=pose.device), place]
        metres = (pose - last)[:, :3].norm(dim=-1)
        turned = (pose - last)[:, 3:]
        degrees = ((turned + 180) % 360 - 180).abs().amax(-1)
        never = torch.where(newest > 0, 0.0, torch.inf)
        return metres + never, degrees + never

    def choose(self, pose_to: Tensor, inverse: Tensor, sources: int, fov: float) -> tuple[Tensor, Tensor]:
        """The keyframes that show most of the view at `pose_to` [B, 5]: their places [B, K] and worth [B, K].

        `inverse` [B, h, w] (1/m) is what the view is taken to be like, on a coarse grid. The first chosen is
        the one whose worth times the share of the view that it shows is greatest, each further one the one
        that adds most to those before it. K is `sources` or less. The worth is 0 for a free place.
        """
        B, M = self.written.shape
        h, w = inverse.shape[-2:]
        # Relative positions, so that float32 does not lose centimetres far from the world's origin.
        origin = torch.cat([pose_to[:, :3], torch.zeros_like(pose_to[:, 3:])], 1)
        _, seen = camera.reproject(
            (self.pose - origin[:, None]).flatten(0, 1),
            (pose_to - origin).repeat_interleave(M, 0),
            inverse.repeat_interleave(M, 0),
            h,
            w,
            fov,
        )
        distance = (self.pose - pose_to[:, None])[..., :3].norm(dim=-1)
        worth = (self.written > 0) * INVENTED**self.generation / (1 + distance / NEAR)
        value = seen.view(B, M, h * w) * worth[..., None]
        best, chosen = torch.zeros(B, h * w, device=value.device), []
        for _ in range(min(sources, M)):
            pick = (value - best[:, None]).clamp_min(0).sum(-1).argmax(1)
            best = torch.maximum(best, value[torch.arange(B, device=pick.device), pick])
            chosen.append(pick)
        places = torch.stack(chosen, 1)
        return places, worth.gather(1, places)

    def source(self, places: Tensor) -> Source:
        """The keyframes at `places` [B, K] as B*K frames."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        return Source(
            picture=self.picture[rows, places].flatten(0, 1).float() / 255,
            tokens=self.tokens[rows, places].flatten(0, 1),
            inverse=self.inverse[rows, places].flatten(0, 1),
            pose=self.pose[rows, places].flatten(0, 1),
        )


def compose(carried: Carried, worth: Tensor, generation: Tensor) -> Carried:
    """B views, each from K drawings of it: `carried` of B*K, `worth` and `generation` [B, K].

    Each cell is taken from the drawing whose worth times its mask is greatest there.
    """
    B, K = worth.shape
    H, W = carried.mask.shape[-2:]
    mask = carried.mask.view(B, K, H, W)
    pick = (mask * worth[:, :, None, None]).argmax(1)  # [B, H, W]

    def taken(values: Tensor, scale: int = 1) -> Tensor:
        """[B*K, C, scale*H, scale*W] -> [B, C, scale*H, scale*W]"""
        index = F.interpolate(pick[:, None].float(), scale_factor=float(scale), mode="nearest").long()
        values = values.view(B, K, *values.shape[1:])
        index = index[:, None].expand(-1, -1, values.shape[2], -1, -1)
        return values.gather(1, index)[:, 0]

    generation = generation[:, :, None, None].expand(B, K, H, W)
    return Carried(
        picture=taken(carried.picture, carried.picture.shape[-2] // H),
        tokens=taken(carried.tokens[:, None])[:, 0],
        exact=taken(carried.exact[:, None])[:, 0],
        mask=taken(carried.mask[:, None])[:, 0] * (worth.amax(1) > 0)[:, None, None],
        inverse=taken(carried.inverse[:, None], 2)[:, 0],
        cells=taken(carried.cells.movedim(-1, 1)).movedim(1, -1),
        fineness=taken(carried.fineness[:, None])[:, 0],
        distance=taken(carried.distance[:, None])[:, 0],
        generation=taken(generation.reshape(B * K, 1, H, W))[:, 0],
    )
