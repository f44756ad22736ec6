"""The ConvGRU baseline: steps and sequences agree; actions and earlier frames change the prediction."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model_convGru import ConvGRUCell, ConvGRUWorldModel, WorldModelConfig

V, H, W = 16, 9, 12
CONFIG = WorldModelConfig(V, H, W, embed_dim=8, hidden_dim=8, layers=2, film_hidden=8)


@pytest.fixture
def model() -> ConvGRUWorldModel:
    torch.manual_seed(0)
    return ConvGRUWorldModel(CONFIG)


def sequence(frames: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (batch, frames, H, W), generator=generator)
    return tokens, torch.rand(batch, frames, 5, generator=generator) * 2 - 1


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_no_state_is_an_empty_one(kernel_size):
    torch.manual_seed(0)
    cell, x = ConvGRUCell(6, kernel_size), torch.randn(2, 6, 5, 7)
    empty = torch.zeros_like(x)
    torch.testing.assert_close(cell(x, None), cell(x, empty), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(cell(x, None), cell(x, torch.ones_like(x)))


def test_shapes(model):
    tokens, actions = sequence(3)
    logits, state = model(tokens, actions)
    assert logits.shape == (2, 3, V, H, W)
    assert state.shape == (CONFIG.layers, 2, CONFIG.hidden_dim, H, W)
    assert model.compute_embeddings(tokens).shape == (2, 3, CONFIG.hidden_dim, H, W)
    assert model.compute_embeddings(tokens[:, 0]).shape == (2, CONFIG.hidden_dim, H, W)
    assert model.compute_film(actions).shape == (2, 3, CONFIG.layers, 2, CONFIG.hidden_dim)


@torch.no_grad()
def test_step_over_a_sequence_equals_forward(model):
    tokens, actions = sequence(6)
    whole, last = model(tokens, actions)
    state, steps = None, []
    for t in range(6):
        logits, state = model.step(tokens[:, t], actions[:, t], state)
        steps.append(logits)
    # Embedding all frames in one convolution may round differently than one at a time.
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_sequence_may_be_cut_anywhere(model):
    tokens, actions = sequence(6)
    whole, last = model(tokens, actions)
    first, state = model(tokens[:, :4], actions[:, :4])
    second, state = model(tokens[:, 4:], actions[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_prediction_does_not_depend_on_later_frames(model):
    tokens, actions = sequence(5)
    changed, turned = tokens.clone(), actions.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % V
    turned[:, 3:] *= -1
    before, after = model(tokens, actions)[0], model(changed, turned)[0]
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 3], after[:, 3])


@torch.no_grad()
def test_windows_of_a_batch_are_independent(model):
    tokens, actions = sequence(3, batch=3)
    together = model(tokens, actions)[0]
    alone = model(tokens[1:2], actions[1:2])[0]
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", range(5), ids=["yaw", "pitch", "move_x", "move_z", "jump"])
def test_every_action_changes_the_logits(model, name):
    tokens, actions = sequence(1)
    other = actions.clone()
    other[..., name] += 0.5
    assert (model(tokens, other)[0] - model(tokens, actions)[0]).abs().max() > 1e-4


@torch.no_grad()
def test_film_scales_and_shifts_the_input_of_each_layer(model):
    """x * (1 + gamma) + beta, computed by hand for one frame."""
    tokens, actions = sequence(1)
    film = model.compute_film(actions[:, 0])
    x = model.compute_embeddings(tokens[:, 0])
    for i, cell in enumerate(model.cells):
        gamma, beta = film[:, i, 0, :, None, None], film[:, i, 1, :, None, None]
        x = cell(x * (1 + gamma) + beta, torch.zeros_like(x))
    torch.testing.assert_close(model.head(x), model.step(tokens[:, 0], actions[:, 0])[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_cell_follows_the_gru_equations():
    torch.manual_seed(0)
    cell = ConvGRUCell(4, 3)
    x, h = torch.randn(2, 1, 4, 5, 5).unbind(0)
    gates = F.conv2d(torch.cat([x, h], 1), cell.gates.weight, cell.gates.bias, padding=1).sigmoid()
    z, r = gates[:, :4], gates[:, 4:]
    candidate = F.conv2d(
        torch.cat([x, r * h], 1), cell.candidate.weight, cell.candidate.bias, padding=1
    ).tanh()
    torch.testing.assert_close(cell(x, h), (1 - z) * h + z * candidate)


@torch.no_grad()
def test_the_state_carries_earlier_frames(model):
    tokens, actions = sequence(4)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % V  # only the first frame differs
    difference = (model(tokens, actions)[0] - model(other, actions)[0]).abs().amax((0, 2, 3, 4))
    assert (difference > 1e-6).all(), "it changes all later frames"


@torch.no_grad()
def test_the_state_stays_float32_under_autocast(model):
    tokens, actions = sequence(2)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(tokens, actions)
    assert state.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("layers, steps", [(1, 1), (2, 1), (1, 2)])
def test_information_moves_two_cells_a_layer(layers, steps):
    """Reset gate and candidate each extend the receptive field by one cell."""
    torch.manual_seed(0)
    model = ConvGRUWorldModel(WorldModelConfig(V, 17, 17, embed_dim=8, hidden_dim=8, layers=layers))
    tokens, actions = torch.randint(0, V, (1, steps, 17, 17)), torch.zeros(1, steps, 5)
    other = tokens.clone()
    other[0, 0, 8, 8] = (other[0, 0, 8, 8] + 1) % V
    state = torch.randn(model.init_state(1).shape)  # not zero, so that r * h is not
    difference = (model(tokens, actions, state)[0] - model(other, actions, state)[0])[0, -1].abs().amax(0)
    reached = (difference > 0).nonzero() - 8
    assert reached.abs().max() == 2 * layers * steps
    torch.testing.assert_close(difference[0], torch.zeros(17), rtol=0, atol=0)


def gradients(model: ConvGRUWorldModel) -> list[torch.Tensor]:
    tokens, actions = sequence(4)
    model.zero_grad()
    logits, _ = model(tokens[:, :-1], actions[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(0, 1)).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing_recomputes_and_changes_nothing(model, monkeypatch):
    calls = []
    forward = ConvGRUCell.forward
    monkeypatch.setattr(ConvGRUCell, "forward", lambda self, x, h: (calls.append(1), forward(self, x, h))[1])
    plain = gradients(model)
    assert len(calls) == 3 * CONFIG.layers
    calls.clear()
    model.gradient_checkpointing = True
    recomputed = gradients(model)
    assert len(calls) == 2 * 3 * CONFIG.layers, "each step runs once more in the backward pass"
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)
    calls.clear()
    with torch.no_grad():
        model(*sequence(3))
    assert len(calls) == 3 * CONFIG.layers, "nothing to recompute without gradients"


def test_every_weight_gets_a_gradient(model):
    assert all(g.abs().sum() > 0 for g in gradients(model))


def test_a_few_steps_of_training_learn_to_copy(model):
    """Constant frames are soon predicted, so loss, state and head work together."""
    tokens = torch.randint(0, V, (4, 1, H, W)).expand(4, 4, H, W)
    actions = torch.zeros(4, 4, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens, actions)[0].flatten(0, 1), tokens.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0 and losses[-1] < 0.5


def test_similar_codes_start_with_similar_weights():
    torch.manual_seed(0)
    kinds = torch.randn(4, 24) * 3
    codebook = kinds.repeat_interleave(8, 0) + 0.1 * torch.randn(32, 24)  # codes 0-7 are similar, 8-15, ...
    tokenizer = SimpleNamespace(codebook=codebook)
    for width in (6, 40):  # fewer and more dimensions than the codebook has
        config = WorldModelConfig(32, 3, 4, embed_dim=width, hidden_dim=width, layers=1)
        model = ConvGRUWorldModel(config, tokenizer)
        model.init_from_codebook()
        for weight in (model.embed.weight, model.head.weight[:, :, 0, 0]):
            distance = torch.cdist(weight.detach(), weight.detach()) + 1e9 * torch.eye(32)
            nearest = distance.argsort(1)[:, :7] // 8
            assert (nearest == (torch.arange(32) // 8)[:, None]).float().mean() > 0.9
        assert model.embed.weight[:, : min(width, 24)].square().mean().item() == pytest.approx(1.0, rel=1e-3)
