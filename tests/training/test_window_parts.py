"""Window losses: what the model is given at each step, the corruption of inputs, the terms of the recipe."""

import pytest
import torch
from tiny_world import CODES, COLUMNS, ROWS, small_convgru, tiny_depth, tiny_vqvae

from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.sampling import SamplingConfig
from training import loss_terms
from training.convgru_window import convgru_window_loss
from training.geometry_window import geometry_window_loss
from training.models import loss_weights
from training.train_config import recipe_config
from training.window_parts import InputConfig, LossWeights, StepLoss, corrupt_tokens
from vq_vae.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_vqvae())


def window(batch: int = 3, frames: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, actions at rest and a resting camera."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CODES, (batch, frames, ROWS, COLUMNS), generator=generator)
    return tokens, torch.zeros(batch, frames - 1, 5), torch.zeros(batch, frames, 5)


def test_self_fed_steps_of_the_baseline_are_given_its_own_tokens(tokenizer):
    model = small_convgru()
    weights = LossWeights(label_smoothing=0.05)
    step_loss = StepLoss(tokenizer, None, weights)
    tokens, actions, _ = window()
    forced = convgru_window_loss(model, step_loss, tokens, actions, InputConfig(0, 0.0))
    self_fed = convgru_window_loss(model, step_loss, tokens, actions, InputConfig(2, 0.0))
    taught = convgru_window_loss(model, step_loss, tokens, actions, InputConfig(2, 1.0))
    assert not forced.self_fed.any() and not taught.self_fed.any()
    assert not self_fed.self_fed[:4].any() and self_fed.self_fed[4:].all()
    torch.testing.assert_close(self_fed.step_loss[:4], forced.step_loss[:4])
    assert (self_fed.step_loss[4:] != forced.step_loss[4:]).all()
    torch.testing.assert_close(taught.step_loss, forced.step_loss)
    # With no self-fed step, the loss of a window is the cross-entropy of model.forward.
    logits, _ = model(tokens[:, :-1], actions)
    by_forward = [
        loss_terms.cross_entropy(loss_terms.log_probabilities(logits[:, t]), tokens[:, t + 1], 0.05)
        for t in range(6)
    ]
    torch.testing.assert_close(forced.step_loss, torch.stack(by_forward))


def test_self_fed_steps_of_the_geometry_model_are_given_its_own_tokens(tokenizer):
    torch.manual_seed(0)
    config = GeometryConfig(CODES, ROWS, COLUMNS, ROWS * 4, COLUMNS * 4, channels=8, coarse_channels=8)
    model = GeometryWorldModel(config, tokenizer, tiny_depth())
    model.init_from_codebook()
    given: list[torch.Tensor] = []
    predict = model.predict
    model.predict = lambda tokens, *args, **kw: (given.append(tokens.clone()), predict(tokens, *args, **kw))[
        1
    ]
    step_loss = StepLoss(tokenizer, None, LossWeights(cells=0.5))
    recording = window(batch=8)
    tokens = recording[0]

    def run(ar_len: int, teacher_prob: float):
        given.clear()
        torch.manual_seed(5)
        inputs = InputConfig(ar_len, teacher_prob, SamplingConfig(temperature=50.0))
        return geometry_window_loss(model, step_loss, *recording, inputs)

    result = run(3, 0.0)
    assert not result.self_fed[:3].any() and result.self_fed[3:].any()
    assert (result.self_fed[1:] >= result.self_fed[:-1]).all(), "a sample stays self-fed to the end"
    recorded = torch.stack([(x == tokens[:, t]).flatten(1).all(1) for t, x in enumerate(given)])  # [T, B]
    assert recorded[~result.self_fed].all(), "other steps are given recorded tokens"
    assert not recorded[result.self_fed].all(), "self-fed steps are given others"
    for unused in (run(0, 0.0), run(3, 1.0)):
        assert not unused.self_fed.any()
        assert all(torch.equal(x, tokens[:, t]) for t, x in enumerate(given))


def test_every_term_of_the_recipe_is_in_its_loss_with_its_weight(tokenizer):
    weights = loss_weights(recipe_config("v4.5.2"))
    tokens, actions, _ = window(batch=2, frames=4)
    step_loss = StepLoss(tokenizer, None, weights)
    result = convgru_window_loss(small_convgru(), step_loss, tokens, actions, InputConfig(1, 0.5))
    assert set(result.terms) == {"neighbor", "semantic", "entropy_floor", "sharpness", "temporal"}
    assert sum(result.terms.values()).item() == pytest.approx(result.loss.item(), rel=1e-5)
    logits, target = torch.randn(2, CODES, ROWS, COLUMNS), tokens[:, 0]
    terms, log_probs = step_loss(logits, target, previous=None)
    semantic = loss_terms.semantic_loss(log_probs, target, tokenizer.codebook)
    torch.testing.assert_close(terms["semantic"], 3.0 * semantic)
    near = loss_terms.neighbourhood_loss(log_probs, target, 3, 0.3)
    torch.testing.assert_close(terms["neighbor"], 2.0 * near)


def test_noise_replaces_no_more_than_its_share():
    torch.manual_seed(0)
    tokens = torch.full((200, 4, 9, 9), 3)
    corrupted, level = corrupt_tokens(tokens, 1000, 0.5)
    changed = (corrupted != tokens).float().mean((1, 2, 3))
    assert changed.max() < 0.6 and changed.min() < 0.05 and abs(changed.mean() - 0.25) < 0.03
    torch.testing.assert_close(changed, level, atol=0.1, rtol=0)
    untouched, level = corrupt_tokens(tokens, 1000, 0.0)
    assert untouched is tokens and not level.any()


def test_similar_codes_and_clean_samples_have_their_shares():
    torch.manual_seed(0)
    tokens = torch.full((200, 4, 9, 9), 3)
    similar = torch.full((1000, 2), 7)
    corrupted, level = corrupt_tokens(tokens, 1000, 0.5, 0.5, similar, 0.7)
    replaced = corrupted[corrupted != tokens]
    assert (replaced == 7).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (level == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(corrupted[level == 0], tokens[level == 0])
