"""The depth network: shapes, the pitch, and what one position sees."""

import pytest
import torch

from depth.depth_net import DepthConfig, DepthNet
from geometry import camera

TINY = DepthConfig(16, 32, channels=(4, 8, 8, 8), heads=2)


def tiny_net(seed: int = 0) -> DepthNet:
    torch.manual_seed(seed)
    return DepthNet(TINY).eval()


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(72, 128), (16, 32), (18, 30)])
def test_half_of_each_side(height, width):
    net = DepthNet(DepthConfig(height, width, channels=(4, 8, 8, 8), heads=2)).eval()
    log_inverse, log_error = net(torch.rand(2, 3, height, width), torch.tensor([0.0, 20.0]))
    assert log_inverse.shape == log_error.shape == (2, height // 2, width // 2) == (2, *net.config.size)
    assert log_inverse.dtype == torch.float32 and log_inverse.isfinite().all()


def test_size_of_the_shipped_configuration():
    count = sum(p.numel() for p in DepthNet(DepthConfig()).parameters())
    assert 0.75e6 < count < 1.5e6


@torch.no_grad()
def test_the_untrained_network_predicts_about_the_ground():
    net = tiny_net()
    pitch = torch.tensor([0.0, 30.0])
    pose = torch.zeros(2, 5)
    pose[:, 4] = pitch
    ground = camera.ground_plane(pose, *TINY.size, TINY.vertical_fov_degrees).log()
    torch.testing.assert_close(net.ground(pitch), ground)
    assert (net(torch.rand(2, 3, 16, 32), pitch)[0] - ground).abs().mean() < 0.2


@torch.no_grad()
def test_pitch_may_be_unknown():
    net, pictures = tiny_net(), torch.rand(3, 3, 16, 32)
    nothing = net(pictures)[0]
    torch.testing.assert_close(net(pictures, torch.full((3,), torch.nan))[0], nothing)
    mixed = net(pictures, torch.tensor([10.0, torch.nan, 0.0]))[0]
    torch.testing.assert_close(mixed[1], nothing[1])
    assert not torch.allclose(mixed[0], nothing[0])
    assert not torch.equal(mixed[2], nothing[2]), "a pitch of 0 is something else than an unknown one"


def test_each_position_sees_the_whole_picture():
    net = DepthNet(DepthConfig(channels=(4, 8, 8, 8), heads=2)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    pictures = torch.rand(1, 3, 72, 128, requires_grad=True)
    net(pictures)[0][0, 0, 0].backward()
    assert pictures.grad[0, :, -8:, -8:].abs().max() > 0


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 16\].*\[3, 16, 32\]"):
        tiny_net()(torch.rand(1, 3, 32, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"height": 71}, "128x71.*divisible by 2"),
        ({"blocks": (1, 1)}, "channels of 4 levels, blocks of 2"),
        ({"heads": 3}, "128 channels cannot be split over 3 heads"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        DepthConfig(**change)
