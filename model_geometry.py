"""The world model that carries what was seen: geometry moves it, a ConvGRU does what is left.

    tokens[t] --decode--> picture[t] --depth[t], camera[t -> t+1]--> carried picture --encode--> z_last
    keyframes ----------------------- (memory.py) ------------------> carried picture --encode--> z_kept
    [z_last, z_kept, masks, depths] --1x1--> ConvGRU 18x32 <-> 9x16 <-> 5x8 (FiLM of the action) --> features
    logits[t+1] = sum over both of -gate * log(1 + |z + correction - code|^2 / scale)  + head(features)

The camera's rotation is the action's, its displacement is foretold by a small network (supervised by
recorded poses, summed up at play). The depth of each frame is learnt from how well later ones are drawn from
it. The recurrent state is carried by the same motion. Corrections start at nought, so that an untrained model
already is the geometry-warped copy. z and the codes are compared in the space of the codebook's principal
components: 24 of them tell the shipped tokenizer's codes apart as well as all 384 dimensions do.

FiLM: Perez et al., arXiv 1709.07871. ConvGRU: Ballas et al., arXiv 1511.06432. Masked parallel decoding:
Chang et al., MaskGIT, arXiv 2202.04200.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import camera
import memory
from actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from memory import Carried, Keyframes, Source
from model_convGru import ConvGRUCell, head_start
from vq_vae.vq_vae import VQVAE


@dataclass(frozen=True)
class GeometryConfig:
    """Sizes, the camera, and which mechanisms are at work. Picture, grid and codebook are the tokenizer's."""

    codebook_size: int
    latent_height: int = 18
    latent_width: int = 32
    picture_height: int = 72
    picture_width: int = 128
    vertical_fov_degrees: float = 70.0
    degrees_per_unit: float = 15.0  # of camera turn between two frames at an action of 1
    channels: int = 64
    coarse_channels: int = 96
    code_dim: int = 24  # principal components of the codebook in which codes are compared
    film_hidden: int = 128
    motion_dim: int = 64
    keyframes: int = 64  # places in the memory; 0 for none
    sources: int = 2  # keyframes from which one view is drawn
    rotate: bool = True  # the camera's rotation carries the picture
    move: bool = True  # and so does its displacement
    depth: bool = True  # learnt distances; False: a flat ground
    prior: bool = True  # the carried picture reaches the logits; False: only the features
    carry_state: bool = True  # the recurrent state moves with the picture
    coarse: bool = True  # the levels at 1/2 and 1/4
    action_dim: int = 5


@dataclass
class WorldState:
    """What is known after a frame. B worlds; all in the coordinates of the frame that was made last."""

    hidden: list[Tensor]  # of each level [B, C, h, w]
    pose: Tensor  # [B, 5] x, y, z (metres), yaw, pitch (degrees); where the dream began is the origin
    came_from: Tensor  # [B, 5] the pose of the frame before; NaN at the start
    moved: Tensor  # [B, 3] metres to the right, up and forward in the last step
    motion: Tensor  # [B, motion_dim] state of the network that foretells the displacement
    keyframes: Keyframes
    uncovered: Tensor  # [B] share of the last view that no keyframe shows
    generation: Tensor  # [B] of the last view; 0 if it was observed

    def __getitem__(self, index: slice | Tensor) -> "WorldState":
        """Some of the worlds."""
        return WorldState(
            [h[index] for h in self.hidden],
            *(x[index] for x in (self.pose, self.came_from, self.moved, self.motion, self.keyframes)),
            *(x[index] for x in (self.uncovered, self.generation)),
        )


@dataclass
class Motion:
    """A displacement as it is foretold."""

    moved: Tensor  # [B, 3] metres to the right, up and forward, if the player moves
    rest: Tensor  # [B] logit that the player does not

    @property
    def likeliest(self) -> Tensor:
        """[B, 3] metres; exactly 0 where rest is likelier, so that the picture rests too."""
        return self.moved.masked_fill(self.rest[:, None] > 0, 0.0)


@dataclass
class Prediction:
    """What is foretold of the next frame, before codes are chosen; `GeometryWorldModel.logits` reads it."""

    features: Tensor  # [B, C, H, W]
    z: tuple[Tensor, Tensor]  # carried from the last frame and from the keyframes, [B, D, H, W] each
    trusted: Tensor  # [B, 2, H, W] bool: which of the two the gates start from
    seen: Tensor  # [B, H, W] 0..1: how much of the cell was seen before
    fineness: Tensor  # [B, H, W] of what the gates start from: below 1 it is enlarged (memory.fineness)
    known: Tensor  # [B, H, W] 0..1: how much of it was so in an observed frame still kept
    cells: Tensor  # [B, H, W, 2] where each cell lay in the last frame
    inverse: Tensor  # [B, 2H, 2W] inverse distances of the *last* frame, with their gradient
    motion: Motion  # the displacement as it was foretold
    pose: Tensor  # [B, 5] of the next frame


class GeometryWorldModel(nn.Module):
    """Predicts the next grid of tokens from this one, the action and a `WorldState`.

    It looks at pictures, so it needs the tokenizer: `attach` it before anything else.
    """

    GATES = (2.5, -2.0, -0.5)  # before softplus: of what is trusted, of the other, of both in revealed cells
    WALK = 0.25  # metres a frame at an action of 1 before anything is learnt: 4 m/s at 16 frames/s
    REST = 0.01  # metres a frame: who moved less was at rest
    DEPTH_RANGE = (-5.0, 3.0)  # of the logarithm by which learnt inverse distances differ from the ground's
    OBSERVED = 0.5  # generations below it are of frames that were seen, not dreamt
    # masks and exactness of both sources, distance and generation of the keyframe, inverse distance, ground
    CHANNELS_OF_GEOMETRY = 8

    def __init__(self, config: GeometryConfig):
        super().__init__()
        self.config = config
        c, coarse, d = config.channels, config.coarse_channels, config.code_dim
        self.levels = [c, coarse, coarse] if config.coarse else [c]
        self.register_buffer("code_mean", torch.zeros(0))  # of the tokenizer's codebook [E]
        self.register_buffer("code_axes", torch.zeros(0))  # its principal components [d, E]
        self.register_buffer("codes", torch.zeros(config.codebook_size, d))  # in their axes [V, d]
        self.register_buffer("code_spread", torch.ones(d))  # by which features are divided
        # observed or dreamt, level of corruption, sine of the pitch; displacement; action
        self.film = nn.Sequential(
            nn.Linear(config.action_dim + 6, config.film_hidden),
            nn.SiLU(),
            nn.Linear(config.film_hidden, 2 * sum(self.levels)),
        )
        self.in_proj = nn.Conv2d(2 * d + self.CHANNELS_OF_GEOMETRY, c, 1)
        self.cells = nn.ModuleList(ConvGRUCell(n, 3) for n in self.levels)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1)
            for a, b in zip(self.levels[:-1], self.levels[1:], strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(b, a, 1) for a, b in zip(self.levels[:-1], self.levels[1:], strict=True)
        )
        self.mix = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))
        self.reveal = nn.Sequential(
            nn.Conv2d(c + d + 1, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)
        )
        self.out = nn.Conv2d(c, 2 + 2 * d + c, 1)  # gates, corrections, query
        self.head = nn.Conv2d(c, config.codebook_size, 1)
        self.gate_bias = nn.Parameter(torch.tensor(self.GATES))
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.far = nn.Sequential(
            nn.Conv2d(d + 1 + c, c, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c, c, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c, 4, 3, padding=1),
        )
        self.scene = nn.Conv2d(self.levels[-1], 8, 1)
        self.hold = nn.Sequential(nn.Linear(config.action_dim + 8 * 5 * 8, 64), nn.SiLU(), nn.Linear(64, 3))
        self.pace = nn.GRUCell(config.action_dim + 3, config.motion_dim)
        self.stride = nn.Linear(config.motion_dim, 4)  # displacement, logit of rest
        for last in (self.out, self.reveal[-1], self.far[-1], self.stride, self.hold[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.zeros_(self.head.bias)
        self.tokenizer: VQVAE | None = None
        self.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------ the tokenizer

    def attach(self, tokenizer: VQVAE) -> "GeometryWorldModel":
        """Gives the model the tokenizer through which it sees; it is no part of the model's weights."""
        object.__setattr__(self, "tokenizer", tokenizer)
        return self

    @torch.no_grad()
    def init_from_codebook(self, codebook: Tensor) -> None:
        """Finds the principal components [d, E] of a codebook [V, E] and starts the head on them, so that
        what is learnt of one code serves those that look like it."""
        d = self.config.code_dim
        codebook = codebook.float()
        self.code_mean = codebook.mean(0)
        self.code_axes = torch.linalg.svd(codebook - self.code_mean, full_matrices=False)[2][:d].clone()
        self.codes.zero_()
        found = (codebook - self.code_mean) @ self.code_axes.T
        self.codes[:, : found.shape[1]] = found
        spread = self.codes.std(0)
        self.code_spread.copy_(spread.clamp_min(0.1 * spread.max()))
        head_start(self.head.weight, codebook)

    def _load_from_state_dict(self, state_dict, prefix, *args):  # noqa: ANN001, ANN002
        # The width of the tokenizer's code vectors is known only from the weights.
        for name in ("code_mean", "code_axes"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def look(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, Hp, Wp] -> their places in the space of codes [N, d, H, W] float32; no gradient."""
        with torch.no_grad():
            z = self.tokenizer.encoder(pictures.contiguous(memory_format=torch.channels_last))
            with torch.autocast(z.device.type, enabled=False):
                z = z.float().movedim(1, -1) - self.code_mean
                return F.pad(z @ self.code_axes.T, (0, len(self.code_spread) - len(self.code_axes))).movedim(
                    -1, 1
                )

    def code(self, tokens: Tensor) -> Tensor:
        """Tokens [N, H, W] -> their places in the space of codes [N, d, H, W]."""
        return self.codes[tokens].movedim(-1, 1)

    # ------------------------------------------------------------ camera and distances

    def init_state(
        self,
        batch: int,
        device: torch.device | None = None,
        keyframes: int | None = None,
    ) -> WorldState:
        """A state that has seen nothing, the camera at the origin and level; `keyframes` places in the memory
        if other than the config's."""
        g = self.config
        sizes = [(g.latent_height, g.latent_width)]
        for _ in self.levels[1:]:
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        pose = torch.zeros(batch, 5, device=device)
        return WorldState(
            hidden=[
                torch.zeros(batch, c, *size, device=device)
                for c, size in zip(self.levels, sizes, strict=True)
            ],
            pose=pose,
            came_from=torch.full_like(pose, torch.nan),
            moved=torch.zeros(batch, 3, device=device),
            motion=torch.zeros(batch, g.motion_dim, device=device),
            keyframes=Keyframes.empty(
                batch,
                g.keyframes if keyframes is None else keyframes,
                (g.picture_height, g.picture_width),
                sizes[0],
                device,
            ),
            uncovered=torch.ones(batch, device=device),
            generation=torch.zeros(batch, device=device),
        )

    def ground(self, pose: Tensor, scale: int = 2) -> Tensor:
        """Inverse distances [B, scale*H, scale*W] of a flat ground under the player."""
        g = self.config
        return camera.ground_plane(
            pose,
            scale * g.latent_height,
            scale * g.latent_width,
            g.vertical_fov_degrees,
            camera.EYE_HEIGHT,
            camera.FAR,
        )

    def inverse_distance(self, tokens: Tensor, pose: Tensor, hidden: Tensor) -> Tensor:
        """How far what a frame shows is: tokens [B, H, W], pose [B, 5], the finest recurrent state in the
        frame's coordinates [B, C, H, W] -> [B, 2H, 2W] in 1/m."""
        ground = self.ground(pose)
        if not self.config.depth:
            return ground
        plane = F.avg_pool2d(ground[:, None], 2).log()
        x = torch.cat([self.code(tokens) / self.code_spread[:, None, None], plane, hidden], 1)
        change = F.pixel_shuffle(self.far(x), 2)[:, 0].float().clamp(*self.DEPTH_RANGE)
        return ground * change.exp()

    def foretell_motion(
        self, actions: Tensor, moved: Tensor, motion: Tensor, scene: Tensor | None = None
    ) -> tuple[Motion, Tensor]:
        """actions [B, A], the displacement before [B, 3], the motion state [B, motion_dim] and what the scene
        is like (the coarsest recurrent state; None: unknown) -> the displacement and the new motion state.

        Actions and displacements alone are learnt beforehand (`training.teach_motion`); the scene then tells
        where one is held up, and leaves the rest as it is.
        """
        # Pictures come in small batches, which would undo what was learnt of motion from many.
        with torch.set_grad_enabled(torch.is_grad_enabled() and scene is None):
            motion = self.pace(torch.cat([actions, moved / self.WALK], 1), motion)
            stride, rest = self.stride(motion).split([3, 1], 1)
        keys = actions[:, [MOVE_X, JUMP, MOVE_Z]] * actions.new_tensor([1.0, 0.0, 1.0])
        free, held = self.WALK * (keys + stride).float(), 1.0
        if scene is not None:
            around = F.adaptive_avg_pool2d(self.scene(scene), (5, 8)).flatten(1)
            held = 2 * torch.sigmoid(self.hold(torch.cat([actions, around], 1)).float())
        return Motion(free * held, rest[:, 0].float()), motion

    def go(self, pose: Tensor, actions: Tensor, moved: Tensor) -> Tensor:
        """Pose [B, 5], actions [B, A], displacement [B, 3] -> the next pose [B, 5]; pitch ends at +-90."""
        turn = actions[:, [YAW, PITCH]] * self.config.degrees_per_unit
        yaw = pose[:, 3] + turn[:, 0]
        pitch = (pose[:, 4] + turn[:, 1]).clamp(-90, 90)
        sin, cos = torch.deg2rad(yaw).sin(), torch.deg2rad(yaw).cos()
        right, up, forward = moved.unbind(1)
        step = torch.stack([-cos * right - sin * forward, up, -sin * right + cos * forward], 1)
        return torch.cat([pose[:, :3] + step, yaw[:, None], pitch[:, None]], 1)

    @staticmethod
    def moved_between(pose: Tensor, following: Tensor) -> Tensor:
        """The displacement [B, 3] to the right, up and forward of the later pose: what `go` undoes."""
        step = (following - pose)[:, :3]
        sin, cos = torch.deg2rad(following[:, 3]).sin(), torch.deg2rad(following[:, 3]).cos()
        return torch.stack(
            [-cos * step[:, 0] - sin * step[:, 2], step[:, 1], -sin * step[:, 0] + cos * step[:, 2]], 1
        )

    # ------------------------------------------------------------ one frame

    @staticmethod
    def first_worlds(state: WorldState, worlds: int) -> WorldState:
        """The state of the first so many worlds of a batch."""
        return state[:worlds]

    def predict(
        self,
        tokens: Tensor,
        actions: Tensor,
        state: WorldState,
        observed: bool | Tensor = True,
        picture: Tensor | None = None,
        pose: Tensor | None = None,
        next_pose: Tensor | None = None,
        level: Tensor | float = 0.0,
    ) -> tuple[Prediction, WorldState]:
        """One frame: tokens [B, H, W] and actions [B, A] -> what comes next, and the state after it.

        `observed` (or [B]): the tokens are a recording's, not dreamt. `picture` [B, 3, Hp, Wp]: the tokens,
        decoded, where that is at hand. `pose` [B, 5]: from where they were seen, NaN where
        unknown; else it is what was foretold. `next_pose` [B, 5]: where the camera truly went from there, in
        training.
        `level` (or [B]): the share of the tokens that were corrupted.
        """
        B = len(tokens)
        actions = actions.float()
        observed = torch.as_tensor(observed, device=tokens.device).expand(B)
        if picture is None:
            with torch.no_grad():
                picture = self.tokenizer.decode_code(tokens).clamp(0, 1)
        state = self.correct(state, pose)
        moved, motion = self.foretell_motion(actions, state.moved, state.motion, state.hidden[-1])
        inverse = self.inverse_distance(tokens, state.pose, state.hidden[0])
        with torch.autocast(tokens.device.type, enabled=False), torch.no_grad():
            pose = self.go(state.pose, actions, moved.likeliest)
            if next_pose is not None:
                pose = torch.where(next_pose.isfinite(), next_pose, pose)
            went = self.moved_between(state.pose, pose)
            pose_carry = pose.clone()
            if not self.config.move:
                pose_carry[:, :3] = state.pose[:, :3]
            if not self.config.rotate:
                pose_carry[:, 3:] = state.pose[:, 3:]
            frame = Source(picture, tokens, inverse.detach(), state.pose)
            generation = torch.where(observed, 0.0, state.generation)
            keyframes = self.remember(frame, generation, observed, state)
            last, kept = self.draw(frame, generation, keyframes, pose_carry)
        z = self.look(torch.cat([last.picture, kept.picture])).chunk(2)
        with torch.autocast(tokens.device.type, enabled=False):
            z = tuple(
                torch.lerp(found, self.code(c.tokens), c.exact[:, None])
                for found, c in zip(z, (last, kept), strict=True)
            )
            still = last.exact > 0.9  # the camera rests: the frame itself is the best source
            by_memory = (kept.mask > memory.UNSEEN) & ~still
            by_last = (last.mask > memory.UNSEEN) & ~by_memory
            seen = torch.maximum(last.mask, kept.mask)
        features, hidden = self.recur(z, last, kept, pose, actions, went, observed, level, state)
        prediction = Prediction(
            features=features,
            z=z,
            trusted=torch.stack([by_last, by_memory], 1),
            seen=seen,
            fineness=torch.where(by_memory, kept.fineness, last.fineness),
            known=kept.mask * (kept.generation < self.OBSERVED),
            cells=last.cells,
            inverse=inverse,
            motion=moved,
            pose=pose,
        )
        after = WorldState(
            hidden=hidden,
            pose=pose,
            came_from=state.pose,
            moved=went,
            motion=motion,
            keyframes=keyframes,
            uncovered=1 - kept.mask.mean((1, 2)),
            generation=(1 + torch.where(by_memory, kept.generation, last.generation).mean((1, 2))).clamp(
                max=4
            ),
        )
        return prediction, after

    def correct(self, state: WorldState, pose: Tensor | None) -> WorldState:
        """The state with the frame's true pose [B, 5] and displacement, where they are known."""
        if pose is None:
            return state
        pose = torch.where(pose.isfinite(), pose, state.pose)
        moved = self.moved_between(state.came_from, pose)
        return replace(state, pose=pose, moved=torch.where(moved.isfinite(), moved, state.moved))

    def remember(self, frame: Source, generation: Tensor, observed: Tensor, state: WorldState) -> Keyframes:
        """The keyframes with this frame, where it is worth keeping (constants of memory.py)."""
        metres, degrees = state.keyframes.away(frame.pose)
        new = (metres > memory.NEW_METRES) | (degrees > memory.NEW_DEGREES)
        new &= observed | (state.uncovered > memory.UNCOVERED) | (metres > memory.WALKED)
        return state.keyframes.write(new, frame, generation)

    def draw(
        self, frame: Source, generation: Tensor, keyframes: Keyframes, pose: Tensor
    ) -> tuple[Carried, Carried]:
        """The next view as the last frame shows it, and as the keyframes do."""
        fov, B = self.config.vertical_fov_degrees, len(pose)
        ground = self.ground(pose)
        if not keyframes.places:
            last = memory.carry(frame, pose, ground, fov)
            last.generation = generation[:, None, None].expand_as(last.mask)
            return last, replace(last, mask=torch.zeros_like(last.mask))
        coarse = F.avg_pool2d(ground[:, None], 4)[:, 0]
        places, worth = keyframes.choose(pose, coarse, self.config.sources, fov)
        K = places.shape[1]
        kept = keyframes.source(places)
        # All views in one go: the last frame's first.
        both = Source(
            torch.cat([frame.picture, kept.picture]),
            torch.cat([frame.tokens, kept.tokens]),
            torch.cat([frame.inverse, kept.inverse]),
            torch.cat([frame.pose, kept.pose]),
        )
        to = torch.cat([pose, pose.repeat_interleave(K, 0)])
        guess = torch.cat([ground, ground.repeat_interleave(K, 0)])
        drawn = memory.carry(both, to, guess, fov)
        last = drawn[:B]
        last.generation = generation[:, None, None].expand_as(last.mask)
        found = memory.compose(drawn[B:], worth, keyframes.generation.gather(1, places))
        # What no keyframe shows is taken from the last frame (whose border is continued).
        blank = (found.mask <= memory.UNSEEN)[:, None].float()
        large = F.interpolate(blank, size=found.picture.shape[-2:], mode="nearest").bool()
        found.picture = torch.where(large, last.picture, found.picture)
        found.exact = torch.where(blank[:, 0].bool(), last.exact, found.exact)
        found.tokens = torch.where(blank[:, 0].bool(), last.tokens, found.tokens)
        return last, found

    def recur(
        self,
        z: tuple[Tensor, Tensor],
        last: Carried,
        kept: Carried,
        pose: Tensor,
        actions: Tensor,
        went: Tensor,
        observed: Tensor,
        level: Tensor | float,
        state: WorldState,
    ) -> tuple[Tensor, list[Tensor]]:
        """The recurrent core -> features [B, C, H, W] and the new state of each level."""
        B = len(actions)
        ground = F.avg_pool2d(self.ground(pose)[:, None], 2)
        geometry = [
            last.mask[:, None], last.exact[:, None], kept.mask[:, None], kept.exact[:, None],
            kept.distance[:, None] / memory.NEAR, kept.generation[:, None] / 4,
            F.avg_pool2d(last.inverse[:, None], 2).clamp_min(1e-3).log() / 4, ground.log() / 4,
        ]  # fmt: skip
        spread = self.code_spread[:, None, None]
        x = self.in_proj(torch.cat([z[0] / spread, z[1] / spread, *geometry], 1))
        level = torch.as_tensor(level, device=x.device, dtype=torch.float32).expand(B)
        told = [observed.float(), level, torch.deg2rad(pose[:, 4]).sin()]
        film = self.film(torch.cat([actions, went / self.WALK, torch.stack(told, 1)], 1))
        grid, new = last.cells.movedim(-1, 1), []
        for i, (cell, part) in enumerate(
            zip(self.cells, film.split([2 * c for c in self.levels], 1), strict=True)
        ):
            if i:
                x = self.down[i - 1](x)
            gamma, beta = part[:, :, None, None].chunk(2, 1)
            old = state.hidden[i]
            if self.config.carry_state:
                places = F.adaptive_avg_pool2d(grid, old.shape[-2:]).movedim(1, -1)
                old = F.grid_sample(old, places, padding_mode="zeros", align_corners=False)
            x = cell(x * (1 + gamma) + beta, old)
            new.append(x)
        for i in reversed(range(len(self.up))):
            x = new[i] + F.interpolate(self.up[i](x), size=new[i].shape[-2:], mode="nearest")
        return x + self.mix(x), new

    # ------------------------------------------------------------ from features to codes

    def revealed(self, prediction: Prediction, tokens: Tensor, shown: Tensor) -> Prediction:
        """The prediction when some of the next frame's tokens are given: tokens [B, H, W], shown [B, H, W]
        bool. Where nothing is shown in a whole frame, it is left as it is."""
        code = self.code(tokens) / self.code_spread[:, None, None] * shown[:, None]
        change = self.reveal(torch.cat([prediction.features, code, shown[:, None].float()], 1))
        change = change * shown.flatten(1).any(1)[:, None, None, None]
        return replace(prediction, features=prediction.features + change)

    def logits(
        self,
        prediction: Prediction,
        cells: Tensor | None = None,
        trust: tuple[float | Tensor, float] = (0.0, 0.0),
    ) -> Tensor:
        """Logits over the next frame's codes: [B, V, H, W] float32; with `cells` [B, n] (row * W + column) of
        those alone: [B, n, V]. `trust`: how much farther than learnt the gates are opened (before softplus),
        where a cell was seen (or [B, H, W]), and where it was not and the picture's continued border stands
        for it."""
        g, d = self.config, self.config.code_dim
        B, C, H, W = prediction.features.shape
        out = self.out(prediction.features)

        def at(x: Tensor) -> Tensor:
            """[B, C, H, W] -> [B, n, C] of the chosen cells."""
            x = x.flatten(2)
            if cells is not None:
                x = x.gather(2, cells[:, None].expand(-1, x.shape[1], -1))
            return x.mT

        opened, corrections, query = at(out).split([2, 2 * d, C], -1)
        logits = F.linear(query, self.head.weight[:, :, 0, 0], self.head.bias)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if g.prior:
                seen, border = trust
                if isinstance(seen, Tensor):
                    seen = at(seen[:, None])
                gates = self.gates(opened, at(prediction.trusted), (seen, border))
                corrections = corrections.float().chunk(2, -1)
                for i, z in enumerate(prediction.z):
                    place = at(z) + corrections[i] * self.code_spread
                    logits = self.attract(logits, place, gates[..., i : i + 1], self.log_scale[i])
        return logits if cells is not None else logits.mT.unflatten(2, (H, W))  # a view: it is large

    def gates(self, opened: Tensor, trusted: Tensor, trust: tuple[float | Tensor, float]) -> Tensor:
        """How strongly the two carried pictures pull at the codes, [B, n, 2] of 0 or more: from what the
        network says of it and which of the two is trusted, [B, n, 2] both; `trust` as in `logits`, [B, n, 1]
        if it is of cells."""
        chosen, other, border = self.gate_bias
        start = torch.where(trusted, chosen + trust[0], other)
        start = torch.where(trusted.any(-1, keepdim=True), start, border + trust[1])
        return F.softplus(opened.float() + start)

    def gate_map(self, prediction: Prediction, trust: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        """`gates` of all cells, [B, 2, H, W]: from the last frame and from the keyframes."""
        opened = self.out(prediction.features)[:, :2].movedim(1, -1)
        return self.gates(opened, prediction.trusted.movedim(1, -1), trust).movedim(-1, 1)

    def attract(self, logits: Tensor, place: Tensor, gate: Tensor, log_scale: Tensor) -> Tensor:
        """logits [B, n, V] - gate [B, n, 1] * log(1 + d^2 / scale); d: from a place [B, n, d] to each code.

        The most costly line of a step, so d^2 is one product, and the rest is done in place where no gradient
        is asked for.
        """
        scale = (-log_scale).exp()
        one = torch.ones_like(place[..., :1])
        # d^2 = |z|^2 - 2 z.c + |c|^2
        point = scale * torch.cat([place, place.square().sum(-1, keepdim=True), one], -1)
        norms = self.codes.square().sum(1, keepdim=True)
        square = point @ torch.cat([-2 * self.codes, torch.ones_like(norms), norms], 1).T
        if torch.is_grad_enabled():
            return logits - gate * square.clamp_min(0).log1p()
        return logits.addcmul_(square.clamp_(min=0).log1p_(), gate, value=-1)

    def step(self, tokens: Tensor, actions: Tensor, state: WorldState | None = None, **seen):
        """One frame, as `predict`: tokens [B, H, W], actions [B, A] -> logits [B, V, H, W], new state."""
        if state is None:
            state = self.init_state(len(tokens), tokens.device)
        prediction, state = self.predict(tokens, actions, state, **seen)
        return self.logits(prediction), state
