"""What the two trainers share: the learning rate, the saved state, the times to save."""

from dataclasses import asdict, dataclass

import pytest
import torch

from runtime import training_state
from runtime.checkpoint import CheckpointError
from runtime.training_state import MOST_SKIPPED, NonFiniteError, SaveTimer, TrainingState, warmup_cosine


@dataclass(frozen=True)
class LineConfig:
    width: int = 3


def new_state(config: LineConfig = LineConfig()) -> TrainingState:  # noqa: B008
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model.config = config
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    return TrainingState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))


def train_one_step(state: TrainingState) -> None:
    loss = state.model(torch.rand(4, 3)).square().mean()
    state.optimizer.zero_grad()
    loss.backward()
    state.set_learning_rate(warmup_cosine(state.step, 0.1, 0.01, 2, 10))
    state.optimizer.step()
    state.step += 1


def test_learning_rate_warms_up_and_decays():
    rates = [warmup_cosine(step, 1.0, 0.1, 10, 110) for step in (0, 9, 60, 110, 999)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])
    assert warmup_cosine(0, 1.0, 0.1, 0, 10) == 1.0, "no warm-up"


def test_a_restored_state_continues_bit_for_bit():
    state = new_state()
    for _ in range(3):
        train_one_step(state)
    state.best, state.seconds, state.metrics = 0.5, 7.0, {"val_mse": 0.5}
    content = {"config": asdict(state.model.config), "model": state.model.state_dict(), **state.content()}
    content = {key: torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, value)
               for key, value in content.items()}  # fmt: skip
    train_one_step(state)
    other = new_state()
    other.restore(content, "last.pt")
    assert (other.step, other.best, other.seconds, other.metrics) == (3, 0.5, 7.0, {"val_mse": 0.5})
    train_one_step(other)
    assert torch.equal(other.model.weight, state.model.weight)


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
