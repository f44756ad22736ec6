"""The depth network in use: files, batches, limits."""

from dataclasses import replace

import pytest
import torch
from test_depth_net import TINY, tiny_net

from depth.depth_net import DepthNet
from depth.predictor import BATCH, DEPTH_KIND, DepthPredictor, load_depth
from runtime import checkpoint
from runtime.checkpoint import CheckpointError


def test_a_saved_network_predicts_the_same(tmp_path):
    net = tiny_net()
    checkpoint.save(tmp_path / "depth.pt", checkpoint.content_of(DEPTH_KIND, net))
    predictor = load_depth(tmp_path / "depth.pt")
    assert predictor.config == TINY and predictor.path == tmp_path / "depth.pt"
    pictures, pitch = torch.rand(BATCH + 3, 3, 16, 32), torch.linspace(-30, 30, BATCH + 3)
    inverse, error = predictor.predict_with_error(pictures, pitch)
    assert inverse.shape == error.shape == (BATCH + 3, *TINY.size)
    with torch.no_grad():
        log_inverse, log_error = net(pictures, pitch)
    torch.testing.assert_close(inverse, log_inverse.exp(), atol=1e-2, rtol=2e-2)  # bfloat16 where it is fast
    torch.testing.assert_close(error, log_error.exp(), atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(predictor.predict(pictures, pitch), inverse)
    assert predictor.predict(pictures[:2]).shape == (2, *TINY.size), "also without a pitch"


def test_the_fingerprint_identifies_the_weights(tmp_path):
    checkpoint.save(tmp_path / "depth.pt", checkpoint.content_of(DEPTH_KIND, tiny_net()))
    original = DepthPredictor(tiny_net()).fingerprint
    assert load_depth(tmp_path / "depth.pt").fingerprint == original and len(original) == 16
    changed = tiny_net()
    with torch.no_grad():
        changed.output.bias[0] += 1e-3
    assert DepthPredictor(changed).fingerprint != original
    farther = DepthNet(replace(TINY, farthest_m=200.0))
    farther.load_state_dict(tiny_net().state_dict())
    assert DepthPredictor(farther).fingerprint != original


def test_nothing_is_farther_than_the_sky():
    net = tiny_net()
    with torch.no_grad():
        net.output.bias[0] = -20
    inverse = DepthPredictor(net).predict(torch.rand(1, 3, 16, 32))
    torch.testing.assert_close(inverse, torch.full_like(inverse, 1 / TINY.farthest_m))


def test_files_that_are_no_depth_network(tmp_path):
    with pytest.raises(CheckpointError, match=r"depth\.pt: no such checkpoint"):
        load_depth(tmp_path / "depth.pt")
    checkpoint.save(tmp_path / "other.pt", checkpoint.content_of("vq_vae", tiny_net()))
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of kind 'depth', found 'vq_vae'"):
        load_depth(tmp_path / "other.pt")
