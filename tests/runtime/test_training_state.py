"""What the two trainers share: the learning rate, the saved state, the times to save."""

from dataclasses import asdict, dataclass

import pytest
import torch

from runtime import training_state
from runtime.checkpoint import CheckpointError
from runtime.training_state import (
    MOST_SKIPPED,
    MovingAverage,
    NonFiniteError,
    SaveTimer,
    TrainingState,
    warmup_cosine,
)


@dataclass(frozen=True)
class LineConfig:
    width: int = 3


def new_state(config: LineConfig = LineConfig(), decay: float = 0.0) -> TrainingState:  # noqa: B008
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model.config = config
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    average = MovingAverage(model, decay) if decay else None
    return TrainingState(model, optimizer, scaler, torch.device("cpu"), average=average)


def train_one_step(state: TrainingState) -> None:
    loss = state.model(torch.rand(4, 3)).square().mean()
    state.optimizer.zero_grad()
    loss.backward()
    state.set_learning_rate(warmup_cosine(state.step, 0.1, 0.01, 2, 10))
    state.optimizer.step()
    state.step += 1
    if state.average:
        state.average.update(state.model, state.step)


def test_learning_rate_warms_up_and_decays():
    rates = [warmup_cosine(step, 1.0, 0.1, 10, 110) for step in (0, 9, 60, 110, 999)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])
    assert warmup_cosine(0, 1.0, 0.1, 0, 10) == 1.0, "no warm-up"


def test_average_follows_fast_at_first_and_slowly_later():
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = MovingAverage(network, 0.9)
    assert average.network is not network and not average.network.training
    assert not any(p.requires_grad for p in average.network.parameters())
    torch.nn.init.ones_(network.weight)
    average.update(network, 1)
    expected = 1 - 1 / 11
    torch.testing.assert_close(average.network.weight, torch.full((1, 2), expected))
    average.update(network, 1000)
    expected += 0.1 * (1 - expected)
    torch.testing.assert_close(average.network.weight, torch.full((1, 2), expected))
    assert (network.weight == 1).all() and network.training


def test_the_average_is_what_is_used_and_the_trained_weights_are_kept_beside_it():
    plain, averaged = new_state(), new_state(decay=0.5)
    assert plain.used is plain.model and "trained" not in plain.content()
    assert averaged.used is averaged.average.network
    train_one_step(averaged)
    content = averaged.content()
    assert torch.equal(content["trained"]["weight"], averaged.model.weight)
    assert not torch.equal(averaged.used.weight, averaged.model.weight)


@pytest.mark.parametrize("before, after", [(0.0, 0.5), (0.5, 0.0)])
def test_a_run_may_go_on_with_or_without_an_average(before, after):
    state, other = new_state(decay=before), new_state(decay=after)
    train_one_step(state)
    content = {"config": asdict(LineConfig()), "model": state.used.state_dict(), **state.content()}
    other.restore(content, "last.pt")
    assert torch.equal(other.model.weight, state.model.weight)
    assert torch.equal(other.used.weight, state.model.weight)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_restored_state_continues_bit_for_bit(decay):
    state = new_state(decay=decay)
    for _ in range(3):
        train_one_step(state)
    state.best, state.seconds, state.metrics = 0.5, 7.0, {"val_mse": 0.5}
    content = {"config": asdict(state.model.config), "model": state.used.state_dict(), **state.content()}
    content = {key: torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, value)
               for key, value in content.items()}  # fmt: skip
    train_one_step(state)
    other = new_state(decay=decay)
    other.restore(content, "last.pt")
    assert (other.step, other.best, other.seconds, other.metrics) == (3, 0.5, 7.0, {"val_mse": 0.5})
    train_one_step(other)
    assert torch.equal(other.model.weight, state.model.weight)
    assert torch.equal(other.used.weight, state.used.weight)


def test_the_state_of_another_network_is_refused():
    content = {"config": {"width": 4}, "model": {}, **new_state().content()}
    with pytest.raises(CheckpointError, match="last.pt: was trained with .*'width': 4"):
        new_state().restore(content, "last.pt")


def test_saves_are_due_by_steps_and_by_minutes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(training_state.time, "monotonic", lambda: now)
    timer = SaveTimer(steps=10, minutes=2.0)
    assert [timer.due(step) for step in (1, 9, 10)] == [False, False, True]
    now = 119.0
    assert not timer.due(11)
    now = 121.0
    assert timer.due(12) and not timer.due(13)


def test_steps_that_are_not_finite_leave_the_weights_alone(capsys):
    state = new_state()
    for bad in (torch.nan, torch.inf):
        before = state.model.weight.clone()
        state.update(state.model(torch.full((4, 3), bad)).square().mean(), 1.0)
        state.update(state.model(torch.ones(4, 3)).square().mean() + bad, 1.0)  # its gradient is finite
        assert torch.equal(state.model.weight, before)
        state.update(state.model(torch.ones(4, 3)).square().mean(), 1.0)
        assert not torch.equal(state.model.weight, before) and state.model.weight.isfinite().all()
    assert (state.step, state.finite.skipped, state.finite.in_a_row) == (6, 4, 0)
    assert state.content()["skipped"] == 4
    assert "step 1: loss nan, gradient norm nan: the step is left out" in capsys.readouterr().out


def test_many_bad_steps_in_a_row_end_the_run():
    state = new_state()
    with pytest.raises(NonFiniteError, match=f"up to step {MOST_SKIPPED}, was not finite"):
        for _ in range(100):
            state.update(state.model(torch.full((4, 3), torch.nan)).square().mean(), 1.0)
    assert state.model.weight.isfinite().all()


@pytest.mark.parametrize("name", ["optimizer", "rng", "step", "metrics"])
def test_a_checkpoint_without_or_with_a_wrong_entry_is_refused(name):
    content = {"config": {"width": 3}, "model": new_state().model.state_dict(), **new_state().content()}
    for broken in ({k: v for k, v in content.items() if k != name}, {**content, name: "text"}):
        with pytest.raises(CheckpointError, match=r"^last.pt: (has no \w+|training cannot continue)"):
            new_state().restore(broken, "last.pt")
