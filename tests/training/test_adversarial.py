"""The adversarial loss on sampled frames: what is sampled, where gradients go, and resuming."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_world import GEOMETRY, tiny_depth, write_world

import train
from dataset.windows import TokenClips
from geometry.keyframes import VISIBLE
from metrics.perceptual import EffNetDistance
from model_geometry import GeometryConfig, GeometryWorldModel, Prediction
from rollout.sampling import PLAY
from runtime import checkpoint
from runtime.config import SettingError
from training import adversarial
from training.adversarial import AdversarialLoss, sampled_vectors
from training.diagnostics import SpikeWatch
from training.geometry_window import pair_loss, replace_rows
from training.pair_pool import PairPool
from training.pairs import NO_TARGET, PairConfig
from training.train_config import TrainConfig
from training.window_parts import LossWeights, StepLoss
from vq_vae import discriminator
from vq_vae.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def model(world) -> GeometryWorldModel:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(world / "vqvae.pt")
    t, (rows, columns) = tokenizer.config, tokenizer.config.latent_size
    config = GeometryConfig(t.codebook_size, rows, columns, t.height, t.width, channels=8, coarse_channels=8)
    model = GeometryWorldModel(config, tokenizer, tiny_depth())
    model.init_from_codebook()
    torch.nn.init.normal_(model.out_proj.weight, std=0.1)  # it starts at 0, where no gradient passes
    return model


@pytest.fixture
def small_pictures(monkeypatch) -> None:
    """The pictures of the tiny world are smaller than the least size, and the third feature is."""
    monkeypatch.setattr(EffNetDistance, "least_side", 12)
    for module in (adversarial, discriminator):
        monkeypatch.setattr(module, "LEVELS", 2)


def batch_of(model: GeometryWorldModel, world: Path, seed: int = 3):
    """Inputs and target tokens of 8 pairs."""
    pool = PairPool(model, TokenClips(world, "train"), PairConfig(8, 24, 1, 0.0, 0.0, 0.0, 0.0), seed)
    return pool.next()


def prediction_of(model: GeometryWorldModel, world: Path) -> Prediction:
    """A prediction in which about a third of the cells each is kept, refined and disoccluded."""
    prediction = model.predict_from_view(batch_of(model, world)[0])
    kind = torch.randint(0, 3, prediction.visible_mask.shape, generator=torch.Generator().manual_seed(1))
    return replace(
        prediction,
        visible_mask=(kind < 2).float(),
        resolution=torch.where(kind == 1, 0.3, 1.0),
    )


def test_kept_cells_take_the_likeliest_code_and_the_others_are_sampled(model, world):
    prediction = prediction_of(model, world)
    kept = (prediction.visible_mask > VISIBLE) & ~prediction.refined
    assert 0.1 < kept.float().mean() < 0.6
    codebook = model.tokenizer.codebook
    logits = model.logits(prediction, trust=PLAY.trust * kept)
    counts = torch.zeros(logits.shape)
    for _ in range(300):
        vectors = sampled_vectors(model, prediction).movedim(1, -1)
        codes = torch.cdist(vectors.flatten(0, 2), codebook).argmin(1).view(kept.shape)
        torch.testing.assert_close(codebook[codes], vectors, rtol=1e-4, atol=1e-4)
        assert torch.equal(codes[kept], logits.argmax(1)[kept])
        counts.scatter_add_(1, codes[:, None], torch.ones_like(codes[:, None], dtype=counts.dtype))
    wrong = (counts / 300 - logits.softmax(1)).abs().movedim(1, -1)[~kept]
    assert wrong.max() < 0.15, "samples follow the probabilities"


def test_gradients_reach_the_sampled_cells_alone(model, world):
    prediction = prediction_of(model, world)
    kept = (prediction.visible_mask > VISIBLE) & ~prediction.refined
    features = prediction.features.detach().requires_grad_()
    vectors = sampled_vectors(model, replace(prediction, features=features))
    (vectors * torch.randn(vectors.shape)).sum().backward()
    reached = features.grad.abs().sum(1) > 0
    assert torch.equal(reached, ~kept)


def test_the_discriminator_learns_before_the_world_model_does(model, world, monkeypatch, small_pictures):
    monkeypatch.setattr(adversarial, "WARMUP", 2)
    loss = AdversarialLoss(model.tokenizer, batch=4)
    inputs, target = batch_of(model, world)
    for update in range(4):
        prediction = replace_rows(model.predict_from_view(inputs), slice(0, 4))
        prediction = replace(prediction, visible_mask=torch.zeros_like(prediction.visible_mask))
        value = loss.loss(model, prediction)
        assert value.shape == (4,) and value.requires_grad == (update >= 2)
        if value.requires_grad:
            loss.optimizer.zero_grad()
            value.mean().backward()
            assert all(p.grad is None for p in loss.discriminator.parameters()), "only the world model's"
        before = [p.clone() for p in loss.discriminator.parameters()]
        target[:2] = NO_TARGET  # these are not taken for recorded ones
        loss.update(target)
        after = list(loss.discriminator.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert loss.updates == 4
    assert model.in_proj.weight.grad.abs().sum() > 0


def test_its_share_of_the_loss(model, world, monkeypatch, small_pictures):
    """Its mean over the judged samples is added, however many they are."""
    monkeypatch.setattr(adversarial, "WARMUP", 0)
    step_loss = StepLoss(model.tokenizer, None, LossWeights(adversarial=0.5))
    inputs, target = batch_of(model, world)
    for size in (2, 8):
        loss = AdversarialLoss(model.tokenizer, size)
        monkeypatch.setattr(loss, "loss", lambda model, prediction: 3 * torch.ones(len(prediction.features)))
        result = pair_loss(model, step_loss, inputs, target, 0.0, loss)
        assert result.terms["adversarial"].item() == pytest.approx(1.5)
        assert result.loss.item() == pytest.approx(result.terms["ce"].item() + 1.5, rel=1e-5)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    world, tmp_path, monkeypatch, small_pictures, one_thread
):
    monkeypatch.setattr(adversarial, "WARMUP", 2)

    check = SpikeWatch.check

    def fail_at_7(self, step, *rest):
        if step == 7:
            raise RuntimeError("power failure")
        check(self, step, *rest)

    def run(name: str) -> dict:
        config = TrainConfig(
            **GEOMETRY
            | {"data_dir": str(world), "vqvae_ckpt": str(world / "vqvae.pt")}
            | {"depth_ckpt": str(world / "depth.pt"), "out_dir": str(tmp_path / name)}
            | {"adversarial_weight": 0.5, "adversarial_batch": 2, "lr": 1e-3, "min_lr": 1e-3, "val_steps": 99}
        )
        train.train(config, torch.device("cpu"), torch.float32)
        return checkpoint.load(tmp_path / name / "last.pt")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(SpikeWatch, "check", fail_at_7)
        run("a")
    a, b = run("a"), run("b")
    assert a["discriminator_updates"] == b["discriminator_updates"] == 6
    for group in ("model", "discriminator"):
        for name in a[group]:
            assert torch.equal(a[group][name], b[group][name]), name


def test_pictures_that_are_too_small_are_refused(model):
    with pytest.raises(SettingError, match="16x12.*needs 32 pixels"):
        AdversarialLoss(model.tokenizer, 2)
