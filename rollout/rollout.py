"""Rolling a world model out, frame by frame."""

from copy import copy

import torch
from torch import Tensor

from geometry.camera import relative_to_first
from rollout.code_balance import CodeBalance, elevation_bands
from rollout.sampling import SamplingConfig, carry_noise, correlated_noise, sample_tokens
from rollout.world_model import WorldModel
from runtime.device import autocast
from runtime.video import to_uint8


class Rollout:
    """A running world: the model's state, the current tokens, and how the next ones are sampled.

    `prime` gives it the context; each `step` then takes an action and generates the next frame's tokens.
    """

    def __init__(
        self,
        model: WorldModel,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype` is that of autocast."""
        self.model, self.dtype = model, dtype
        self.sampling = SamplingConfig() if sampling is None else sampling
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.seed = seed
        self.state = None  # the model's
        self.tokens: Tensor | None = None  # [B, H, W]
        self.observed = True  # the tokens are recorded, not generated
        self._true_pose: Tensor | None = None  # [B, 5] of the context's last frame
        self._picture: Tensor | None = None  # the decoded tokens, once they are needed
        self._noise: Tensor | None = None  # [B, H, W] standard normal, of the last step
        self._balance: CodeBalance | None = None  # None: the sampling does without

    @torch.inference_mode()
    def prime(self, tokens: Tensor, actions: Tensor, pose: Tensor | None = None) -> None:
        """Starts from a context: tokens [B, T, H, W] and the actions [B, T-1, 5] between them.

        `pose` [B, T, 5] x, y, z, yaw, pitch (metres, degrees), NaN where unknown; without it the camera
        starts level. Raises ValueError if the lengths do not agree.
        """
        if tokens.shape[1] != actions.shape[1] + 1:
            raise ValueError(
                f"{tokens.shape[1]} frames need {tokens.shape[1] - 1} actions, got {actions.shape[1]}"
            )
        self.generator.manual_seed(self.seed)
        tokens, actions = tokens.to(self.device).long(), actions.to(self.device).float()
        if pose is None:
            pose = torch.full((*tokens.shape[:2], 5), torch.nan)
        pose = relative_to_first(pose).to(self.device)
        self.tokens, self.state = tokens[:, -1], self.model.init_state(len(tokens), self.device)
        balanced, bands = self.sampling.code_balance > 0, []
        with autocast(self.device, self.dtype):
            for t in range(tokens.shape[1]):
                if balanced:
                    bands.append(self._bands(pose[:, t]))
                if t < actions.shape[1]:
                    _, self.state = self.model.predict(
                        tokens[:, t], actions[:, t], self.state, true_pose=pose[:, t]
                    )
        self.observed, self._true_pose = True, pose[:, -1]
        self._picture = self._noise = self._balance = None
        if balanced:
            self._balance = CodeBalance.of_recorded(
                tokens, torch.stack(bands, 1), self.model.tokenizer.codebook
            )

    def _bands(self, true_pose: Tensor | None = None) -> Tensor:
        """The bands of elevation [B, H, W] of the frame at the state's pose, or at `true_pose` [B, 5] where
        that is not NaN. One band for a model without poses."""
        pose = self.model.pose_of(self.state)
        if pose is None:
            return torch.zeros_like(self.tokens)
        if true_pose is not None:
            pose = torch.where(true_pose.isfinite(), true_pose, pose)
        return elevation_bands(pose, *self.tokens.shape[1:], self.model.config.vertical_fov_degrees)

    def copy(self) -> "Rollout":
        """A copy that can go on with other actions; the context need not be processed again."""
        other = copy(self)  # no step changes a state in place
        other.generator = torch.Generator(self.device)
        other.generator.set_state(self.generator.get_state())
        return other

    def go_back_to(self, earlier: "Rollout") -> None:
        """Takes the world of an earlier `copy`. Sampling and random numbers go on as they are."""
        for name in ("state", "tokens", "observed", "_true_pose", "_picture", "_noise", "_balance"):
            setattr(self, name, getattr(earlier, name))

    @torch.inference_mode()
    def step(self, actions: Tensor) -> Tensor:
        """Actions [B, 5] -> the next frame's tokens [B, H, W]."""
        self.sample(self.predict(actions))
        return self.tokens

    @torch.inference_mode()
    def predict(self, actions: Tensor):
        """First half of `step`: the model's prediction. The state is then that after the step."""
        if self.tokens is None:
            raise RuntimeError("prime the rollout with at least one frame before the first step")
        actions = actions.to(self.device).float()
        with autocast(self.device, self.dtype):
            prediction, self.state = self.model.predict(
                self.tokens, actions, self.state, self.observed, self._picture, self._true_pose
            )
        noise = correlated_noise(self.tokens.shape, self.generator, self.device)
        if self._noise is not None and prediction.visible_mask is not None:
            view, idle = prediction.view, (actions == 0).all(1)[:, None, None]
            carried = carry_noise(self._noise, noise, view.source_grid, view.visible_mask)
            # Without an action each cell keeps its noise: a still picture must not flicker.
            noise = torch.where(idle, self._noise, carried)
        self._noise = noise
        return prediction

    @torch.inference_mode()
    def sample(self, prediction) -> None:
        """Second half of `step`: samples the next frame's tokens."""
        with autocast(self.device, self.dtype):
            uniform = torch.special.ndtr(self._noise)
            shift = None
            if self._balance is not None:
                bands = self._bands()
                shift = self.sampling.code_balance * self._balance.shift(bands)
            self.tokens = sample_tokens(self.model, prediction, self.sampling, uniform, shift)
        if self._balance is not None:
            self._balance = self._balance.after(self.tokens, bands)
        self.observed, self._true_pose, self._picture = False, None, None

    @torch.inference_mode()
    def pictures(self) -> Tensor:
        """The current tokens as pictures [B, Hp, Wp, 3] uint8 on the CPU."""
        if self._picture is None:
            with autocast(self.device, self.dtype):
                self._picture = self.model.tokenizer.decode(self.tokens)
        return to_uint8(self._picture)

    def run(self, actions: Tensor) -> Tensor:
        """Actions [B, N, 5] -> the N next frames' tokens [B, N, H, W]."""
        return torch.stack([self.step(actions[:, t]) for t in range(actions.shape[1])], 1)
