"""The loss of a training window for the geometry world model."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera
from geometry.keyframes import VISIBLE
from geometry.motion import displacement_between
from model_geometry import GeometryWorldModel, Prediction
from rollout.sampling import SamplingConfig, sample_from_logits
from training import loss_terms
from training.motion_pretraining import motion_loss
from training.window_parts import InputConfig, LossWeights, StepLoss, WindowResult, corrupt_tokens

REPROJECTION_FRAMES = 8  # a reprojection starts from one of so many last frames
SIMILAR_COUNT = 16  # this many nearest codes are similar to a code
CLEAN_SHARE = 0.5  # share of the samples that are not corrupted


def geometry_window_loss(
    model: GeometryWorldModel,
    step_loss: StepLoss,
    tokens: Tensor,
    actions: Tensor,
    pose: Tensor,
    inputs: InputConfig,
) -> WindowResult:
    """Runs a window through the model: tokens [B, T+1, H, W], actions [B, T, 5], pose [B, T+1, 5].

    Each sample is given the model's own samples in its last n steps, with n drawn from 0..`ar_len`, or 0 with
    probability `teacher_prob`. The camera follows the recorded poses, so warped recorded content stays
    comparable with the target. A visible cell whose warped content was generated has no loss: the recording
    shows something else there.
    """
    B, T = actions.shape[:2]
    weights, device = step_loss.weights, tokens.device
    with torch.no_grad():
        given, level = corrupt_tokens(
            tokens[:, :-1],
            model.config.codebook_size,
            inputs.token_noise,
            CLEAN_SHARE,
            model.code_space.similar_codes(SIMILAR_COUNT),
            inputs.similar_share,
        )
        flat = torch.cat([given, tokens[:, -1:]], 1).flatten(0, 1)
        pictures = step_loss.tokenizer.decode(flat).unflatten(0, (B, T + 1))
        own_steps = torch.randint(0, inputs.ar_len + 1, (B,), device=device)
        own_steps *= torch.rand(B, device=device) >= inputs.teacher_prob
    state = model.init_state(B, device, keyframes=min(T, model.config.keyframes))
    state.pose = torch.where(pose[:, 0].isfinite(), pose[:, 0], state.pose)
    frames: list[tuple[Tensor, Tensor, Tensor]] = []  # picture, inverse ray distances, pose of each frame
    observed_mask = torch.ones(tokens[:, 0].shape, device=device)  # 0 where the input shows generated content
    steps, self_fed = [], []
    prediction = None
    for t in range(T):
        own = t >= T - own_steps
        now, picture = given[:, t], pictures[:, t]
        if prediction is None:
            own = torch.zeros_like(own)
        elif own.any():
            sampled = sample_own(model, prediction, own, inputs.sampling)
            now, picture = now.clone(), picture.clone()
            now[own] = sampled
            with torch.no_grad():
                picture[own] = step_loss.tokenizer.decode(sampled)
        observed_mask = torch.where(own[:, None, None], observed_mask, 1.0)
        pose_now = state.pose
        prediction, state = model.predict(
            now,
            actions[:, t],
            state,
            observed=~own,
            picture=picture,
            true_next_pose=pose[:, t + 1],
            level=torch.where(own, 0.0, level),
        )
        with torch.no_grad():
            warped = F.grid_sample(
                observed_mask[:, None], prediction.source_grid, padding_mode="zeros", align_corners=False
            )[:, 0]
            observed_mask = torch.maximum(warped, prediction.observed_mask)
            disoccluded = prediction.visible_mask <= VISIBLE
            cell_weight = torch.where(disoccluded, weights.disoccluded, (observed_mask > VISIBLE).float())
        frames.append((picture, prediction.inverse_ray_distance, pose_now))
        terms = token_terms(
            model, step_loss, prediction, tokens[:, t + 1], cell_weight, inputs.masked_decoding
        )
        if weights.reprojection:
            terms |= depth_terms(model, weights, frames, pictures[:, t + 1], state.pose)
        if weights.motion:
            error = motion_loss(prediction.motion, displacement_between(pose_now, state.pose))
            terms["motion"] = weights.motion * error * pose[:, t + 1].isfinite().all(1)
        steps.append(terms)
        self_fed.append(own)
    with torch.no_grad():
        log_probs = loss_terms.log_probabilities(model.logits(prediction))
    return WindowResult.of_steps(steps, self_fed, log_probs)


@torch.no_grad()
def sample_own(
    model: GeometryWorldModel, prediction: Prediction, own: Tensor, sampling: SamplingConfig
) -> Tensor:
    """Tokens that the model samples for those samples of the batch where `own` [B] is true: [n, H, W]."""
    logits = model.logits(
        replace(
            prediction,
            features=prediction.features[own],
            z=tuple(z[own] for z in prediction.z),
            source_mask=prediction.source_mask[own],
        )
    )
    return sample_from_logits(logits, sampling, visible_mask=prediction.visible_mask[own])


def token_terms(
    model: GeometryWorldModel,
    step_loss: StepLoss,
    prediction: Prediction,
    target: Tensor,
    cell_weight: Tensor,
    masked_decoding: float,
) -> dict[str, Tensor]:
    """Cross-entropy of one step, {name: [B]}, over a share of the cells sampled by `cell_weight` [B, H, W].

    A share `masked_decoding` of the samples is given a random part of the target, and only the rest of it
    enters the loss.
    """
    w, (B, H, W), device = step_loss.weights, target.shape, target.device
    if masked_decoding:
        ratio = torch.rand(B, 1, 1, device=device) * (torch.rand(B, 1, 1, device=device) < masked_decoding)
        given = torch.rand(target.shape, device=device) < ratio
        prediction = model.condition_on_tokens(prediction, target, given)
        cell_weight = cell_weight * ~given
    weight = cell_weight.flatten(1)
    has_loss = weight.sum(1) > 0
    cells = torch.multinomial(weight + 1e-9, max(1, round(w.cells * H * W)))
    valid = weight.gather(1, cells) > 0  # fewer cells may have a weight than are sampled
    log_probs = model.logits(prediction, cells).log_softmax(-1)
    exact = -log_probs.gather(-1, target.flatten(1).gather(1, cells)[..., None])[..., 0]
    if w.label_smoothing:
        exact = (1 - w.label_smoothing) * exact - w.label_smoothing * log_probs.mean(-1)
    mean = (exact * valid).sum(1) / valid.sum(1).clamp_min(1)
    terms = {"ce": w.ce * mean * has_loss}
    if w.perceptual:
        full = loss_terms.log_probabilities(model.logits(prediction))
        terms["perceptual"] = w.perceptual * loss_terms.perceptual_loss(
            full, target, step_loss.tokenizer, step_loss.distance
        )
    return terms


def depth_terms(
    model: GeometryWorldModel,
    w: LossWeights,
    frames: list[tuple[Tensor, Tensor, Tensor]],
    target: Tensor,
    pose: Tensor,
) -> dict[str, Tensor]:
    """Losses of the depth of one random frame of the last REPROJECTION_FRAMES: {name: [B]}.

    `frames`: picture [B, 3, Hp, Wp], inverse ray distances [B, 2H, 2W] in 1/m and pose [B, 5] of each frame.

    `reprojection`: absolute difference between the next picture `target` [B, 3, Hp, Wp] at `pose` [B, 5] and
    that frame warped there, at two pixels per cell, where it is visible. `smoothness`: gradient of the log
    depth where the picture has none (as in monodepth, arXiv 1609.03677).
    """
    with torch.autocast(target.device.type, enabled=False):
        first = max(0, len(frames) - REPROJECTION_FRAMES)
        picture, inverse, pose_from = frames[int(torch.randint(first, len(frames), ()))]
        inverse = inverse.float()
        fov, size = model.config.vertical_fov_degrees, inverse.shape[-2:]
        small, goal = (F.adaptive_avg_pool2d(p, size) for p in (picture, target))
        warped = camera.warp_inverse_ray_distance(inverse, pose_from, pose, model.ground(pose), fov)
        grid, visible = camera.reproject(pose_from, pose, warped, *size, fov)
        error = (camera.warp(small, grid) - goal).abs().mean(1)
        mean = (error * visible).flatten(1).sum(1) / visible.flatten(1).sum(1).clamp_min(1)
        terms = {"reprojection": w.reprojection * mean}
        if w.smoothness:
            gradient = 0.0
            for axis in (1, 2):
                edge = small.diff(dim=axis + 1).abs().mean(1)
                steepness = inverse.log().diff(dim=axis).abs() * (-10 * edge).exp()
                gradient = gradient + steepness.flatten(1).mean(1)
            terms["smoothness"] = w.smoothness * gradient
    return terms
