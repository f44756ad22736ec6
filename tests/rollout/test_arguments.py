"""rollout/arguments.py: the starts that the flags name, and the sampling config."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from dataset.token_files import DataError
from depth.predictor import SHIPPED_DEPTH
from rollout.arguments import RolloutConfig, add_arguments, config_of
from rollout.context import start_places
from rollout.sampling import PLAY
from rollout.world_model import SHIPPED_WORLD


def config(*flags: str) -> RolloutConfig:
    parser = ArgumentParser()
    add_arguments(parser)
    return config_of(parser.parse_args(flags))


def test_starts_are_start_places_or_files():
    known = start_places()
    assert config().starts == () and config("--start", "all").starts == tuple(known.values())
    name = next(iter(known))
    assert config("--start", name, "a/photo.png", name).starts == (
        known[name],
        Path("a/photo.png"),
        known[name],
    )
    assert config("--context_npz", "a.npz", "b.npz").starts == (Path("a.npz"), Path("b.npz"))
    with pytest.raises(DataError, match=f"nowhere: no such start place; .*{name}"):
        config("--start", "nowhere")
    with pytest.raises(SystemExit):
        config("--start", "a.png", "--context_npz", "b.npz")


def test_files_of_the_world():
    assert (config().checkpoint, config().depth_ckpt) == (SHIPPED_WORLD, SHIPPED_DEPTH)
    given = config("--checkpoint", "a.pt", "--vqvae_ckpt", "b.pt", "--depth_ckpt", "c.pt")
    assert (given.checkpoint, given.vqvae_ckpt, given.depth_ckpt) == (
        Path("a.pt"),
        Path("b.pt"),
        Path("c.pt"),
    )


def test_sampling_flags():
    assert config().sampling == PLAY
    flags = "--greedy --temperature 0.5 --topk 7 --topp 0.8 --trust 1 --passes 3"
    sampling = config(*flags.split()).sampling
    assert (sampling.greedy, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 0.5, 7, 0.8)
    assert (sampling.trust, sampling.passes) == (1, 3)
    with pytest.raises(SystemExit):
        config("--topp", "2")
