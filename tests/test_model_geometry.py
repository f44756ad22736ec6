"""The geometry world model, on the clips that ship, with the tokenizer that ships."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataset.token_files import SAMPLE_TOKENS
from dataset.windows import TokenClips
from depth.depth_net import DepthConfig, DepthNet
from depth.predictor import DEPTH_KIND, DepthPredictor, load_depth
from geometry import camera
from geometry.keyframes import REFINE_BELOW
from geometry.motion import displacement_between
from geometry.warping import RESAMPLED
from metrics import token_accuracy
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig, sample_tokens
from rollout.world_model import load_world_model, world_content
from runtime import checkpoint
from training import geometry_window
from training.geometry_window import geometry_window_loss
from training.window_parts import InputConfig, LossWeights, StepLoss, corrupt_tokens
from vq_vae.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

CONFIG = GeometryConfig(1024, channels=16, coarse_channels=16, keyframes=4)
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


@pytest.fixture(scope="module")
def depth():
    return load_depth()


def untrained(tokenizer, depth=None, **changes) -> GeometryWorldModel:
    """`depth`: the network that ships, if it is not given."""
    torch.manual_seed(0)
    model = GeometryWorldModel(replace(CONFIG, **changes), tokenizer, depth or load_depth()).eval()
    model.init_from_codebook()
    return model


def wake(model: GeometryWorldModel) -> GeometryWorldModel:
    """Gives random weights to what starts at zero, so that all parts matter."""
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.startswith("motion_model"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model: GeometryWorldModel, tokens, actions, state=None, **inputs):
    """One frame -> logits [B, V, H, W] and the new state."""
    state = model.init_state(len(tokens)) if state is None else state
    prediction, state = model.predict(tokens, actions, state, **inputs)
    return model.logits(prediction), state


@torch.inference_mode()
def test_untrained_model_is_the_composed_view(tokenizer, recording):
    tokens, actions, pose = recording
    model = untrained(tokenizer)
    state = model.init_state(len(tokens))
    state.pose = pose[:, 0]
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], state, true_next_pose=pose[:, 1])
    made = model.logits(prediction).argmax(1)
    moving = (actions[:, 0] != 0).any(1)
    assert moving.any()
    copied = tokenizer.encode(prediction.view.picture)
    shown = (prediction.visible_mask > 0.5) & moving[:, None, None]
    assert (made == copied)[shown].float().mean() > 0.6
    # What is drawn there is about as near to the truth as the last frame warped over a flat ground.
    before, truth = (tokenizer.decode(tokens[:, t]).clamp(0, 1) for t in (0, 1))
    ground = camera.ground_plane(pose[:, 1], 72, 128, 70.0, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE)
    grid, _ = camera.reproject(pose[:, 0], pose[:, 1], ground, 72, 128, 70.0)
    flat = tokenizer.encode(camera.warp(before, grid))
    pixels = shown.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(truth)
    ours, copy = ((tokenizer.decode(t).clamp(0, 1) - truth)[pixels].square().mean() for t in (made, flat))
    assert ours < 1.05 * copy
    ours, copy = ((t == tokens[:, 1])[shown].float().mean() for t in (made, flat))
    assert ours > copy - 0.01


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
        model = wake(untrained(tokenizer, **changes))
        state = model.init_state(len(tokens))
        for t in range(3):
            known = pose[:, t] if t < 2 else None
            logits, state = step(model, tokens[:, t], actions[:, t], state, observed=t < 2, true_pose=known)
        return logits

    off = logits_of(**{switch: 0 if switch == "keyframes" else False})
    assert not torch.allclose(logits_of(), off, atol=1e-3)


PARTS = [
    "depth", "displacement", "rotation", "hidden state", "coarse levels", "attention",
    "pitch", "level", "observed",
]  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("part", PARTS)
def test_each_input_and_part_matters(tokenizer, recording, part):
    """Takes one thing away from the second step, and the logits change."""
    tokens, actions, pose = (x[:3] for x in recording)
    model = wake(untrained(tokenizer))
    _, state = step(model, tokens[:, 0], actions[:, 0], true_pose=pose[:, 0])

    def logits_of(**inputs) -> torch.Tensor:
        inputs = {"actions": actions[:, 1], "state": state, "true_next_pose": pose[:, 2], **inputs}
        return step(model, tokens[:, 1], inputs.pop("actions"), inputs.pop("state"), **inputs)[0]

    whole, moved = logits_of(), pose[:, 2].clone()
    torch.testing.assert_close(logits_of(), whole)
    if part == "depth":
        without = logits_of(inverse_ray_distance=torch.full((3, 36, 64), 0.2))
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
    elif part == "attention":
        torch.nn.init.zeros_(model.blocks[0][1].output.weight)
        without = logits_of()
    elif part == "observed":
        without = logits_of(observed=False)
    else:
        without = logits_of(level=0.5)
    assert not torch.allclose(whole, without, atol=1e-3)


# ---------------------------------------------------------------- depth


class KnownDepth(DepthPredictor):
    """A DepthPredictor without a network: the same inverse ray distance in all pixels."""

    config = DepthConfig(36, 64, (4,), (0,), heads=2)

    def __init__(self, inverse: float):
        self.inverse, self.seen = inverse, []

    def predict(self, pictures, pitch=None):
        self.seen.append((pictures, pitch))
        return torch.full((len(pictures), *self.config.size), self.inverse)


def test_depth_network_sees_the_picture_in_its_own_size(tokenizer):
    depth = KnownDepth(0.1)
    model = untrained(tokenizer, depth=depth)
    picture, pitch = torch.linspace(-0.5, 1.5, 128).expand(1, 3, 72, 128), torch.tensor([7.0])
    found = model.predict_depth(picture, pitch)
    (given, angle), size = depth.seen[0], (depth.config.height, depth.config.width)
    assert given.shape == (1, 3, *size) and torch.equal(angle, pitch)
    assert given.min() == 0 and given.max() == 1, "clamped"
    torch.testing.assert_close(
        given[0, 0, 0, 20:44], torch.linspace(-0.5, 1.5, 128).view(64, 2).mean(1)[20:44]
    )
    torch.testing.assert_close(found, torch.full((1, 36, 64), 0.1)), "the model's grid"


# ---------------------------------------------------------------- memory


@torch.inference_mode()
def test_generated_frames_become_keyframes_when_they_are_announced(tokenizer, recording):
    """Turning by 3 degrees a step: a keyframe at the first frame, then one past every 8 degrees."""
    tokens = recording[0][:1, 0]
    model = untrained(tokenizer, keyframes=8)
    state, announced, counts = model.init_state(1), [], []
    turn = torch.tensor([[0.2, 0.0, 0.0, 0.0, 0.0]])
    for t in range(8):
        prediction, state = model.predict(tokens, turn, state, observed=t == 0)
        announced.append(prediction.keyframe_due.item())
        counts.append(int((state.keyframes.order > 0).sum()))
    # The frame at 9 degrees is announced in step 2, where it is predicted, and written in step 3.
    assert announced == [False, False, True, False, False, True, False, False]
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]
    assert state.keyframes.generation[0, :3].tolist() == [0, 1, 2]
    torch.testing.assert_close(state.keyframes.pose[0, :3, 3], torch.tensor([0.0, 9.0, 18.0]))


@torch.inference_mode()
def test_generations_have_a_limit(tokenizer, recording):
    tokens = recording[0][:1, 0]
    model = untrained(tokenizer, keyframes=8)
    state, turn = model.init_state(1), torch.tensor([[0.8, 0.0, 0.0, 0.0, 0.0]])
    for t in range(8):
        _, state = model.predict(tokens, turn, state, observed=t == 0)
    assert state.keyframes.generation[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


# ---------------------------------------------------------------- the network


@torch.inference_mode()
def test_prediction_from_a_view_is_that_of_an_empty_state(tokenizer, recording, monkeypatch):
    """What pairs train is what a rollout does in its first step."""
    tokens, actions, pose = recording
    model, seen = wake(untrained(tokenizer)), []
    encode_view = model.encode_view
    monkeypatch.setattr(model, "encode_view", lambda *given: seen.append(encode_view(*given)) or seen[-1])
    state = model.init_state(len(tokens))
    whole, _ = model.predict(
        tokens[:, 0], actions[:, 0], state, true_pose=pose[:, 0], true_next_pose=pose[:, 1], level=0.1
    )
    alone = model.predict_from_view(seen[0])
    torch.testing.assert_close(alone.features, whole.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(alone), model.logits(whole), atol=1e-2, rtol=1e-3)
    resolution = whole.view.resolution.clamp(1 / 8, 2)
    torch.testing.assert_close(alone.resolution, resolution, atol=1e-4, rtol=1e-4)
    assert torch.equal(alone.visible_mask, whole.visible_mask) and alone.keyframe_due.all()


@torch.inference_mode()
def test_gate_depends_on_visibility_magnification_and_trust(tokenizer):
    model = untrained(tokenizer)
    model.gate_bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    visible = torch.tensor([0.0, 0.5, 0.6, 1.0, 1.0, 1.0, 1.0])
    scale = torch.tensor([1.0, 0.5, 1.0, 1.0, 4.0, 0.5, 0.01])  # 0.01 counts as 1/8
    softplus = torch.nn.functional.softplus
    gate = model.gate(torch.full((7,), 0.1), visible, scale)
    torch.testing.assert_close(gate, softplus(torch.tensor([-1.9, -1.9, 1.1, 1.1, 1.1, 0.6, -0.4])))
    trusted = model.gate(torch.full((7,), 0.1), visible, scale, trust=3.0)
    torch.testing.assert_close(trusted, softplus(torch.tensor([-1.9, -1.9, 4.1, 4.1, 4.1, 3.6, 2.6])))


@torch.inference_mode()
def test_given_tokens_are_seen_in_the_whole_grid(tokenizer, recording):
    """Not only by their neighbours: a disoccluded region agrees with itself."""
    tokens, actions, _ = (x[:1] for x in recording)
    model = untrained(tokenizer)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(1))
    given = torch.zeros(1, 18, 32, dtype=torch.bool)
    given[:, :3, :3] = True
    same = model.condition_on_tokens(prediction, tokens[:, 1], given)
    torch.testing.assert_close(same.features, prediction.features), "it starts as the identity"
    changed = model_features = wake(model).condition_on_tokens(prediction, tokens[:, 1], given).features
    other = model.condition_on_tokens(prediction, (tokens[:, 1] + 1) % 1024, given).features
    assert (model_features - other)[..., -1, -1].abs().max() > 1e-4
    assert not torch.equal(changed, prediction.features)


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
def test_cells_of_low_resolution_are_refined_when_the_frame_becomes_a_keyframe(tokenizer, recording):
    """They then depend on the noise, and are sharp; the others never do, and keep their resolution."""
    tokens, actions, _ = (x[:2] for x in recording)
    model = untrained(tokenizer)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(2))
    prediction.visible_mask = torch.ones_like(prediction.visible_mask)
    prediction.keyframe_due = torch.tensor([True, False])
    noises = torch.rand(2, *tokens[:, 0].shape, generator=torch.Generator().manual_seed(0))

    def changed(resolution: float, passes: int = 1) -> torch.Tensor:
        """[2, 18, 32]: where other noise gives another token, with this resolution in the upper rows."""
        prediction.resolution = torch.ones_like(prediction.resolution)
        prediction.resolution[:, :10] = resolution
        sampling = replace(PLAY, passes=passes)
        one, other = (sample_tokens(model, prediction, sampling, noise) for noise in noises)
        return (one != other).float()

    for passes in (1, 4):
        drawn = changed(REFINE_BELOW - 0.01, passes)
        assert drawn[0, :10].mean() > 0.3 and not drawn[0, 10:].any()
        assert not drawn[1].any(), "this frame does not become a keyframe"
    after = prediction.resolution_after(exact=torch.zeros_like(prediction.resolution))
    assert (after[0, :10] == 1).all() and (after[0, 10:] == RESAMPLED).all()
    torch.testing.assert_close(
        after[1, :10], torch.full_like(after[1, :10], RESAMPLED * (REFINE_BELOW - 0.01))
    )
    assert (prediction.resolution_after(torch.ones_like(after))[1, 10:] == 1).all(), "not resampled"
    assert not changed(REFINE_BELOW + 0.01).any(), "not so much magnified"


@torch.inference_mode()
def test_before_an_obstacle_that_is_near_keyframes_are_closer_together(tokenizer, recording):
    """The player walks 0.2 m a step towards a wall. Resolution is lost over all steps since the recorded
    frame, however little a single one magnifies, and is back after a keyframe."""
    tokens = recording[0][:1, 0]
    model, walk = untrained(tokenizer, keyframes=8), torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])

    def keyframes_of_steps(metres: float) -> tuple[list[int], list[float]]:
        """Steps whose frame becomes a keyframe, and the resolution in the middle after each step."""
        due, resolution, state = [], [], model.init_state(1)
        for t in range(7):
            pose = state.pose + torch.tensor([[0.0, 0.0, 0.2, 0.0, 0.0]])
            wall = torch.full((1, 36, 64), 1 / (metres - 0.2 * t))
            prediction, state = model.predict(
                tokens, walk, state, t == 0, true_next_pose=pose, inverse_ray_distance=wall
            )
            due += [t] * prediction.keyframe_due.item()
            resolution.append(state.resolution[0, 8:10, 14:18].mean().item())
        return due, resolution

    due, resolution = keyframes_of_steps(2.0)
    assert due and 0 not in due and resolution[0] > resolution[1] and resolution[due[0]] == 1
    due, resolution = keyframes_of_steps(20.0)
    assert not due and min(resolution) > REFINE_BELOW


@torch.inference_mode()
def test_frames_between_keyframes_take_few_passes(tokenizer, recording, monkeypatch):
    tokens, actions, _ = (x[:2] for x in recording)
    model = untrained(tokenizer)
    prediction, _ = model.predict(tokens[:, 0], actions[:, 0], model.init_state(2))
    prediction.visible_mask = torch.zeros_like(prediction.visible_mask)
    condition, left = model.condition_on_tokens, []

    def counting(prediction, tokens, given):
        left.append((~given).flatten(1).sum(1).tolist())
        return condition(prediction, tokens, given)

    monkeypatch.setattr(model, "condition_on_tokens", counting)

    def sampled_again(keyframe_due: list[bool], passes: int) -> list[list[int]]:
        """How many cells each further pass samples, in both worlds."""
        left.clear()
        prediction.keyframe_due = torch.tensor(keyframe_due)
        sample_tokens(model, prediction, replace(PLAY, passes=passes), torch.rand(2, 18, 32))
        return list(left)

    shares = [int(18 * 32 * np.cos(np.pi / 8 * p)) for p in (1, 2, 3)]
    half = int(18 * 32 * np.cos(np.pi / 4))
    assert sampled_again([True, True], 4) == [[n, n] for n in shares]
    assert sampled_again([True, False], 4) == [[shares[0], half], [shares[1], 0], [shares[2], 0]]
    assert sampled_again([False, False], 4) == [[half, half]], "and the rest is not computed"
    assert sampled_again([False, False], 1) == []


def test_masked_decoding_with_one_pass_is_the_plain_head(tokenizer, recording):
    tokens, actions, _ = recording
    model = untrained(tokenizer)
    torch.nn.init.normal_(model.conditioning_block.out.weight, std=0.3)
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
    assert content["architecture"] == "geometry" and content["depth"] == model.depth.fingerprint
    assert not any(name.startswith("depth") for name in content["model"]), (
        "the depth network has its own file"
    )
    with torch.inference_mode():
        a, b = (step(m, tokens[:, 0], actions[:, 0])[0] for m in (model, again))
    assert torch.equal(a, b)
    content["architecture"] = "other"
    checkpoint.save(tmp_path / "world.pt", content)
    with pytest.raises(checkpoint.CheckpointError, match="architecture 'other', this version knows"):
        load_world_model(tmp_path / "world.pt", tokenizer)


def test_world_wants_the_depth_network_that_it_was_trained_with(tokenizer, tmp_path):
    torch.manual_seed(0)
    other = DepthNet(DepthConfig(channels=(4, 4), blocks=(0, 0), heads=2))
    checkpoint.save(tmp_path / "depth.pt", checkpoint.content_of(DEPTH_KIND, other))
    model = untrained(tokenizer, depth=load_depth(tmp_path / "depth.pt"))
    checkpoint.save(tmp_path / "world.pt", world_content(model))
    again, _ = load_world_model(tmp_path / "world.pt", tokenizer, depth_ckpt=tmp_path / "depth.pt")
    assert again.depth.fingerprint == model.depth.fingerprint
    with pytest.raises(checkpoint.CheckpointError, match=r"depth\.pt: depth network .* but .*world\.pt was"):
        load_world_model(tmp_path / "world.pt", tokenizer)


# ---------------------------------------------------------------- training


def loss_of(model, tokenizer, recording, weights: LossWeights, feeding: InputConfig, seed: int = 0):
    torch.manual_seed(seed)
    return geometry_window_loss(model, StepLoss(tokenizer, None, weights), *recording, feeding)


def test_every_part_is_trained(tokenizer, recording):
    model = wake(untrained(tokenizer)).train()
    weights = LossWeights(disoccluded=3.0, cells=0.5)
    result = loss_of(
        model, tokenizer, recording, weights, InputConfig(4, 0.0, GREEDY, 0.2, masked_decoding=0.5)
    )
    assert set(result.terms) == {"ce"}
    assert result.loss.item() == pytest.approx(sum(result.terms.values()).item(), rel=1e-4)
    assert result.self_fed.any() and not result.self_fed[:4].any()
    result.loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("motion_model"):  # learnt beforehand
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in tokenizer.vqvae.parameters())
    assert all(p.grad is None for p in model.depth.network.parameters())


def test_camera_of_a_window_follows_the_recorded_poses(tokenizer, recording, monkeypatch):
    """Unknown ones follow from the actions."""
    tokens, actions, pose = (x[:2] for x in recording)
    model, poses = untrained(tokenizer), []
    predict = model.predict

    def recording_predict(*given, **inputs):
        prediction, state = predict(*given, **inputs)
        poses.append(state.pose)
        return prediction, state

    monkeypatch.setattr(model, "predict", recording_predict)
    loss_of(model, tokenizer, (tokens, actions, pose), LossWeights(), InputConfig())
    torch.testing.assert_close(torch.stack(poses, 1), pose[:, 1:])
    poses.clear()
    unknown = pose.clone()
    unknown[1] = torch.nan
    result = loss_of(model, tokenizer, (tokens, actions, unknown), LossWeights(), InputConfig())
    torch.testing.assert_close(torch.stack(poses, 1)[0], pose[0, 1:])
    turned = torch.stack(poses, 1)[1, :, 3]
    torch.testing.assert_close(turned, 15 * actions[1, :, 0].cumsum(0), atol=1e-3, rtol=1e-4)
    assert result.loss.isfinite()


def test_visible_cells_that_show_generated_content_have_no_loss(tokenizer, recording, monkeypatch):
    """The recording shows something else there. Disoccluded cells keep their weight."""
    tokens, actions, pose = (x[:2] for x in recording)
    still = torch.zeros_like(actions), torch.zeros_like(pose)
    model, weights = untrained(tokenizer), []
    terms = geometry_window.token_terms

    def recording_terms(*given):
        weights.append(given[4])
        return terms(*given)

    monkeypatch.setattr(geometry_window, "token_terms", recording_terms)
    feeding = InputConfig(4, 0.0, GREEDY)
    torch.manual_seed(3)
    result = geometry_window_loss(
        model, StepLoss(tokenizer, None, LossWeights(disoccluded=3.0)), tokens, *still, feeding
    )
    assert result.self_fed.any() and all((w == 1).all() for w in weights), "at rest all cells are observed"
    weights.clear()
    turn = still[0].clone()
    turn[:, 3:, 0] = 0.5  # 7.5 degrees to the right in each step from the fourth one on
    yaw = pose.new_zeros(2, 9, 5)
    yaw[:, 4:, 3] = 7.5 * torch.arange(1, 6)
    torch.manual_seed(3)
    result = geometry_window_loss(
        model, StepLoss(tokenizer, None, LossWeights(disoccluded=3.0)), tokens, turn, yaw, feeding
    )
    own = result.self_fed[:, :, None, None]
    weight = torch.stack(weights)
    new = weight == 3
    assert new[3:, :, :, -1].all(), "the right side is disoccluded in each step that turns"
    assert not (weight == 0)[~own.expand_as(weight)].any(), "recorded content always has a loss"
    unseen = weight == 0
    assert unseen[own.expand_as(weight)].any()
    first = result.self_fed & (result.self_fed.cumsum(0) == 1)  # the first self-fed step of each sample
    assert first.any() and not unseen[first][..., :16].any(), "the left side was observed"


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
