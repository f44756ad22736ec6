"""The geometry world model, on the clips that ship, with the tokenizer that ships."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.token_files import SAMPLE_TOKENS
from dataset.windows import TokenClips
from geometry import camera
from geometry.motion import displacement_between
from metrics import psnr, token_accuracy
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig, sample_tokens
from rollout.world_model import load_world_model, world_content
from runtime import checkpoint
from training.geometry_window import geometry_window_loss
from training.motion_pretraining import pretrain_motion
from training.window_parts import InputConfig, LossWeights, StepLoss, corrupt_tokens
from vq_vae.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

CONFIG = GeometryConfig(1024, channels=16, coarse_channels=16, motion_dim=8, keyframes=4)
GREEDY = SamplingConfig(greedy=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_TOKENIZER)


@pytest.fixture(scope="module")
def recording():
    """Windows of 9 frames of the clips that ship: tokens [N, 9, H, W], actions [N, 8, 5], pose [N, 9, 5]."""
    clips = TokenClips(SAMPLE_TOKENS, "all")
    windows = np.array([(c, s) for c in range(len(clips.tokens)) for s in (10, 30)])[:6]
    return clips.batch(windows, 9)


def untrained(tokenizer, **changes) -> GeometryWorldModel:
    torch.manual_seed(0)
    model = GeometryWorldModel(replace(CONFIG, **changes), tokenizer).eval()
    model.init_from_codebook()
    return model


def step(model: GeometryWorldModel, tokens, actions, state=None, **inputs):
    """One frame -> logits [B, V, H, W] and the new state."""
    state = model.init_state(len(tokens)) if state is None else state
    prediction, state = model.predict(tokens, actions, state, **inputs)
    return model.logits(prediction), state


@torch.inference_mode()
def test_untrained_model_is_the_geometry_warped_copy(tokenizer, recording):
    tokens, actions, pose = recording
    model = untrained(tokenizer)
    state = model.init_state(len(tokens))
    state.pose = pose[:, 0]
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], state, true_next_pose=pose[:, 1])
    made = model.logits(prediction).argmax(1)
    before, truth = (tokenizer.decode(tokens[:, t]).clamp(0, 1) for t in (0, 1))
    ground = camera.ground_plane(pose[:, 1], 72, 128, 70.0, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE)
    grid, _ = camera.reproject(pose[:, 0], pose[:, 1], ground, 72, 128, 70.0)
    warped = camera.warp(before, grid)
    copied = tokenizer.encode(warped)
    moving = prediction.z[0].isfinite().all() and (actions[:, 0] != 0).any(1)
    assert moving.any()
    assert token_accuracy(made, copied)[moving].mean() > 0.6
    # What is drawn, through the tokenizer, is as near to the truth as the warped copy through the tokenizer.
    ours, copy = (psnr(tokenizer.decode(t).clamp(0, 1), truth) for t in (made, copied))
    assert (ours - copy).mean() > -0.3
    assert (token_accuracy(made, tokens[:, 1]) - token_accuracy(copied, tokens[:, 1])).mean() > -0.01


@torch.inference_mode()
def test_untrained_model_stands_still_and_comes_back_to_the_same_view(tokenizer, recording):
    tokens, _, _ = recording
    rollout = Rollout(untrained(tokenizer, keyframes=32), GREEDY)
    rollout.prime(tokens[:2, :1], torch.zeros(2, 0, 5))
    for _ in range(3):
        assert torch.equal(rollout.step(torch.zeros(2, 5)), tokens[:2, 0])
    turn = torch.zeros(2, 5)
    turn[:, 0] = torch.tensor([0.4, -0.4])  # 6 degrees
    for _ in range(15):
        rollout.step(turn)
    assert token_accuracy(rollout.tokens, tokens[:2, 0]).max() < 0.5
    for _ in range(15):
        rollout.step(-turn)
    assert token_accuracy(rollout.tokens, tokens[:2, 0]).min() > 0.95
    forgetful = Rollout(untrained(tokenizer, keyframes=0), GREEDY)
    forgetful.prime(tokens[:2, :1], torch.zeros(2, 0, 5))
    forgetful.run(torch.stack([turn] * 15 + [-turn] * 15, 1))
    assert token_accuracy(forgetful.tokens, tokens[:2, 0]).max() < 0.5, "without keyframes it is gone"


def test_poses_follow_the_convention_of_minecraft(tokenizer):
    model = untrained(tokenizer)
    pose = torch.tensor([[0.0, 0.0, 0.0, 0.0, 80.0]])
    turn = torch.tensor([[6.0 / 15, 1.0, 0.0, 1.0, 0.0]])
    moved = torch.tensor([[1.0, 0.5, 2.0]])
    after = model.next_pose(pose, turn, moved)
    yaw = np.radians(6.0)
    right, forward = np.array([-np.cos(yaw), -np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    np.testing.assert_allclose(after[0, [0, 2]], right + 2 * forward, rtol=1e-5)
    assert after[0, 1] == 0.5 and after[0, 3].item() == pytest.approx(6.0) and after[0, 4] == 90.0
    torch.testing.assert_close(displacement_between(pose, after), moved)


@torch.inference_mode()
@pytest.mark.parametrize("switch", ["prior", "keyframes"])
def test_switches_change_the_prediction(tokenizer, recording, switch):
    tokens, actions, pose = recording

    def logits_of(**changes) -> torch.Tensor:
        model = untrained(tokenizer, **changes)
        for part in (
            model.out_proj,
            model.depth_head[-1],
            model.output_block[-1],
        ):  # so that all parts matter
            torch.nn.init.normal_(part.weight, std=0.05)
        state = model.init_state(len(tokens))
        for t in range(3):
            known = pose[:, t] if t < 2 else None
            logits, state = step(model, tokens[:, t], actions[:, t], state, observed=t < 2, true_pose=known)
        return logits

    off = logits_of(**{switch: 0 if switch == "keyframes" else False})
    assert not torch.allclose(logits_of(), off, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize(
    "part", ["depth", "displacement", "rotation", "hidden state", "coarse levels", "pitch", "level"]
)
def test_each_input_and_part_matters(tokenizer, recording, part):
    """Takes one thing away from the second step, and the logits change."""
    tokens, actions, pose = recording
    model = untrained(tokenizer)
    for layer in (model.out_proj, model.depth_head[-1], model.output_block[-1]):
        torch.nn.init.normal_(layer.weight, std=0.05)
    _, state = step(model, tokens[:, 0], actions[:, 0], true_pose=pose[:, 0])

    def logits_of(**inputs) -> torch.Tensor:
        inputs = {"actions": actions[:, 1], "state": state, "true_next_pose": pose[:, 2], **inputs}
        return step(model, tokens[:, 1], inputs.pop("actions"), inputs.pop("state"), **inputs)[0]

    whole, moved = logits_of(), pose[:, 2].clone()
    if part == "depth":
        torch.nn.init.zeros_(model.depth_head[-1].weight)
        without = logits_of()
    elif part == "displacement":
        moved[:, :3] += 1.0
        without = logits_of(true_next_pose=moved)
    elif part == "rotation":
        moved[:, 3] += 5.0
        without = logits_of(true_next_pose=moved)
    elif part == "pitch":
        moved[:, 4] += 5.0
        without = logits_of(true_next_pose=moved)
    elif part == "hidden state":
        without = logits_of(state=replace(state, hidden=[torch.zeros_like(h) for h in state.hidden]))
    elif part == "coarse levels":
        torch.nn.init.zeros_(model.up[0].weight)
        without = logits_of()
    else:
        without = logits_of(level=0.5)
    assert not torch.allclose(whole, without, atol=1e-3)


@torch.inference_mode()
def test_logits_of_some_cells_are_those_of_all(tokenizer, recording):
    tokens, actions, _ = recording
    model = untrained(tokenizer)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(len(tokens)))
    cells = torch.randint(18 * 32, (len(tokens), 7))
    some = model.logits(prediction, cells)
    every = model.logits(prediction).flatten(2).mT
    torch.testing.assert_close(
        some, every.gather(1, cells[..., None].expand(-1, -1, 1024)), atol=1e-3, rtol=0
    )
    with torch.enable_grad():
        torch.testing.assert_close(model.logits(prediction), model.logits(prediction).detach())
    with_grad = model.logits(prediction)
    torch.testing.assert_close(with_grad.flatten(2).mT, every, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_magnified_cells_are_sampled_again(tokenizer, recording):
    """Cells with a source scale below `redraw` depend on the noise, the others do not."""
    tokens, actions, pose = recording
    model = untrained(tokenizer)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(len(tokens)))
    prediction.source_scale = torch.ones_like(prediction.source_scale)
    prediction.source_scale[:, :, :10] = 0.4
    prediction.visible_mask = torch.ones_like(prediction.visible_mask)
    noises = torch.rand(2, *tokens[:, 0].shape, generator=torch.Generator().manual_seed(0))

    def changed(sampling: SamplingConfig) -> torch.Tensor:
        one, other = (sample_tokens(model, prediction, sampling, noise) for noise in noises)
        return (one != other).float().mean((0, 1))

    kept = changed(replace(PLAY, redraw=0.3))
    assert (kept == 0).all()
    drawn = changed(replace(PLAY, redraw=0.5))
    assert drawn[:10].mean() > 0.1 and (drawn[10:] == 0).all()
    assert torch.equal(changed(replace(PLAY, redraw=0.0)), kept)


def test_masked_decoding_with_one_pass_is_the_plain_head(tokenizer, recording):
    tokens, actions, _ = recording
    model = untrained(tokenizer)
    torch.nn.init.normal_(model.decoding_block[-1].weight, std=0.3)
    torch.nn.init.normal_(model.out_proj.weight, std=0.1)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(len(tokens)))
    hidden = torch.zeros_like(tokens[:, 1], dtype=torch.bool)
    torch.testing.assert_close(
        model.logits(model.condition_on_tokens(prediction, tokens[:, 1], hidden)), model.logits(prediction)
    )
    some = hidden.clone()
    some[:, ::2] = True
    changed = model.logits(model.condition_on_tokens(prediction, tokens[:, 1], some)) - model.logits(
        prediction
    )
    assert changed.abs().amax() > 0.1

    def generated(passes: int, seed: int = 0) -> torch.Tensor:
        rollout = Rollout(model, SamplingConfig(passes=passes, top_p=0.9), seed)
        rollout.prime(tokens[:, :2], actions[:, :1])
        return rollout.step(torch.tensor([[0.8, 0.0, 0.0, 0.0, 0.0]]).expand(len(tokens), -1))

    assert torch.equal(generated(3), generated(3)) and not torch.equal(generated(1), generated(3))


def test_checkpoint_round_trip(tokenizer, recording, tmp_path):
    tokens, actions, _ = recording
    model = untrained(tokenizer)
    torch.nn.init.normal_(model.out_proj.weight, std=0.1)
    checkpoint.save(tmp_path / "world.pt", world_content(model))
    again, content = load_world_model(tmp_path / "world.pt", tokenizer)
    assert content["architecture"] == "geometry"
    with torch.inference_mode():
        a, b = (step(m, tokens[:, 0], actions[:, 0])[0] for m in (model, again))
    assert torch.equal(a, b)
    content["architecture"] = "other"
    checkpoint.save(tmp_path / "world.pt", content)
    with pytest.raises(checkpoint.CheckpointError, match="architecture 'other', this version knows"):
        load_world_model(tmp_path / "world.pt", tokenizer)


# ---------------------------------------------------------------- training


def loss_of(model, tokenizer, recording, weights: LossWeights, feeding: InputConfig, seed: int = 0):
    torch.manual_seed(seed)
    return geometry_window_loss(model, StepLoss(tokenizer, None, weights), *recording, feeding)


def test_every_part_is_trained(tokenizer, recording):
    model = untrained(tokenizer).train()
    for part in (
        model.out_proj,
        model.depth_head[-1],
        model.decoding_block[-1],
        model.motion_model.collision_head[-1],
    ):
        torch.nn.init.normal_(part.weight, std=0.05)
    weights = LossWeights(reprojection=1.0, smoothness=0.1, motion=1.0, disoccluded=3.0, cells=0.5)
    result = loss_of(
        model, tokenizer, recording, weights, InputConfig(4, 0.0, GREEDY, 0.2, masked_decoding=0.5)
    )
    assert set(result.terms) == {"ce", "reprojection", "smoothness", "motion"}
    assert result.loss.item() == pytest.approx(sum(result.terms.values()).item(), rel=1e-4)
    assert result.self_fed.any() and not result.self_fed[:4].any()
    result.loss.backward()
    for name, parameter in model.named_parameters():
        if "motion_gru" in name or "motion_head" in name:  # learnt beforehand
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in tokenizer.vqvae.parameters())


def test_depth_is_learnt_by_reprojection_alone(tokenizer, recording):
    """Gradient descent on the reprojection term makes it smaller, and reaches the depth head."""
    model = untrained(tokenizer).train()
    weights = LossWeights(ce=1e-9, reprojection=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    tokens, actions, pose = recording
    short = tokens[:3, :5], actions[:3, :4], pose[:3, :5]
    errors = []
    for _ in range(10):
        result = loss_of(model, tokenizer, short, weights, InputConfig())
        errors.append(result.terms["reprojection"].item())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert errors[-1] < 0.97 * errors[0]
    assert model.depth_head[-1].weight.abs().max() > 0


def test_the_displacement_is_learnt_from_poses_and_missing_ones_are_left_out(tokenizer, recording):
    tokens, actions, pose = recording
    weights = LossWeights(ce=0.0, motion=1.0)
    whole = loss_of(untrained(tokenizer), tokenizer, recording, weights, InputConfig())
    assert whole.terms["motion"] > 0
    unknown = tokens, actions, torch.full_like(pose, torch.nan)
    none = loss_of(untrained(tokenizer), tokenizer, unknown, weights, InputConfig())
    assert none.terms["motion"] == 0 and none.loss.isfinite()


def test_motion_pretraining_learns_from_actions_and_poses_alone(tokenizer):
    """A player who walks 0.1 m a frame, half as fast backwards, and not at all into a wall on the left."""
    model, rng = untrained(tokenizer), np.random.default_rng(0)
    poses, actions = [], []
    for _ in range(4):
        keys = np.repeat(rng.integers(-1, 2, (20, 2)), 5, 0)
        action = np.zeros((100, 5), np.float32)
        action[:, 2:4] = keys
        action[:, 0] = rng.uniform(-0.5, 0.5, 100)
        pose = [torch.zeros(1, 5)]
        for now in torch.from_numpy(action):
            right, forward = 0.1 * max(now[2], 0), 0.1 * now[3] * (0.5 if now[3] < 0 else 1)
            moved = torch.tensor([[float(right), 0.0, float(forward)]])
            pose.append(model.next_pose(pose[-1], now[None], moved))
        poses.append(torch.cat(pose).numpy())
        actions.append(action)
    clips = SimpleNamespace(pose=poses, actions=actions)
    before = pretrain_motion(model, clips, 1, seed=0)
    after = pretrain_motion(model, clips, 250, seed=0)
    assert before > 0.1 and after < 0.03
    assert np.isnan(
        pretrain_motion(model, SimpleNamespace(pose=[poses[0] * np.nan], actions=actions), 5, seed=0)
    )
    assert np.isnan(pretrain_motion(model, clips, 0, seed=0))


def test_corruption_stays_below_its_level_and_returns_it(tokenizer):
    torch.manual_seed(0)
    tokens = torch.full((64, 3, 18, 32), 5)
    similar = untrained(tokenizer).code_space.similar_codes(16)
    shown, level = corrupt_tokens(tokens, 1024, 0.4, 0.5, similar, 1.0)
    share = (shown != tokens).float().mean((1, 2, 3))
    torch.testing.assert_close(share, level, atol=0.05, rtol=0)
    assert 0.3 < (level == 0).float().mean() < 0.7 and level.max() <= 0.4
    assert set(shown.unique().tolist()) <= {5, *similar[5].tolist()}
    untouched, none = corrupt_tokens(tokens, 1024, 0.0, 0.5, similar, 1.0)
    assert untouched is tokens and none.max() == 0
