"""The losses of the geometry world model: on windows of consecutive frames, and on pairs of distant ones."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.keyframes import VISIBLE
from model_geometry import GeometryWorldModel, Prediction, ViewInput
from rollout.sampling import SamplingConfig, sample_from_logits
from training import loss_terms
from training.adversarial import AdversarialLoss
from training.pairs import has_no_target
from training.window_parts import (
    CLEAN_SHARE,
    SIMILAR_COUNT,
    InputConfig,
    StepLoss,
    WindowResult,
    corrupt_tokens,
)


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
        pictures = step_loss.tokenizer.decode(given.flatten(0, 1)).unflatten(0, (B, T))
        own_steps = torch.randint(0, inputs.ar_len + 1, (B,), device=device)
        own_steps *= torch.rand(B, device=device) >= inputs.teacher_prob
    state = model.init_state(B, device, keyframes=min(T, model.config.keyframes))
    state.pose = torch.where(pose[:, 0].isfinite(), pose[:, 0], state.pose)
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
                observed_mask[:, None], prediction.view.source_grid, padding_mode="zeros", align_corners=False
            )[:, 0]
            # A view composed of the last frame is as observed as that was; one of a keyframe as the keyframe.
            from_last = prediction.view.source == 0
            observed_mask = torch.where(from_last, warped, prediction.observed_mask)
            new = prediction.visible_mask <= VISIBLE
            cell_weight = torch.where(new, weights.disoccluded, (observed_mask > VISIBLE).float())
        terms = token_terms(
            model, step_loss, prediction, tokens[:, t + 1], cell_weight, inputs.masked_decoding
        )
        steps.append(terms)
        self_fed.append(own)
    with torch.no_grad():
        log_probs = loss_terms.log_probabilities(model.logits(prediction))
    return WindowResult.of_steps(steps, self_fed, log_probs)


def pair_loss(
    model: GeometryWorldModel,
    step_loss: StepLoss,
    inputs: ViewInput,
    target: Tensor,
    masked_decoding: float,
    adversarial: AdversarialLoss | None = None,
) -> WindowResult:
    """The loss of views composed of frames of the same clip (training/pairs.py), without a recurrent state.

    target [B, H, W]: the recorded tokens, or NO_TARGET: such a sample has an adversarial loss alone.
    Disoccluded and magnified cells weigh more. `adversarial` is computed on the last samples of the batch.
    """
    prediction = model.predict_from_view(inputs)
    weights = step_loss.weights
    new = prediction.visible_mask <= VISIBLE
    magnified = prediction.refined
    cell_weight = torch.where(new, weights.disoccluded, torch.where(magnified, weights.magnified, 1.0))
    known = ~has_no_target(target)
    terms = token_terms(model, step_loss, prediction, target.clamp(min=0), cell_weight, masked_decoding)
    share = known / known.float().mean().clamp(min=1 / len(known))  # the others' terms must not weigh less
    terms = {name: share * values for name, values in terms.items()}
    if adversarial:
        judged = adversarial.loss(model, replace_rows(prediction, slice(-adversarial.batch, None)))
        # A mean over the judged samples: their share of the batch must not matter.
        terms["adversarial"] = (weights.adversarial * judged.mean()).expand(len(target))
    with torch.no_grad():
        first = replace_rows(prediction, slice(0, 4))
        log_probs = loss_terms.log_probabilities(model.logits(first))
    return WindowResult.of_steps([terms], [torch.zeros_like(inputs.level, dtype=torch.bool)], log_probs)


def replace_rows(prediction: Prediction, rows: Tensor | slice) -> Prediction:
    """The part of a prediction that `logits` reads, of some rows of the batch."""
    names = ("features", "z", "visible_mask", "resolution", "keyframe_due")
    return replace(prediction, **{name: getattr(prediction, name)[rows] for name in names})


@torch.no_grad()
def sample_own(
    model: GeometryWorldModel, prediction: Prediction, own: Tensor, sampling: SamplingConfig
) -> Tensor:
    """Tokens that the model samples for those samples of the batch where `own` [B] is true: [n, H, W]."""
    own_part = replace_rows(prediction, own)
    visible_mask = own_part.visible_mask * ~own_part.refined
    return sample_from_logits(model.logits(own_part), sampling, visible_mask=visible_mask)


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
