"""The geometry world model: composes the next view from what was seen, and predicts the rest with a ConvGRU.

    tokens[t] --decode--> picture[t] --depth network--> depth[t]
    last frame, keyframes, their depths and poses --z-buffer, fused--> view at pose[t+1] --encode--> z
    [z, masks, magnification, depths] --1x1--> ConvGRU 18x32 <-> 9x16 <-> 5x8 (FiLM, attention) --> features
    logits[t+1] = -gate * log(1 + |z + correction - code|^2 / scale)  +  head(features)

The camera's rotation is the action's; its displacement comes from the motion model (geometry/motion.py). The
depth network (depth/) and the motion model are trained beforehand and frozen. The recurrent state is warped
like the last frame. Corrections start at zero, so an untrained model predicts the composed view.

FiLM: Perez et al., arXiv 1709.07871. ConvGRU: Ballas et al., arXiv 1511.06432. Masked parallel decoding:
Chang et al., MaskGIT, arXiv 2202.04200.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from depth.depth_net import Attention, ResidualBlock
from depth.predictor import DepthPredictor
from geometry import camera
from geometry.keyframes import REFINE_BELOW, VISIBLE, compose_next_view
from geometry.motion import METRES_PER_UNIT, PlayerMotion, displacement_between, next_pose
from geometry.occupancy import Occupancy
from geometry.state import WorldState
from geometry.warping import RESAMPLED, ComposedView, SourceFrames
from model_convGru import ConvGRUCell
from vq_vae.code_space import CodeSpace, init_from_codebook
from vq_vae.tokenizer import Tokenizer

GATES = (2.5, -0.5, 0.0)  # initial, before softplus: of visible and disoccluded cells, and per magnification
OBSERVED_BELOW = 0.5  # a generation below this counts as observed
GENERATION_MAX = 4.0
RESOLUTION_RANGE = (1 / 8, 2.0)  # that the network is told
VIEW_CHANNELS = 7  # what the network is told of the composed view, see `encode_view`


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
    heads: int = 4  # of the attention at the two coarse levels
    code_dim: int = 24  # principal components of the codebook in which codes are compared
    film_hidden: int = 128
    keyframes: int = 64  # capacity of the memory; 0: none
    sources: int = 3  # keyframes from which a view is composed, besides the last frame
    prior: bool = True  # the composed view is a prior on the logits; False: it is an input only
    action_dim: int = 5


@dataclass
class ViewInput:
    """What the network is given of the next frame before it is generated."""

    z: Tensor  # [B, d, H, W] the composed view in code space; where nothing is visible, its fill
    channels: Tensor  # [B, VIEW_CHANNELS, H, W], see `encode_view`
    pitch: Tensor  # [B] of the next view, degrees
    actions: Tensor  # [B, A]
    displacement: Tensor  # [B, 3] metres
    observed: Tensor  # [B] 1: the current tokens are recorded; 0: generated
    level: Tensor  # [B] share of corrupted tokens

    @property
    def visible_mask(self) -> Tensor:
        """[B, H, W] 0..1: share of each cell that some source shows."""
        return self.channels[:, 0]

    @property
    def exact(self) -> Tensor:
        """[B, H, W] 0..1: share of each cell that was not resampled."""
        return self.channels[:, 1]

    @property
    def resolution(self) -> Tensor:
        """[B, H, W] as in `ComposedView`; within RESOLUTION_RANGE."""
        return (self.channels[:, 2] * 2).exp2()


@dataclass
class Prediction:
    """What is predicted of the next frame before tokens are sampled; input of `logits`."""

    features: Tensor  # [B, C, H, W]
    z: Tensor  # [B, d, H, W] the composed view in code space
    visible_mask: Tensor  # [B, H, W] 0..1: share of the cell that a source shows
    resolution: Tensor  # [B, H, W] of the composed view, by length; 0.5: magnified twice
    keyframe_due: Tensor  # [B] bool: the next frame becomes a keyframe
    view: ComposedView | None = None  # None: predicted from a `ViewInput` alone
    generation: Tensor | None = None  # [B, H, W] of the source of each cell; 0: observed
    inverse_ray_distance: Tensor | None = None  # [B, 2H, 2W] 1/m, of the *last* frame
    occupancy: Occupancy | None = None  # the nodes around the player before the step; None: pose was given

    @property
    def refined(self) -> Tensor:
        """[B, H, W] bool: visible cells to be sampled anew, since too little of their detail is left.

        Only in keyframes: between them the texture should not flicker.
        """
        return refinable(self.visible_mask, self.resolution) & self.keyframe_due[:, None, None]

    def resolution_after(self, exact: Tensor) -> Tensor:
        """Resolution of the next frame, [B, H, W], if the share `exact` [B, H, W] of its cells is not
        resampled. Disoccluded and refined cells are sampled, so they are sharp."""
        kept = self.resolution.clamp(max=1) * (RESAMPLED + (1 - RESAMPLED) * exact)
        return torch.where(self.refined | (self.visible_mask <= VISIBLE), 1.0, kept)

    @property
    def observed_mask(self) -> Tensor:
        """[B, H, W] 0..1: share of the cell that an observed frame shows."""
        return self.visible_mask * (self.generation < OBSERVED_BELOW)


def refinable(visible_mask: Tensor, resolution: Tensor) -> Tensor:
    """Visible cells of a resolution below REFINE_BELOW: [B, H, W] bool."""
    return (visible_mask > VISIBLE) & (resolution < REFINE_BELOW)


def keys_and_turn(actions: Tensor, degrees_per_unit: float) -> tuple[Tensor, Tensor]:
    """Actions [B, A] -> keys to the right, up and forward [B, 3], and the turn of the yaw [B] in degrees."""
    return actions[:, [MOVE_X, JUMP, MOVE_Z]], actions[:, YAW] * degrees_per_unit


class ConditioningBlock(nn.Module):
    """Changes the features by the tokens that are given, with a view of the whole grid.

    One round of a U-Net: fine -> coarse with attention -> fine. The output starts at zero.
    """

    def __init__(self, inputs: int, channels: int, coarse: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, coarse, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(
            ResidualBlock(coarse), Attention(coarse, heads, grid), ResidualBlock(coarse)
        )
        self.up = nn.Conv2d(coarse, channels, 1)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)
        for last in (self.up, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        coarse = self.up(self.coarse(self.down(x)))
        return self.out(x + F.interpolate(coarse, x.shape[-2:], mode="nearest"))


class GeometryWorldModel(nn.Module):
    """Predicts the next grid of tokens from the current one, the action and a `WorldState`."""

    def __init__(self, config: GeometryConfig, tokenizer: Tokenizer, depth: DepthPredictor):
        super().__init__()
        self.config, self.tokenizer, self.depth = config, tokenizer, depth
        c, coarse, d = config.channels, config.coarse_channels, config.code_dim
        self.levels = [c, coarse, coarse]
        grids = [(config.latent_height, config.latent_width)]
        for _ in self.levels[1:]:
            grids.append(tuple((n + 1) // 2 for n in grids[-1]))
        self.code_space = CodeSpace(config.codebook_size, tokenizer.config.embedding_dim, d)
        # FiLM on: action, displacement, observed or generated, corruption level, sine of the pitch
        self.film = nn.Sequential(
            nn.Linear(config.action_dim + 6, config.film_hidden),
            nn.SiLU(),
            nn.Linear(config.film_hidden, 2 * sum(self.levels)),
        )
        self.in_proj = nn.Conv2d(d + VIEW_CHANNELS, c, 1)
        self.cells = nn.ModuleList(ConvGRUCell(n, 3) for n in self.levels)
        pairs = list(zip(self.levels[:-1], self.levels[1:], strict=True))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.blocks = nn.ModuleList(
            nn.Sequential(ResidualBlock(n), Attention(n, config.heads, grid), ResidualBlock(n))
            for n, grid in zip(self.levels[1:], grids[1:], strict=True)
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.output_block = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)
        )
        self.fine_block = ResidualBlock(c)
        self.conditioning_block = ConditioningBlock(c + d + 1, c, coarse, config.heads, grids[1])
        self.out_proj = nn.Conv2d(c, 1 + d + c, 1)  # gate, correction, query of the head
        self.head = nn.Conv2d(c, config.codebook_size, 1)
        self.gate_bias = nn.Parameter(torch.tensor(GATES))
        self.log_scale = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)
        self.motion_model = PlayerMotion()  # trained beforehand; no gradient passes through it

    @torch.no_grad()
    def init_from_codebook(self) -> None:
        """Fits the code space to the tokenizer's codebook, and starts the head on it."""
        self.code_space.fit(self.tokenizer.codebook)
        init_from_codebook(self.head.weight, self.tokenizer.codebook)

    def init_state(
        self, batch: int, device: torch.device | None = None, keyframes: int | None = None
    ) -> WorldState:
        """`WorldState.empty`, the player standing on a border of nodes.

        `keyframes`: capacity of the memory, if other than the config's.
        """
        g = self.config
        state = WorldState.empty(
            batch,
            self.levels,
            (g.latent_height, g.latent_width),
            (g.picture_height, g.picture_width),
            self.motion_model.init_state(batch, device),
            g.keyframes if keyframes is None else keyframes,
            device,
        )
        state.pose[:, 1] = self.motion_model.constants.lattice
        return state

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

    @torch.no_grad()
    def predict_depth(self, picture: Tensor, pitch: Tensor) -> Tensor:
        """Inverse ray distances [B, 2H, 2W] (1/m) of pictures [B, 3, Hp, Wp] at a pitch [B] in degrees."""
        g = self.config
        return self.depth.predict_at(picture, pitch, (2 * g.latent_height, 2 * g.latent_width))

    def predict_motion(
        self, frame: SourceFrames, actions: Tensor, state: WorldState
    ) -> tuple[Tensor, Tensor, Occupancy]:
        """`PlayerMotion.forward` among the nodes that the keyframes and the current frame show, and not into
        what the current frame shows straight ahead.

        `frame`: the B current frames. Returns the displacement [B, 3], the motion model's new state and
        the nodes.
        """
        keyframes, g = state.keyframes, self.config
        now = torch.ones_like(actions[:, :1], dtype=torch.bool)
        occupancy = self.motion_model.occupancy_around(
            torch.cat([keyframes.inverse_ray_distance, frame.inverse_ray_distance[:, None]], 1),
            torch.cat([keyframes.pose, frame.pose[:, None]], 1),
            torch.cat([keyframes.order > 0, now], 1),
            frame.pose,
            g.vertical_fov_degrees,
        )
        keys, turn = keys_and_turn(actions, g.degrees_per_unit)
        ahead = camera.distance_ahead(
            frame.inverse_ray_distance,
            frame.pose[:, 4],
            self.motion_model.heading(keys, turn),
            g.vertical_fov_degrees,
        )
        moved, motion = self.motion_model(
            keys, turn, frame.pose, state.displacement, state.motion, occupancy, ahead
        )
        return moved, motion, occupancy

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
        inverse_ray_distance: Tensor | None = None,
    ) -> tuple[Prediction, WorldState]:
        """One step: tokens [B, H, W] and actions [B, A] -> the prediction and the state after it.

        `observed` (or [B] bool): the tokens are recorded, not generated. `picture` [B, 3, Hp, Wp]: the
        decoded tokens, if at hand. `true_pose` [B, 5]: recorded pose of this frame, NaN where unknown.
        `true_next_pose` [B, 5]: that of the next frame, in training. `level` (or [B]): share of corrupted
        tokens. `inverse_ray_distance` [B, 2H, 2W] (1/m): of this frame, if it need not be predicted.
        """
        actions = actions.float()
        observed = torch.as_tensor(observed, device=tokens.device).expand(len(tokens))
        level = torch.as_tensor(level, device=tokens.device, dtype=torch.float32).expand(len(tokens))
        with torch.no_grad():
            if picture is None:
                picture = self.tokenizer.decode(tokens)
            state = state.with_true_pose(true_pose)
            with torch.autocast(tokens.device.type, enabled=False):
                inverse = inverse_ray_distance
                if inverse is None:
                    inverse = self.predict_depth(picture, state.pose[:, 4])
                resolution = torch.where(observed[:, None, None], 1.0, state.resolution)
                frame = SourceFrames(picture.float(), tokens, inverse, state.pose, resolution)
                state = self.write_keyframe(state, frame, observed)
                motion, occupancy, pose = state.motion, None, true_next_pose
                if pose is None or not pose.isfinite().all():
                    moved, motion, occupancy = self.predict_motion(frame, actions, state)
                    pose = self.next_pose(state.pose, actions, moved)
                    if true_next_pose is not None:
                        pose = torch.where(true_next_pose.isfinite(), true_next_pose, pose)
                displacement = displacement_between(state.pose, pose)
                keyframes = state.keyframes
                g = self.config
                view, generation = compose_next_view(
                    frame, observed, keyframes, pose, self.ground(pose), g.sources, g.vertical_fov_degrees
                )
            inputs = self.encode_view(view, generation, pose, actions, displacement, observed, level)
        keyframe_due = keyframes.is_due(pose, refinable(view.visible_mask, view.resolution))
        features, hidden = self.recurrent_core(inputs, state.hidden, view.source_grid)
        prediction = Prediction(
            features=features,
            z=inputs.z,
            visible_mask=view.visible_mask,
            resolution=view.resolution,
            keyframe_due=keyframe_due,
            view=view,
            generation=generation,
            inverse_ray_distance=inverse,
            occupancy=occupancy,
        )
        after = WorldState(
            hidden=hidden,
            pose=pose,
            previous_pose=state.pose,
            displacement=displacement,
            motion=motion,
            keyframes=keyframes,
            resolution=prediction.resolution_after(view.exact),
            keyframe_due=keyframe_due,
        )
        return prediction, after

    @staticmethod
    def write_keyframe(state: WorldState, frame: SourceFrames, observed: Tensor) -> WorldState:
        """The state with the current frames added to the keyframes of the worlds where they are new."""
        keyframes = state.keyframes.add_observed(frame, observed)
        if keyframes.capacity:
            generation = (1 + keyframes.generation.amax(1)).clamp(max=GENERATION_MAX)
            keyframes = keyframes.write(~observed & state.keyframe_due, frame, generation)
        return replace(state, keyframes=keyframes)

    @torch.no_grad()
    def encode_view(
        self,
        view: ComposedView,
        generation: Tensor,
        pose: Tensor,
        actions: Tensor,
        displacement: Tensor,
        observed: Tensor,
        level: Tensor,
    ) -> ViewInput:
        """A composed view at `pose` [B, 5] as the network's input. A cell with an exact shift keeps its code.

        `generation` [B, H, W], see `compose_next_view`; the rest as in `ViewInput`. The channels: visible and
        exact share, half the log2 of the resolution, disagreement of the sources, generation, log inverse ray
        distance of the view and of the flat ground.
        """
        points = self.code_space.project(self.tokenizer.latents(view.picture))
        with torch.autocast(points.device.type, enabled=False):
            points = torch.lerp(points, self.code_space.embed(view.tokens), view.exact[:, None])
            depths = torch.stack([view.inverse_ray_distance, view.fallback], 1)
            depths = F.avg_pool2d(depths, 2).clamp_min(1e-3).log() / 4
            channels = [
                view.visible_mask,
                view.exact,
                view.resolution.clamp(*RESOLUTION_RANGE).log2() / 2,
                view.disagreement,
                generation / GENERATION_MAX,
            ]
            return ViewInput(
                z=points,
                channels=torch.cat([torch.stack(channels, 1), depths], 1),
                pitch=pose[:, 4],
                actions=actions,
                displacement=displacement,
                observed=observed.float(),
                level=level,
            )

    def predict_from_view(self, inputs: ViewInput) -> Prediction:
        """The prediction of a keyframe, with an empty recurrent state, for training on pairs of frames."""
        features, _ = self.recurrent_core(inputs, None, None)
        due = torch.ones_like(inputs.pitch, dtype=torch.bool)
        return Prediction(features, inputs.z, inputs.visible_mask, inputs.resolution, due)

    def recurrent_core(
        self, inputs: ViewInput, state: list[Tensor] | None, grid: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """-> features [B, C, H, W] and the new hidden state of each level.

        `state`: the hidden state of each level, None if empty; `grid` [B, H, W, 2] where each cell lies in
        the last frame.
        """
        x = self.in_proj(torch.cat([self.code_space.normalize(inputs.z), inputs.channels], 1))
        scalars = torch.stack([inputs.observed, inputs.level, torch.deg2rad(inputs.pitch).sin()], 1)
        film = self.film(torch.cat([inputs.actions, inputs.displacement / METRES_PER_UNIT, scalars], 1))
        hidden = []
        for i, (cell, part) in enumerate(
            zip(self.cells, film.split([2 * c for c in self.levels], 1), strict=True)
        ):
            if i:
                x = self.down[i - 1](x)
            gamma, beta = part[:, :, None, None].chunk(2, 1)
            warped = None
            if state is not None:
                # The state is warped as the last frame is; zeros where it has nothing.
                places = F.adaptive_avg_pool2d(grid.movedim(-1, 1), state[i].shape[-2:]).movedim(1, -1)
                warped = F.grid_sample(state[i], places, padding_mode="zeros", align_corners=False)
            x = cell(x * (1 + gamma) + beta, warped)
            hidden.append(x)
        for i in reversed(range(len(self.up))):
            x = self.blocks[i](x)
            x = hidden[i] + F.interpolate(self.up[i](x), size=hidden[i].shape[-2:], mode="nearest")
        return self.fine_block(x + self.output_block(x)), hidden

    # ------------------------------------------------------------ from features to tokens

    def condition_on_tokens(self, prediction: Prediction, tokens: Tensor, given: Tensor) -> Prediction:
        """The prediction when some of the next frame's tokens are given (masked parallel decoding).

        tokens [B, H, W], given [B, H, W] bool. A world without a given token keeps its prediction.
        """
        code = self.code_space.normalize(self.code_space.embed(tokens)) * given[:, None]
        change = self.conditioning_block(torch.cat([prediction.features, code, given[:, None].float()], 1))
        change = change * given.flatten(1).any(1)[:, None, None, None]
        return replace(prediction, features=prediction.features + change)

    def logits(
        self, prediction: Prediction, cells: Tensor | None = None, trust: Tensor | float = 0.0
    ) -> Tensor:
        """Logits over the next frame's codes: [B, V, H, W] float32; with `cells` [B, n]: [B, n, V].

        `cells` are indices row * W + column. `trust` (or [B, H, W]) is added to the gate of visible cells,
        before softplus.
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

        gate, correction, query = at(out).split([1, d, C], -1)
        logits = F.linear(query, self.head.weight[:, :, 0, 0], self.head.bias)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if g.prior:
                visible, left = (at(x[:, None]) for x in (prediction.visible_mask, prediction.resolution))
                if isinstance(trust, Tensor):
                    trust = at(trust[:, None])
                gate = self.gate(gate, visible, left, trust)
                point = at(prediction.z) + correction.float() * self.code_space.spread
                logits = self.add_prior(logits, point, gate)
        return logits if cells is not None else logits.mT.unflatten(2, (H, W))  # a view: it is large

    def gate(self, out: Tensor, visible: Tensor, resolution: Tensor, trust: Tensor | float = 0.0) -> Tensor:
        """Weight of the prior, 0 or more, from the network's output, and visible share and resolution of the
        cells, all of one shape."""
        of_visible, of_disoccluded, per_octave = self.gate_bias
        magnified = resolution.clamp(RESOLUTION_RANGE[0], 1.0).log2()  # 0: not magnified, -1: twice
        of_visible = of_visible + trust + per_octave * magnified
        bias = torch.where(visible > VISIBLE, of_visible, of_disoccluded)
        return F.softplus(out.float() + bias)

    def gate_map(self, prediction: Prediction, trust: float = 0.0) -> Tensor:
        """`gate` of all cells, [B, H, W]."""
        out = self.out_proj(prediction.features)[:, 0]
        return self.gate(out, prediction.visible_mask, prediction.resolution, trust)

    def add_prior(self, logits: Tensor, point: Tensor, gate: Tensor) -> Tensor:
        """logits [B, n, V] - gate [B, n, 1] * log(1 + d^2 / scale); d: from point [B, n, d] to each code.

        The most expensive line of a step, so d^2 is one matrix product, and in place without gradients.
        """
        codes, scale = self.code_space.codes, (-self.log_scale).exp()
        one = torch.ones_like(point[..., :1])
        # d^2 = |z|^2 - 2 z.c + |c|^2
        left = scale * torch.cat([point, point.square().sum(-1, keepdim=True), one], -1)
        norms = codes.square().sum(1, keepdim=True)
        square = left @ torch.cat([-2 * codes, torch.ones_like(norms), norms], 1).T
        if torch.is_grad_enabled():
            return logits - gate * square.clamp_min(0).log1p()
        return logits.addcmul_(square.clamp_(min=0).log1p_(), gate, value=-1)
