"""The offline perceptual distance."""

import pytest
import torch

from metrics import frechet_distance, perceptual
from metrics.perceptual import EFFNET, EffNetDistance, perceptual_distance
from runtime.config import SettingError


@pytest.fixture(scope="module")
def distance() -> EffNetDistance:
    return EffNetDistance()


@pytest.fixture
def pictures() -> torch.Tensor:
    """Two smooth pictures [2, 3, 32, 48]."""
    small = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (32, 48), mode="bilinear")


@torch.no_grad()
def test_equal_pictures_have_no_distance(distance, pictures):
    assert distance(pictures, pictures).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_distance_is_symmetric_and_per_picture(distance, pictures):
    other = pictures.flip(-1)
    there, back = distance(pictures, other), distance(other, pictures)
    assert there.shape == (2,) and (there > 0).all()
    torch.testing.assert_close(there, back)
    torch.testing.assert_close(there[1:], distance(pictures[1:], other[1:]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_distance_grows_with_distortion(distance, kind):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 32, 48, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)

    def distort(amount: int) -> torch.Tensor:
        if kind == "noise":
            return (pictures + 0.05 * amount * noise).clamp(0, 1)
        size = 2 * amount + 1
        return torch.nn.functional.avg_pool2d(pictures, size, 1, amount, count_include_pad=False)

    values = [distance(pictures, distort(amount)).mean().item() for amount in (1, 2, 4)]
    assert 0 < values[0] < values[1] < values[2]


def test_gradients_reach_the_picture_and_not_the_weights(distance, pictures):
    other = pictures.flip(-1).requires_grad_()
    distance(other, pictures).mean().backward()
    assert other.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())
    step = other.detach() - 0.01 * other.grad / other.grad.abs().max()
    with torch.no_grad():
        closer = distance(step.clamp(0, 1), pictures).mean()
        assert closer < distance(other, pictures).mean(), "a gradient step reduces the distance"


@torch.no_grad()
def test_features_are_of_five_depths(distance, pictures):
    sizes = [(f.shape[1], f.shape[2]) for f in distance.features(pictures)]
    assert len(sizes) == len(distance.BLOCKS)
    channels, rows = zip(*sizes, strict=True)
    assert list(channels) == sorted(channels) and channels[0] < channels[-1], "more channels ..."
    assert list(rows) == sorted(rows, reverse=True) and rows[0] > rows[-1], "... at fewer positions"
    assert all(f.abs().sum() > 0 for f in distance.features(pictures))


@torch.no_grad()
def test_embeddings_are_per_picture(distance, pictures):
    found = distance.embedding(pictures)
    assert found.shape == (2, 112) and found.dtype == torch.float32
    torch.testing.assert_close(distance.embedding(pictures[1:]), found[1:])
    assert (found[0] - found[1]).abs().max() > 0.01, "different pictures have different embeddings"


@torch.no_grad()
def test_frechet_distance_of_embeddings_separates_kinds_of_pictures(distance):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(60, 3, 32, 48, generator=generator)
    flat = torch.rand(30, 3, 1, 1, generator=generator).expand(30, 3, 32, 48)
    one, other, plain = (distance.embedding(p) for p in (noise[:30], noise[30:], flat))
    alike = frechet_distance(one, other)
    assert 0 < 10 * alike < frechet_distance(one, plain)


@torch.no_grad()
def test_structure_matters_more_than_squared_error(distance):
    """A change of brightness and noise of the same squared error: only the noise looks different."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 3, 8, 12, generator=generator) * 0.5 + 0.2
    picture = torch.nn.functional.interpolate(small, (64, 96), mode="bilinear")
    noise = 0.08 * torch.randn(picture.shape, generator=generator).sign()
    assert distance(picture + 0.08, picture).max() < 0.5 * distance(picture + noise, picture).min()


def test_it_stays_in_eval_mode(distance):
    assert not distance.train().training
    assert not any(m.training for m in distance.modules())


def test_the_distance_is_named_and_other_names_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(perceptual, "lpips_available", lambda: False)
    assert perceptual_distance("auto").name == EFFNET == "effnet-lite0"
    assert "effnet-lite0" in capsys.readouterr().out
    with pytest.raises(SettingError, match="vgg.*expected auto, lpips-alex or effnet-lite0"):
        perceptual_distance("vgg")
