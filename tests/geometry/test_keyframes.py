"""Keyframes: what is written, what is selected, and the next view composed of them and the last frame."""

from dataclasses import fields

import torch

from geometry.keyframes import Keyframes, compose_next_view
from geometry.warping import SourceFrames

H, W = 9, 16
FOV = 70.0


def frames(*yaws: float, code: int = 0, z: float = 0.0) -> SourceFrames:
    """Frames of a far wall at these yaws, with random colours and codes."""
    n = len(yaws)
    torch.manual_seed(code)
    pose = torch.zeros(n, 5)
    pose[:, 3], pose[:, 2] = torch.tensor(yaws), z
    return SourceFrames(
        torch.rand(n, 3, 4 * H, 4 * W),
        torch.randint(64, (n, H, W)),
        torch.full((n, 2 * H, 2 * W), 0.01),
        pose,
        torch.ones(n, H, W),
    )


def memory_of(*written: SourceFrames, capacity: int = 4, generations: tuple[float, ...] = ()) -> Keyframes:
    """The memory of one world after these frames were written one by one; without `generations` observed."""
    keyframes = Keyframes.empty(1, capacity, (4 * H, 4 * W), (H, W))
    for frame, generation in zip(written, generations or [0.0] * len(written), strict=True):
        keyframes = keyframes.write(torch.tensor([True]), frame, torch.tensor([generation]))
    return keyframes


def test_full_memory_loses_its_oldest_keyframe_and_nothing_changes_in_place():
    one = memory_of(frames(0.0), capacity=2)
    two = one.write(torch.tensor([True]), frames(90.0), torch.ones(1))
    three = two.write(torch.tensor([True]), frames(180.0), torch.zeros(1))
    assert one.order.tolist() == [[1, 0]] and two.order.tolist() == [[1, 2]]
    assert three.pose[0, :, 3].tolist() == [180.0, 90.0]
    assert three.generation.tolist() == [[0, 1]]
    assert two.write(torch.tensor([False]), frames(7.0), torch.zeros(1)) is two


def test_distance_to_the_newest_keyframe():
    keyframes = memory_of(frames(0.0), frames(180.0))
    metres, degrees = keyframes.distance_to_newest(torch.tensor([[0.0, 3.0, 4.0, -170.0, 0.0]]))
    assert metres.item() == 5 and degrees.item() == 10
    empty = Keyframes.empty(1, 2, (4 * H, 4 * W), (H, W))
    assert empty.distance_to_newest(torch.zeros(1, 5))[0].item() == torch.inf


def test_generated_frames_are_new_far_from_the_newest_keyframe():
    keyframes = memory_of(frames(0.0))

    def new(yaw: float, z: float) -> bool:
        return keyframes.is_new(torch.tensor([[0.0, 0.0, z, yaw, 0.0]])).item()

    assert not new(7.9, 1.4) and not new(-7.9, -1.4)
    assert new(8.1, 0.0) and new(-8.1, 0.0) and new(0.0, 1.6)
    empty = Keyframes.empty(1, 3, (4 * H, 4 * W), (H, W))
    assert empty.is_new(torch.zeros(1, 5)).item(), "without keyframes all is new"


def test_the_newest_recorded_frame_is_a_keyframe_and_the_others_are_apart():
    """One degree a step: the newest one moves on until it is more than 2 degrees from the one before."""
    keyframes = Keyframes.empty(1, 8, (4 * H, 4 * W), (H, W))
    yes, yaws = torch.tensor([True]), []
    for yaw in range(8):
        keyframes = keyframes.add_observed(frames(float(yaw), code=yaw), yes)
        used = keyframes.order[0] > 0
        yaws.append(sorted(keyframes.pose[0, used, 3].tolist()))
    assert yaws[:5] == [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4]]
    assert yaws[-1] == [0, 3, 6, 7]
    newest = keyframes.order[0].argmax()
    assert torch.equal(keyframes.tokens[0, newest], frames(7.0, code=7).tokens[0])
    assert keyframes.add_observed(frames(50.0), torch.tensor([False])) is keyframes
    one = memory_of(frames(0.0), capacity=1).add_observed(frames(1.0), yes)
    assert one.pose[0, 0, 3] == 1, "a memory of one keyframe holds the newest"


def test_only_the_newest_keyframe_counts():
    """A frame at the place of an older one is kept: what was seen since may have replaced it."""
    keyframes = memory_of(frames(0.0), frames(90.0))
    assert keyframes.is_new(torch.zeros(1, 5)).item()
    assert not keyframes.is_new(frames(90.0).pose).item()


def test_selects_the_keyframes_that_show_most_of_the_view():
    keyframes = memory_of(frames(0.0), frames(90.0), frames(30.0), frames(0.0, z=50.0))
    flat = torch.full((1, 4, 8), 0.01)
    slots, useful = keyframes.select(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 3, FOV)
    assert slots[0, 0] == 2, "the nearest view first"
    assert slots[0, 1] == 1, "then the one that adds most"
    assert useful[0, :2].all()
    # Of keyframes that show the same from the same place only the newest adds something.
    twice = memory_of(frames(0.0), frames(0.0))
    slots, useful = twice.select(torch.zeros(1, 5), flat, 2, FOV)
    assert slots[0, 0] == 1 and useful.tolist() == [[True, False]]
    away = memory_of(frames(180.0))
    assert not away.select(torch.zeros(1, 5), flat, 1, FOV)[1].any(), "it shows nothing of the view"
    empty = Keyframes.empty(1, 4, (4 * H, 4 * W), (H, W))
    assert not empty.select(torch.zeros(1, 5), flat, 2, FOV)[1].any()
    # An observed keyframe outweighs a generated one at nearly the same pose.
    with_generated = keyframes.write(torch.tensor([True]), frames(40.0), torch.full((1,), 3.0))
    slots, _ = with_generated.select(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 2, FOV)
    assert with_generated.generation[0, slots[0, 0]] == 0
    assert with_generated.pose[0, slots[0, 0], 3] == 30


def test_selection_does_not_depend_on_the_origin():
    """Far from the world's origin float32 positions are coarse, so poses are made relative first."""
    keyframes = memory_of(frames(0.0), frames(60.0))
    far = memory_of(frames(0.0, z=4096.0), frames(60.0, z=4096.0))
    flat, to = torch.full((1, 4, 8), 0.01), torch.tensor([[0.0, 0.0, 0.0, 20.0, 0.0]])
    there = to.clone()
    there[:, 2] = 4096.0
    for a, b in zip(keyframes.select(to, flat, 2, FOV), far.select(there, flat, 2, FOV), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- the next view

GROUND = torch.full((1, 2 * H, 2 * W), 0.01)


def composed(frame: SourceFrames, keyframes: Keyframes, yaw: float, observed: bool, sources: int = 2):
    """The view at a yaw, and the generation of each of its cells."""
    pose = torch.tensor([[0.0, 0.0, 0.0, yaw, 0.0]])
    return compose_next_view(frame, torch.tensor([observed]), keyframes, pose, GROUND, sources, FOV)


def test_generation_of_a_cell_is_that_of_its_source():
    """The keyframe to the right shows the right side, the last frame the left one."""
    keyframes = memory_of(frames(60.0, code=1), generations=(2.0,))
    last = frames(0.0, code=2)
    view, generation = composed(last, keyframes, 30.0, observed=True)
    assert (view.source[..., 0] == 0).all() and (generation[..., 0] == 0).all(), "observed"
    assert (view.source[..., -1] == 1).all() and (generation[..., -1] == 2).all()
    _, generation = composed(last, keyframes, 30.0, observed=False)
    assert (generation[..., 0] == 3).all(), "one more than the newest keyframes"
    assert (generation[..., -1] == 2).all()


def test_keyframe_at_the_same_place_is_read_instead_of_a_generated_last_frame():
    """The last frame has been resampled in every step, the keyframe never."""
    keyframes, last = memory_of(frames(0.0, code=1)), frames(0.0, code=2)
    view, generation = composed(last, keyframes, 0.0, observed=False)
    assert (view.source == 1).all() and (generation == 0).all()
    assert torch.equal(view.tokens, frames(0.0, code=1).tokens)
    view, _ = composed(last, keyframes, 0.0, observed=True)
    assert (view.source == 0).all() and torch.equal(view.tokens, last.tokens)


def test_without_keyframes_the_last_frame_is_the_only_source():
    last = frames(0.0, code=2)
    none = Keyframes.empty(1, 0, (4 * H, 4 * W), (H, W))
    free = Keyframes.empty(1, 3, (4 * H, 4 * W), (H, W))
    for keyframes in (none, free):
        view, generation = composed(last, keyframes, 10.0, observed=False)
        assert (view.source == 0).all() and (generation == 1).all()
        assert view.disagreement.max() == 0
        assert 0.5 < view.visible_mask.mean() < 1


def test_each_world_has_its_own_sources():
    """Two worlds in a batch are each composed as alone."""
    memories = [memory_of(frames(60.0, code=c), frames(-60.0, code=c + 1)) for c in (1, 5)]
    lasts = [frames(0.0, code=c) for c in (3, 7)]
    poses = torch.tensor([[0.0, 0.0, 0.0, yaw, 0.0] for yaw in (30.0, -30.0)])
    both = Keyframes(**{f.name: torch.cat([getattr(m, f.name) for m in memories]) for f in fields(Keyframes)})
    observed = torch.tensor([True, False])
    together, generation = compose_next_view(
        SourceFrames.cat(*lasts), observed, both, poses, GROUND.repeat(2, 1, 1), 2, FOV
    )
    for i, yaw in enumerate((30.0, -30.0)):
        view, alone = composed(lasts[i], memories[i], yaw, bool(observed[i]))
        torch.testing.assert_close(together.picture[i : i + 1], view.picture)
        assert torch.equal(together.tokens[i : i + 1], view.tokens)
        assert torch.equal(generation[i : i + 1], alone)
