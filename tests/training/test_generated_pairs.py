"""Training pairs of generated sources: the path of a chain, what its views are composed of, its targets."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from test_pairs import assert_same, clips, model, pool_of, world  # noqa: F401

from geometry.keyframes import NEW_GENERATED_METRES, VISIBLE
from model_geometry import ViewInput
from training import generated_pairs
from training.generated_pairs import CHAIN_STEPS, CHAINS, GENERATED_PAIRS, chain_frames, make_generated_pairs
from training.pairs import NO_TARGET


def test_chain_advances_by_the_distance_of_keyframes():
    pose = np.zeros((100, 5))
    pose[:, 2] = 0.2 * np.arange(100)  # walks 0.2 m a frame
    every_eighth = list(range(0, 8 * CHAIN_STEPS + 1, 8))
    assert chain_frames(pose, 1.0).tolist() == every_eighth, "1.6 m is the first above 1.5 m"
    assert chain_frames(pose, 0.5).tolist() == list(range(0, 4 * CHAIN_STEPS + 1, 4))


def test_chain_advances_by_turns_across_the_date_line():
    pose = np.zeros((40, 5))
    pose[:, 3] = (178 + np.arange(40) + 180) % 360 - 180  # 178, 179, -180, ...
    assert chain_frames(pose, 1.0).tolist() == [0, 9, 18, 27, 36], "9 degrees are the first above 8"


def test_chain_of_a_player_who_stands_still_is_one_frame():
    assert chain_frames(np.zeros((50, 5)), 1.0).tolist() == [0]


@pytest.fixture
def walking(clips):  # noqa: F811
    """All players walk forward, so that a chain takes the whole clip."""
    for pose in clips.pose:
        pose[:] = 0
        pose[:, 2] = NEW_GENERATED_METRES / 2 * np.arange(len(pose))
    return clips


def made(model, clips, seed: int = 0, invented: float = 0.0):  # noqa: F811
    pool = pool_of(model, clips)
    torch.manual_seed(seed)
    return make_generated_pairs(model, clips, pool.draw_scene, np.random.default_rng(seed), invented)


def test_first_sources_are_recorded_and_later_ones_generated(model, walking):  # noqa: F811
    inputs, target = made(model, walking)
    assert len(target) == GENERATED_PAIRS and inputs.z.dtype == torch.half
    observed = inputs.observed.view(CHAIN_STEPS, CHAINS)
    assert observed[0].all() and not observed[1:].any()
    assert inputs.displacement.norm(dim=1).min() > 0.3


@pytest.mark.parametrize("invented", [0.0, 0.999])
def test_sources_are_what_the_model_generated(model, walking, monkeypatch, invented):  # noqa: F811
    """Visible cells of later sources are the model's samples (code 1), disoccluded ones as recorded, or, if
    it invents them, samples too: then only the first frame of a chain has a target."""
    composed = []
    compose = generated_pairs.compose_input

    def recording(model, sources, usable, generation, *rest):
        inputs = compose(model, sources, usable, generation, *rest)
        composed.append((sources.tokens.view(*usable.shape, *sources.tokens.shape[1:]), generation, inputs))
        return inputs

    monkeypatch.setattr(generated_pairs, "compose_input", recording)
    monkeypatch.setattr(
        generated_pairs, "sample_tokens", lambda model, p, sampling, noise: torch.ones_like(noise).long()
    )
    _, target = made(model, walking, invented=invented)
    target = target.view(CHAIN_STEPS, CHAINS, *target.shape[1:]).long()
    assert len(composed) == CHAIN_STEPS
    assert (target[0] != NO_TARGET).all() and (target[1:] == NO_TARGET).all() == bool(invented)
    for step in range(1, CHAIN_STEPS):
        tokens, generation, _ = composed[step]
        visible = composed[step - 1][2].visible_mask > VISIBLE
        assert (generation[:, 0] == min(step, 4)).all(), "the last frame of the chain comes first"
        assert torch.equal(tokens[:, 0], torch.where(visible | bool(invented), 1, target[step - 1]))
        assert visible.any()
    assert any((generation[:, 1:] < generation[:, :1]).any() for _, generation, _ in composed[2:])


def test_targets_are_the_recorded_frames_of_the_poses(model, walking):  # noqa: F811
    """Frame k has code k everywhere; the pitch that the network is told is that of the target."""
    for tokens, pose in zip(walking.tokens, walking.pose, strict=True):
        tokens[:] = (np.arange(len(tokens)) % model.config.codebook_size)[:, None, None]
        pose[:, 4] = np.arange(len(pose)) / 8
    inputs, target = made(model, walking)
    frame = (inputs.pitch.float() * 8).round().long() % model.config.codebook_size
    assert torch.equal(target.long(), frame[:, None, None].expand_as(target))


def test_round_is_made_with_the_saved_weights(model, clips):  # noqa: F811
    """A resumed run, whose weights have changed since the round was made, continues with the same pairs."""
    pool = pool_of(model, clips, generated=1.0, size=GENERATED_PAIRS)
    pool.next()
    maker = {name: value.clone() for name, value in pool.maker.items()}
    position = dict(pool.position)
    expected = pool.next()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    resumed = pool_of(model, clips, generated=1.0, size=GENERATED_PAIRS)
    resumed.restore(position, maker)
    assert_same(resumed.next(), expected)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    other = pool_of(model, clips, generated=1.0, size=GENERATED_PAIRS)
    other.restore(position)
    again = other.next()
    assert any(
        not torch.equal(getattr(again[0], f.name), getattr(expected[0], f.name)) for f in fields(ViewInput)
    )


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_share_of_generated_pairs(model, clips, share, monkeypatch):  # noqa: F811
    from training import pair_pool

    calls = []
    make = pair_pool.make_generated_pairs
    monkeypatch.setattr(pair_pool, "make_generated_pairs", lambda *given: (calls.append(1), make(*given))[1])
    pool_of(model, clips, generated=share, size=2 * GENERATED_PAIRS).next()
    assert len(calls) == 2 * share
