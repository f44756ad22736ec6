"""rollout/recovery.py: when a picture has lost its detail, and what is gone back to, on the tiny world."""

import numpy as np
import pytest
import torch

from rollout.context import load_recording, load_world, prime
from rollout.recovery import GOOD, SETTLED_SECONDS, SNAPSHOTS, DetailWatch, Recovery
from rollout.rollout import Rollout

FPS = 16
DETAILED = torch.arange(32).reshape(4, 8)
UNIFORM = torch.zeros(4, 8, dtype=torch.long)


def watched(recorded: torch.Tensor, frames: list[torch.Tensor], acts: bool = True) -> DetailWatch:
    watch = DetailWatch(recorded[None], FPS)
    for frame in frames:
        watch.add(frame, acts)
    return watch


def test_a_uniform_picture_that_does_not_change_while_the_player_acts_is_lost():
    assert watched(DETAILED, [UNIFORM] * (FPS + 1)).lost
    assert not watched(DETAILED, [UNIFORM] * (FPS - 1)).lost, "not before a second has passed"
    assert not watched(DETAILED, [UNIFORM] * 100, acts=False).lost, "the player stands still"


def test_good_pictures_are_not_lost():
    assert not watched(DETAILED, [DETAILED] * 100).lost, "walking against a wall"
    assert not watched(UNIFORM, [UNIFORM] * 100).lost, "the start itself is uniform"
    few_but_changing = [torch.full((4, 8), n % 2) for n in range(100)]
    assert not watched(DETAILED, few_but_changing).lost, "a wall that comes nearer"
    half = watched(DETAILED, [UNIFORM] * 100)
    for n in range(FPS):
        half.add(UNIFORM, acts=n % 3 == 0)
    assert not half.lost, "too few frames with an action to judge"


def test_a_restart_begins_a_new_second():
    watch = watched(DETAILED, [UNIFORM] * FPS)
    watch.restart(DETAILED)
    assert not watch.is_full and not watch.lost and np.isnan(watch.detail)


@pytest.fixture
def rollout(tiny):
    world = load_world(tiny.world, tiny.tokenizer, "cpu", "fp32")
    rollout = Rollout(world.model, dtype=world.dtype)
    prime(rollout, [load_recording(tiny.tokens, world).first(16)])
    return rollout


def play(recovery: Recovery, frames: int, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Steps with W held, whose pictures are replaced -> the state after each."""
    states = []
    for _ in range(frames):
        recovery.rollout.step(torch.tensor([[0.0, 0, 0, 1, 0]]))
        recovery.rollout.tokens = tokens[None]
        recovery.watch(True, extra=recovery.step + 1)
        states.append(recovery.rollout.state.clone())
    return states


def test_it_goes_back_to_a_settled_snapshot_with_its_state(rollout):
    recovery = Recovery(rollout, DETAILED[None], FPS)
    states = play(recovery, 100, DETAILED)
    play(recovery, FPS, UNIFORM)
    assert recovery.watched.lost and recovery.watched.detail < GOOD
    undone, extra = recovery.go_back()
    step = 100 + FPS - undone
    assert SETTLED_SECONDS * FPS <= undone <= (SETTLED_SECONDS + 1) * FPS
    assert extra == step == recovery.step
    assert torch.equal(rollout.state, states[step - 1]) and torch.equal(rollout.tokens[0], DETAILED)
    assert not recovery.watched.lost, "a new second begins"


def test_a_second_call_goes_further_back_in_the_end_to_the_start(rollout):
    start = rollout.state.clone(), rollout.tokens.clone()
    recovery = Recovery(rollout, DETAILED[None], FPS, extra="start")
    play(recovery, 200, DETAILED)
    steps = [recovery.step]
    for _ in range(SNAPSHOTS + 1):
        extra = recovery.go_back()[1]
        steps.append(recovery.step)
    assert steps == sorted(steps, reverse=True) and steps[-1] == 0 and extra == "start"
    assert torch.equal(rollout.state, start[0]) and torch.equal(rollout.tokens, start[1])


def test_pictures_without_detail_are_never_gone_back_to(rollout):
    recovery = Recovery(rollout, DETAILED[None], FPS)
    play(recovery, 100, UNIFORM)
    assert not recovery.snapshots and recovery.go_back()[0] == 100


def test_the_random_numbers_go_on(rollout):
    recovery = Recovery(rollout, DETAILED[None], FPS)

    def three_steps() -> torch.Tensor:
        return rollout.run(torch.tensor([[[0.0, 0, 0, 1, 0]] * 3]))

    first = three_steps()
    recovery.go_back()
    assert not torch.equal(three_steps(), first)
