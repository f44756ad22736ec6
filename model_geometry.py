"""The geometry world model: warps what was observed into the next view, and predicts the rest with a ConvGRU.

    tokens[t] --decode--> picture[t] --depth, pose[t+1]--> warped last frame --encode--> z_last
    keyframes ------------------------------------------> warped keyframes --encode--> z_memory
    [z_last, z_memory, masks, depths] --1x1--> ConvGRU 18x32 <-> 9x16 <-> 5x8 (FiLM on action) --> features
    logits[t+1] = sum over both z of -gate * log(1 + |z + correction - code|^2 / scale)  +  head(features)

The camera's rotation is the action's; its displacement is predicted (geometry/motion.py) and trained on
recorded poses. The depth of each frame is trained by reprojection. The recurrent state is warped by the same
motion. Corrections start at zero, so an untrained model predicts the geometry-warped copy.

FiLM: Perez et al., arXiv 1709.07871. ConvGRU: Ballas et al., arXiv 1511.06432. Masked parallel decoding:
Chang et al., MaskGIT, arXiv 2202.04200.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from geometry import camera
from geometry.keyframes import HALF_WEIGHT_METRES, VISIBLE, warp_next_view
from geometry.motion import METRES_PER_UNIT, Motion, MotionModel, displacement_between, next_pose
from geometry.state import WorldState
from geometry.warping import SourceFrames, WarpedView
from model_convGru import ConvGRUCell
from vq_vae.code_space import CodeSpace, init_from_codebook
from vq_vae.tokenizer import Tokenizer

GATES = (
    2.5,
    -2.0,
    -0.5,
)  # initial, before softplus: of the chosen source, of the other, of disoccluded cells
DEPTH_RANGE = (-5.0, 3.0)  # of log(inverse ray distance / that of the flat ground)
OBSERVED_BELOW = 0.5  # a mean generation below this counts as observed
GENERATION_MAX = 4.0
GEOMETRY_CHANNELS = 8  # visible and exact masks of both views, baseline, generation, distance, ground
STILL = 0.9  # exactness of a cell above which the camera counts as resting


@dataclass(frozen=True)
class GeometryConfig:
    """Sizes and the camera. Picture, grid and codebook are the tokenizer's."""

    codebook_size: int
    latent_height: int = 18
    latent_width: int = 32
    picture_height: int = 72
    picture_width: int = 128
    vertical_fov_degrees: float = 70.0
    degrees_per_unit: float = 15.0  # camera turn between two frames at an action of 1
    channels: int = 64
    coarse_channels: int = 96
    code_dim: int = 24  # principal components of the codebook in which codes are compared
    film_hidden: int = 128
    motion_dim: int = 64
    keyframes: int = 64  # capacity of the memory; 0: none
    sources: int = 2  # keyframes from which one view is warped
    prior: bool = True  # the warped views are a prior on the logits; False: features only
    action_dim: int = 5


@dataclass
class Prediction:
    """What is predicted of the next frame before tokens are sampled; input of `logits`."""

    features: Tensor  # [B, C, H, W]
    z: tuple[Tensor, Tensor]  # points in code space of the last frame and the keyframes, warped; [B, d, H, W]
    source_mask: Tensor  # [B, 2, H, W] bool: the source of each cell, last frame or keyframes
    visible_mask: Tensor  # [B, H, W] 0..1: share of the cell that a source shows
    source_scale: Tensor  # [B, H, W] source cells per cell, by length; below 1: magnified
    observed_mask: Tensor  # [B, H, W] 0..1: share of the cell that an observed keyframe shows
    source_grid: Tensor  # [B, H, W, 2] where each cell lies in the last frame
    inverse_ray_distance: Tensor  # [B, 2H, 2W] 1/m, of the *last* frame, with gradient
    motion: Motion  # the predicted displacement


class GeometryWorldModel(nn.Module):
    """Predicts the next grid of tokens from the current one, the action and a `WorldState`."""

    def __init__(self, config: GeometryConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        c, coarse, d = config.channels, config.coarse_channels, config.code_dim
        self.levels = [c, coarse, coarse]
        self.code_space = CodeSpace(config.codebook_size, tokenizer.config.embedding_dim, d)
        # FiLM on: action, displacement, observed or generated, corruption level, sine of the pitch
        self.film = nn.Sequential(
            nn.Linear(config.action_dim + 6, config.film_hidden),
            nn.SiLU(),
            nn.Linear(config.film_hidden, 2 * sum(self.levels)),
        )
        self.in_proj = nn.Conv2d(2 * d + GEOMETRY_CHANNELS, c, 1)
        self.cells = nn.ModuleList(ConvGRUCell(n, 3) for n in self.levels)
        pairs = list(zip(self.levels[:-1], self.levels[1:], strict=True))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.output_block = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)
        )
        self.decoding_block = nn.Sequential(
            nn.Conv2d(c + d + 1, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)
        )
        self.out_proj = nn.Conv2d(c, 2 + 2 * d + c, 1)  # gates, corrections, query of the head
        self.head = nn.Conv2d(c, config.codebook_size, 1)
        self.gate_bias = nn.Parameter(torch.tensor(GATES))
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.depth_head = nn.Sequential(
            nn.Conv2d(d + 1 + c, c, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c, c, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c, 4, 3, padding=1),
        )
        self.motion_model = MotionModel(config.action_dim, config.motion_dim, self.levels[-1])
        for last in (self.out_proj, self.decoding_block[-1], self.depth_head[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_from_codebook(self) -> None:
        """Fits the code space to the tokenizer's codebook, and starts the head on it."""
        self.code_space.fit(self.tokenizer.codebook)
        init_from_codebook(self.head.weight, self.tokenizer.codebook)

    def init_state(
        self, batch: int, device: torch.device | None = None, keyframes: int | None = None
    ) -> WorldState:
        """`WorldState.empty`; `keyframes`: capacity of the memory, if other than the config's."""
        g = self.config
        return WorldState.empty(
            batch,
            self.levels,
            (g.latent_height, g.latent_width),
            (g.picture_height, g.picture_width),
            g.motion_dim,
            g.keyframes if keyframes is None else keyframes,
            device,
        )

    @staticmethod
    def select_worlds(state: WorldState, index: slice) -> WorldState:
        """The state of some worlds of the batch."""
        return state[index]

    @staticmethod
    def pose_of(state: WorldState) -> Tensor:
        """Pose [B, 5] of the current frame, relative to the start of the rollout."""
        return state.pose

    # ------------------------------------------------------------ depth and motion

    def ground(self, pose: Tensor) -> Tensor:
        """Inverse ray distances [B, 2H, 2W] (1/m) of a flat ground under the player."""
        g = self.config
        return camera.ground_plane(pose, 2 * g.latent_height, 2 * g.latent_width, g.vertical_fov_degrees)

    def inverse_ray_distance(self, tokens: Tensor, pose: Tensor, hidden: Tensor) -> Tensor:
        """Depth of a frame: tokens [B, H, W], pose [B, 5], finest state [B, C, H, W] -> [B, 2H, 2W], 1/m."""
        ground = self.ground(pose)
        plane = F.avg_pool2d(ground[:, None], 2).log()
        x = torch.cat([self.code_space.normalize(self.code_space.embed(tokens)), plane, hidden], 1)
        change = F.pixel_shuffle(self.depth_head(x), 2)[:, 0].float().clamp(*DEPTH_RANGE)
        return ground * change.exp()

    def predict_motion(
        self, actions: Tensor, displacement: Tensor, state: Tensor, scene: Tensor | None = None
    ) -> tuple[Motion, Tensor]:
        """`MotionModel.forward` with the keys of the action vector [B, A]."""
        keys = actions[:, [MOVE_X, JUMP, MOVE_Z]] * actions.new_tensor([1.0, 0.0, 1.0])
        return self.motion_model(actions, keys, displacement, state, scene)

    def next_pose(self, pose: Tensor, actions: Tensor, displacement: Tensor) -> Tensor:
        """The pose after an action, `motion.next_pose`: [B, 5]."""
        turn = actions[:, [YAW, PITCH]] * self.config.degrees_per_unit
        return next_pose(pose, turn, displacement)

    # ------------------------------------------------------------ one frame

    def predict(
        self,
        tokens: Tensor,
        actions: Tensor,
        state: WorldState,
        observed: bool | Tensor = True,
        picture: Tensor | None = None,
        true_pose: Tensor | None = None,
        true_next_pose: Tensor | None = None,
        level: Tensor | float = 0.0,
    ) -> tuple[Prediction, WorldState]:
        """One step: tokens [B, H, W] and actions [B, A] -> the prediction and the state after it.

        `observed` (or [B] bool): the tokens are recorded, not generated. `picture` [B, 3, Hp, Wp]: the
        decoded tokens, if at hand. `true_pose` [B, 5]: recorded pose of this frame, NaN where unknown.
        `true_next_pose` [B, 5]: that of the next frame, in training. `level` (or [B]): share of corrupted
        tokens.
        """
        actions = actions.float()
        observed = torch.as_tensor(observed, device=tokens.device).expand(len(tokens))
        if picture is None:
            with torch.no_grad():
                picture = self.tokenizer.decode(tokens)
        state = state.with_true_pose(true_pose)
        motion, motion_state = self.predict_motion(
            actions, state.displacement, state.motion, state.hidden[-1]
        )
        inverse = self.inverse_ray_distance(tokens, state.pose, state.hidden[0])
        with torch.autocast(tokens.device.type, enabled=False), torch.no_grad():
            pose = self.next_pose(state.pose, actions, motion.mode)
            if true_next_pose is not None:
                pose = torch.where(true_next_pose.isfinite(), true_next_pose, pose)
            displacement = displacement_between(state.pose, pose)
            frame = SourceFrames(picture, tokens, inverse.detach(), state.pose)
            generation = torch.where(observed, 0.0, state.generation)
            keyframes = state.keyframes.add_if_new(frame, generation, observed, state.disoccluded_share)
            g = self.config
            last, memory = warp_next_view(
                frame, generation, keyframes, pose, self.ground(pose), g.sources, g.vertical_fov_degrees
            )
        z = self.encode_views(last, memory)
        still = last.exact > STILL  # the camera rests: the last frame is the best source
        from_memory = (memory.visible_mask > VISIBLE) & ~still
        from_last = (last.visible_mask > VISIBLE) & ~from_memory
        features, hidden = self.recurrent_core(
            z, last, memory, pose, actions, displacement, observed, level, state
        )
        prediction = Prediction(
            features=features,
            z=z,
            source_mask=torch.stack([from_last, from_memory], 1),
            visible_mask=torch.maximum(last.visible_mask, memory.visible_mask),
            source_scale=torch.where(from_memory, memory.source_scale, last.source_scale),
            observed_mask=memory.visible_mask * (memory.generation < OBSERVED_BELOW),
            source_grid=last.source_grid,
            inverse_ray_distance=inverse,
            motion=motion,
        )
        mean_generation = torch.where(from_memory, memory.generation, last.generation).mean((1, 2))
        after = WorldState(
            hidden=hidden,
            pose=pose,
            previous_pose=state.pose,
            displacement=displacement,
            motion=motion_state,
            keyframes=keyframes,
            disoccluded_share=1 - memory.visible_mask.mean((1, 2)),
            generation=(1 + mean_generation).clamp(max=GENERATION_MAX),
        )
        return prediction, after

    @torch.no_grad()
    def encode_views(self, *views: WarpedView) -> tuple[Tensor, ...]:
        """Warped views as points in code space [B, d, H, W]. A cell with an exact shift keeps its code."""
        latents = self.tokenizer.latents(torch.cat([view.picture for view in views]))
        points = self.code_space.project(latents).chunk(len(views))
        with torch.autocast(latents.device.type, enabled=False):
            return tuple(
                torch.lerp(point, self.code_space.embed(view.tokens), view.exact[:, None])
                for point, view in zip(points, views, strict=True)
            )

    def recurrent_core(
        self,
        z: tuple[Tensor, Tensor],
        last: WarpedView,
        memory: WarpedView,
        pose: Tensor,
        actions: Tensor,
        displacement: Tensor,
        observed: Tensor,
        level: Tensor | float,
        state: WorldState,
    ) -> tuple[Tensor, list[Tensor]]:
        """-> features [B, C, H, W] and the new hidden state of each level. `pose` is the next view's."""
        ground = F.avg_pool2d(self.ground(pose)[:, None], 2)
        depth = F.avg_pool2d(last.inverse_ray_distance[:, None], 2).clamp_min(1e-3)
        geometry = [
            last.visible_mask[:, None], last.exact[:, None], memory.visible_mask[:, None],
            memory.exact[:, None], memory.baseline[:, None] / HALF_WEIGHT_METRES,
            memory.generation[:, None] / GENERATION_MAX, depth.log() / 4, ground.log() / 4,
        ]  # fmt: skip
        x = self.in_proj(torch.cat([*map(self.code_space.normalize, z), *geometry], 1))
        level = torch.as_tensor(level, device=x.device, dtype=torch.float32).expand(len(actions))
        scalars = torch.stack([observed.float(), level, torch.deg2rad(pose[:, 4]).sin()], 1)
        film = self.film(torch.cat([actions, displacement / METRES_PER_UNIT, scalars], 1))
        grid, hidden = last.source_grid.movedim(-1, 1), []
        parts = film.split([2 * c for c in self.levels], 1)
        for i, (cell, part) in enumerate(zip(self.cells, parts, strict=True)):
            if i:
                x = self.down[i - 1](x)
            gamma, beta = part[:, :, None, None].chunk(2, 1)
            # The state is warped as the last frame is; zeros where it has nothing.
            places = F.adaptive_avg_pool2d(grid, state.hidden[i].shape[-2:]).movedim(1, -1)
            warped = F.grid_sample(state.hidden[i], places, padding_mode="zeros", align_corners=False)
            x = cell(x * (1 + gamma) + beta, warped)
            hidden.append(x)
        for i in reversed(range(len(self.up))):
            x = hidden[i] + F.interpolate(self.up[i](x), size=hidden[i].shape[-2:], mode="nearest")
        return x + self.output_block(x), hidden

    # ------------------------------------------------------------ from features to tokens

    def condition_on_tokens(self, prediction: Prediction, tokens: Tensor, given: Tensor) -> Prediction:
        """The prediction when some of the next frame's tokens are given (masked parallel decoding).

        tokens [B, H, W], given [B, H, W] bool. A world without a given token keeps its prediction.
        """
        code = self.code_space.normalize(self.code_space.embed(tokens)) * given[:, None]
        change = self.decoding_block(torch.cat([prediction.features, code, given[:, None].float()], 1))
        change = change * given.flatten(1).any(1)[:, None, None, None]
        return replace(prediction, features=prediction.features + change)

    def logits(
        self,
        prediction: Prediction,
        cells: Tensor | None = None,
        trust: tuple[float | Tensor, float] = (0.0, 0.0),
    ) -> Tensor:
        """Logits over the next frame's codes: [B, V, H, W] float32; with `cells` [B, n]: [B, n, V].

        `cells` are indices row * W + column. `trust` is added to the gates before softplus: of visible cells
        (a number or [B, H, W]), and of disoccluded ones, where the view's repeated border is the prior.
        """
        g, d = self.config, self.config.code_dim
        B, C, H, W = prediction.features.shape
        out = self.out_proj(prediction.features)

        def at(x: Tensor) -> Tensor:
            """[B, C, H, W] -> [B, n, C] of the wanted cells."""
            x = x.flatten(2)
            if cells is not None:
                x = x.gather(2, cells[:, None].expand(-1, x.shape[1], -1))
            return x.mT

        gates, corrections, query = at(out).split([2, 2 * d, C], -1)
        logits = F.linear(query, self.head.weight[:, :, 0, 0], self.head.bias)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if g.prior:
                visible, disoccluded = trust
                if isinstance(visible, Tensor):
                    visible = at(visible[:, None])
                gates = self.gates(gates, at(prediction.source_mask), (visible, disoccluded))
                corrections = corrections.float().chunk(2, -1)
                for i, z in enumerate(prediction.z):
                    point = at(z) + corrections[i] * self.code_space.spread
                    logits = self.add_prior(logits, point, gates[..., i : i + 1], self.log_scale[i])
        return logits if cells is not None else logits.mT.unflatten(2, (H, W))  # a view: it is large

    def gates(self, out: Tensor, source_mask: Tensor, trust: tuple[float | Tensor, float]) -> Tensor:
        """Weights of the two priors [B, n, 2], 0 or more, from the network's output and the source mask,
        [B, n, 2] both; `trust` as in `logits`, [B, n, 1] if it is a tensor."""
        chosen, other, disoccluded = self.gate_bias
        start = torch.where(source_mask, chosen + trust[0], other)
        start = torch.where(source_mask.any(-1, keepdim=True), start, disoccluded + trust[1])
        return F.softplus(out.float() + start)

    def gate_map(self, prediction: Prediction, trust: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        """`gates` of all cells, [B, 2, H, W]: of the last frame and of the keyframes."""
        out = self.out_proj(prediction.features)[:, :2].movedim(1, -1)
        return self.gates(out, prediction.source_mask.movedim(1, -1), trust).movedim(-1, 1)

    def add_prior(self, logits: Tensor, point: Tensor, gate: Tensor, log_scale: Tensor) -> Tensor:
        """logits [B, n, V] - gate [B, n, 1] * log(1 + d^2 / scale); d: from point [B, n, d] to each code.

        The most expensive line of a step, so d^2 is one matrix product, and in place without gradients.
        """
        codes, scale = self.code_space.codes, (-log_scale).exp()
        one = torch.ones_like(point[..., :1])
        # d^2 = |z|^2 - 2 z.c + |c|^2
        left = scale * torch.cat([point, point.square().sum(-1, keepdim=True), one], -1)
        norms = codes.square().sum(1, keepdim=True)
        square = left @ torch.cat([-2 * codes, torch.ones_like(norms), norms], 1).T
        if torch.is_grad_enabled():
            return logits - gate * square.clamp_min(0).log1p()
        return logits.addcmul_(square.clamp_(min=0).log1p_(), gate, value=-1)
