"""The model that the settings select."""

import pytest
import torch
from tiny_world import CODES, COLUMNS, ROWS, tiny_depth, tiny_vqvae

from dataset.token_files import Manifest
from model_convGru import ConvGRUWorldModel
from model_geometry import GeometryWorldModel
from runtime.config import SettingError
from training.models import build_model, trained_parameters
from training.train_config import TrainConfig
from vq_vae.tokenizer import Tokenizer

SMALL = {"channels": 8, "coarse_channels": 8, "embed_dim": 8, "hidden_dim": 8, "layers": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_vqvae())


def build(tokenizer: Tokenizer, depth=None, **settings):
    manifest = Manifest(16.0, [ROWS * 4, COLUMNS * 4], [ROWS, COLUMNS], CODES, tokenizer.fingerprint, 50.0)
    manifest.camera_degrees_per_unit = 15.0
    torch.manual_seed(0)
    return build_model(TrainConfig(**SMALL | settings), tokenizer, manifest, depth)


def test_the_geometry_model_takes_its_sizes_from_tokenizer_data_and_settings(tokenizer):
    depth = tiny_depth()
    model = build(tokenizer, depth, keyframes=3, sources=1, prior=False)
    assert isinstance(model, GeometryWorldModel)
    assert model.tokenizer is tokenizer and model.depth is depth
    c = model.config
    assert (c.codebook_size, c.latent_height, c.latent_width) == (CODES, ROWS, COLUMNS)
    assert (c.picture_height, c.picture_width) == (ROWS * 4, COLUMNS * 4)
    assert (c.vertical_fov_degrees, c.degrees_per_unit) == (50.0, 15.0)
    assert (c.channels, c.keyframes, c.sources, c.prior) == (8, 3, 1, False)
    assert model.code_space.codes.any(), "fitted to the codebook"


def test_the_baseline_may_start_from_the_codebook(tokenizer):
    plain, fitted = (build(tokenizer, model="convgru", codebook_init=flag) for flag in (False, True))
    assert isinstance(plain, ConvGRUWorldModel) and (plain.config.hidden_dim, plain.config.layers) == (8, 2)
    assert not torch.equal(plain.head.weight, fitted.head.weight)
    assert torch.equal(plain.in_proj.weight, fitted.in_proj.weight)
    assert not plain.gradient_checkpointing
    assert build(tokenizer, model="convgru", gradient_checkpointing=True).gradient_checkpointing


def test_an_unknown_model_is_refused(tokenizer):
    with pytest.raises(SettingError, match="MODEL=gru: must be geometry or convgru"):
        build(tokenizer, model="gru")


def test_only_the_named_parts_are_trained(tokenizer):
    model = build(tokenizer, tiny_depth())
    every = trained_parameters(model, "")
    assert len(every) == len(list(model.parameters()))
    chosen = trained_parameters(model, "head, gate_bias")
    assert {id(p) for p in chosen} == {id(p) for p in (*model.head.parameters(), model.gate_bias)}
    assert [p.requires_grad for p in model.parameters()].count(True) == 3
    with pytest.raises(SettingError, match="no part 'haed'; the model has .*head"):
        trained_parameters(model, "haed")
