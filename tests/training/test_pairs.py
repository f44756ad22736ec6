"""Training pairs: which frames they are made of, that a resumed run continues with them, and their loss."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import CODES, COLUMNS, ROWS, tiny_depth, tiny_vqvae, write_world

from dataset.surroundings import encode_inverse_ray_distance
from dataset.token_files import DataError
from dataset.windows import TokenClips
from geometry.motion import displacement_between
from model_geometry import GeometryConfig, GeometryWorldModel, ViewInput
from training import pair_pool, pairs
from training.generated_pairs import GENERATED_PAIRS
from training.geometry_window import pair_loss
from training.pair_pool import PairPool, pair_step
from training.pairs import NO_TARGET, SCENE_PAIRS, PairConfig, has_no_target
from training.window_parts import LossWeights, StepLoss
from vq_vae.tokenizer import Tokenizer

BATCH = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def clips(world) -> TokenClips:
    return TokenClips(world, "train", extras=("depth",))


@pytest.fixture
def model() -> GeometryWorldModel:
    torch.manual_seed(0)
    config = GeometryConfig(CODES, ROWS, COLUMNS, ROWS * 4, COLUMNS * 4, channels=8, coarse_channels=8)
    model = GeometryWorldModel(config, Tokenizer(tiny_vqvae()), tiny_depth())
    model.init_from_codebook()
    return model


def pool_of(model: GeometryWorldModel, clips: TokenClips, **changes) -> PairPool:
    """A pool whose round is one scene, gone through twice: 6 batches."""
    settings = {
        "batch": BATCH, "size": SCENE_PAIRS, "passes": 2, "recorded_depth": 0.5, "token_noise": 0.2,
        "similar_share": 0.5, "generated": 0.0,
    }  # fmt: skip
    seed = changes.pop("seed", 3)
    return PairPool(model, clips, PairConfig(**settings | changes), seed)


def assert_same(a: tuple[ViewInput, torch.Tensor], b: tuple[ViewInput, torch.Tensor]) -> None:
    for f in fields(ViewInput):
        assert torch.equal(getattr(a[0], f.name), getattr(b[0], f.name)), f.name
    assert torch.equal(a[1], b[1])


# ---------------------------------------------------------------- the stream


def test_share_of_the_steps_is_spread_evenly():
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        steps = [pair_step(step, share) for step in range(40)]
        assert sum(steps) == 40 * share
        assert all(sum(steps[i : i + 4]) == 4 * share for i in range(0, 40, 4))


def test_a_round_depends_on_seed_and_number_alone(model, clips):
    pool = pool_of(model, clips)
    before = torch.get_rng_state()
    first = [pool.next() for _ in range(7)]
    assert torch.equal(torch.get_rng_state(), before), "global random state is left alone"
    torch.manual_seed(99)
    again = pool_of(model, clips)
    for batch in first:
        assert_same(batch, again.next())
    assert pool.position == {"round": 1, "index": BATCH}, "6 batches in a round"
    assert not torch.equal(first[0][0].z, first[6][0].z), "the next round has other pairs"
    assert not torch.equal(first[0][0].z, pool_of(model, clips, seed=4).next()[0].z)


@pytest.mark.parametrize("used", [2, 6, 8])
def test_restored_pool_continues_with_the_same_batches(model, clips, used):
    """In the middle of a round, at its end, and in the second one."""
    pool = pool_of(model, clips)
    for _ in range(used):
        pool.next()
    restored = pool_of(model, clips)
    restored.restore(pool.position)
    for _ in range(3):
        assert_same(pool.next(), restored.next())
    assert restored.position == pool.position


def test_each_pair_is_used_as_often_as_there_are_passes(model, clips):
    pool = pool_of(model, clips)
    batches = [pool.next()[0] for _ in range(6)]
    z = torch.cat([b.z.flatten(1) for b in batches])
    displaced = torch.cat([b.channels.flatten(1) for b in batches])
    keys, counts = torch.cat([z, displaced], 1).unique(dim=0, return_counts=True)
    assert counts.sum() == 2 * SCENE_PAIRS and (counts % 2 == 0).all()
    assert not torch.equal(batches[0].z, batches[3].z), "each pass has its own order"


def test_clips_without_poses_are_refused(model, clips):
    clips.pose = [np.full_like(pose, np.nan) for pose in clips.pose]
    with pytest.raises(DataError, match="no clip of more than 20 frames has poses.*PAIR_SHARE=0"):
        pool_of(model, clips)


def test_only_clips_with_poses_are_used(model, clips):
    clips.pose[1] = np.full_like(clips.pose[1], np.nan)
    clips.pose[2] = clips.pose[2][:20]
    pool = pool_of(model, clips)
    rng = np.random.default_rng(0)
    assert {pool.draw_scene(rng)[0] for _ in range(30)} == {0, 3}


def test_most_scenes_are_walks(model, clips):
    """In one of four clips the player walks; the others are drawn as often as WALK_SHARE leaves."""
    clips.pose = [np.zeros_like(pose) for pose in clips.pose]
    clips.pose[2][:, 2] = np.linspace(0, 6, len(clips.pose[2]))
    rng = np.random.default_rng(0)
    pool = pool_of(model, clips)
    drawn = np.array([pool.draw_scene(rng)[0] for _ in range(300)])
    expected = pair_pool.WALK_SHARE + (1 - pair_pool.WALK_SHARE) / 4
    assert (drawn == 2).mean() == pytest.approx(expected, abs=0.08)


# ---------------------------------------------------------------- what a pair is made of


@pytest.fixture
def marked(clips) -> TokenClips:
    """One clip whose frame k has code k % CODES everywhere, the position k / 8 m, and pitch k / 2 degrees."""
    frames = len(clips.tokens[0])
    k = np.arange(frames)
    marked = clips.subset([1])
    marked.tokens = [np.broadcast_to((k % CODES)[:, None, None], clips.tokens[0].shape).astype(np.uint16)]
    pose = np.zeros((frames, 5), np.float32)
    pose[:, 2], pose[:, 4] = k / 8, k / 2
    marked.pose = [pose]
    actions = np.zeros((frames - 1, 5), np.float32)
    actions[:, 0] = k[:-1] / 64
    marked.actions = [actions]
    return marked


def test_sources_are_frames_before_the_target(model, marked, monkeypatch):
    """No source is the target or later, and what the network is told is of the target's own step."""
    seen = []

    def recording_compose(sources, usable, penalty, pose_to, *rest):
        seen.append((sources.pose.view(*usable.shape, 5), usable, penalty, pose_to))
        return pairs_compose(sources, usable, penalty, pose_to, *rest)

    pairs_compose = pairs.compose_view
    monkeypatch.setattr(pairs, "compose_view", recording_compose)
    pool = pool_of(model, marked, size=10 * SCENE_PAIRS, token_noise=0.0, passes=1)
    inputs, target = zip(*(pool.next() for _ in range(30)), strict=True)
    gaps, counts = [], []
    for source_pose, usable, penalty, pose_to in seen:
        gap = ((pose_to[:, None] - source_pose)[..., 2] * 8).round()[usable]
        assert gap.min() >= 1, "a source is the target itself, or later"
        gaps.append(gap)
        counts.append(usable.sum(1))
        assert usable[:, 0].all() and (penalty >= 0).all()
    assert torch.cat(gaps).max() > 15, "distant ones too"
    assert set(torch.cat(counts).tolist()) == {1, 2, 3, 4}
    frame = (torch.cat([i.pitch for i in inputs]) * 2).round().long()  # its number, by its pitch
    target = torch.cat(target)
    assert torch.equal(target, (frame % CODES)[:, None, None].expand_as(target))
    action = torch.cat([i.actions for i in inputs])[:, 0] * 64
    assert torch.equal(action.round().long(), frame - 1), "the action that leads to the target"
    moved = torch.cat([i.displacement for i in inputs])
    before, after = torch.zeros(1, 5), torch.tensor([[0.0, 0.0, 0.125, 0.0, 0.0]])
    torch.testing.assert_close(moved, displacement_between(before, after).expand_as(moved), atol=1e-3, rtol=0)


def test_first_sources_that_count_as_generated_are_told_and_penalized(model, marked, monkeypatch):
    seen = []
    pairs_compose = pairs.compose_view
    monkeypatch.setattr(
        pairs, "compose_view", lambda *given: (seen.append(given[2]), pairs_compose(*given))[1]
    )
    pool = pool_of(model, marked, size=8 * SCENE_PAIRS, passes=1)
    observed = torch.cat([pool.next()[0].observed for _ in range(24)])
    penalty = torch.cat(seen)[torch.from_numpy(pool._order)][:, 0]
    assert set(observed.tolist()) == {0.0, 1.0} and 0.5 < observed.mean() < 0.85
    assert torch.equal(penalty > 0, observed == 0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_recorded_depth_is_used_where_there_is_any(model, clips, monkeypatch, share):
    """Clips 1 and 3 have recorded depth; here it is 2 metres everywhere, and the network says 5."""
    code = encode_inverse_ray_distance(np.float32(0.5))
    clips.extras["depth"] = [None if d is None else np.full_like(d, code) for d in clips.extras["depth"]]
    assert [d is not None for d in clips.extras["depth"]] == [False, True, False, True]
    monkeypatch.setattr(
        model, "predict_depth", lambda picture, pitch: torch.full((len(picture), 2 * ROWS, 2 * COLUMNS), 0.2)
    )
    seen = []
    pairs_compose = pairs.compose_view
    monkeypatch.setattr(
        pairs,
        "compose_view",
        lambda sources, *rest: (seen.append(sources.inverse_ray_distance), pairs_compose(sources, *rest))[1],
    )
    pool, rng = pool_of(model, clips, recorded_depth=share), np.random.default_rng(0)
    for clip in range(4):
        pairs.make_pairs(model, clips, (clip, 0, 31), pool.config, rng)
        expected = 0.5 if share and clip in (1, 3) else 0.2
        torch.testing.assert_close(seen[-1], torch.full_like(seen[-1], expected), rtol=0.02, atol=0)


def test_corrupted_sources_have_their_level(model, clips):
    pool = pool_of(model, clips, token_noise=0.4, size=4 * SCENE_PAIRS, passes=1)
    level = torch.cat([pool.next()[0].level for _ in range(12)])
    assert 0.2 < (level == 0).float().mean() < 0.8 and 0.2 < level.max() <= 0.4
    clean = pool_of(model, clips, token_noise=0.0)
    assert clean.next()[0].level.max() == 0


# ---------------------------------------------------------------- the loss


def test_pair_loss_trains_the_network(model, clips):
    """Its gradient reaches all of the network, and a few steps on one batch make it smaller."""
    view, target = pool_of(model, clips).next()
    for parameter in model.parameters():
        if not parameter.any():  # it starts at zero, which stops the gradient of what is before it
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    step_loss = StepLoss(model.tokenizer, None, LossWeights(disoccluded=3.0, magnified=2.0, cells=1.0))
    torch.manual_seed(0)
    pair_loss(model, step_loss, view, target, masked_decoding=0.8).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("motion_model"):  # trained beforehand
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = pair_loss(model, step_loss, view, target, masked_decoding=0.0).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in model.tokenizer.vqvae.parameters())
    assert all(p.grad is None for p in model.depth.network.parameters())


def test_samples_without_a_target_change_neither_loss_nor_gradient(model, clips):
    view, target = pool_of(model, clips).next()
    step_loss = StepLoss(model.tokenizer, None, LossWeights(cells=1.0))
    model.out_proj.weight.data.normal_(std=0.1)
    part = ViewInput(**{f.name: getattr(view, f.name)[: BATCH // 2] for f in fields(ViewInput)})
    known = target.clone()
    known[BATCH // 2 :] = NO_TARGET
    losses, gradients = [], []
    for inputs, tokens in ((view, known), (part, target[: BATCH // 2])):
        model.zero_grad()
        loss = pair_loss(model, step_loss, inputs, tokens, masked_decoding=0.0).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    known[:] = NO_TARGET
    assert pair_loss(model, step_loss, view, known, masked_decoding=0.0).loss == 0


def test_samples_without_a_target_come_last(model, clips):
    pool = pool_of(model, clips, generated=1.0, invented=0.5, size=2 * GENERATED_PAIRS)
    shares = []
    for _ in range(2 * 2 * GENERATED_PAIRS // BATCH):
        missing = has_no_target(pool.next()[1]).tolist()
        assert missing == sorted(missing)
        shares.append(np.mean(missing))
    assert 0.1 < np.mean(shares) < 0.8


def test_disoccluded_and_magnified_cells_weigh_more(model, clips):
    """With half of the cells in the loss, those of a great weight are always among them."""
    view, target = pool_of(model, clips, batch=SCENE_PAIRS).next()
    channels = view.channels.clone()
    channels[:, 0], channels[:, 2] = 1.0, 0.0  # visible, not magnified
    plain = replace(view, channels=channels)
    special = torch.zeros_like(target, dtype=torch.bool)
    special[:, 0] = True  # a third of the cells

    def seen(view: ViewInput, **weights) -> torch.Tensor:
        """How often each cell is in the loss: [ROWS, COLUMNS]."""
        counted = torch.zeros(ROWS * COLUMNS)
        logits = model.logits

        def counting(prediction, cells=None):
            if cells is not None:
                counted.scatter_add_(0, cells.flatten(), torch.ones(cells.numel()))
            return logits(prediction, cells)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "logits", counting)
            pair_loss(
                model, StepLoss(model.tokenizer, None, LossWeights(cells=0.34, **weights)), view, target, 0.0
            )
        return counted.view(ROWS, COLUMNS) / len(target)

    torch.manual_seed(0)
    even = seen(plain, disoccluded=1000.0, magnified=1000.0)
    assert even.max() < 0.8, "all cells alike"
    new, magnified = channels.clone(), channels.clone()
    new[:, 0][special], magnified[:, 2][special] = 0.0, -0.75  # 2**(2 * -0.75) = 0.35 source cells
    assert seen(replace(view, channels=new), disoccluded=1000.0)[0].min() > 0.95
    assert seen(replace(view, channels=magnified), magnified=1000.0)[0].min() > 0.95
    assert seen(replace(view, channels=magnified), disoccluded=1000.0)[0].max() < 0.8
