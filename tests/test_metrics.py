"""Each metric against cases whose answer is known without it."""

import math

import numpy as np
import pytest
import torch

from metrics import (
    PSNR_CEILING,
    bits_per_token,
    bootstrap_interval,
    code_usage,
    codes_ratio,
    psnr,
    token_accuracy,
    unique_codes,
)


def test_psnr_of_known_errors():
    black = torch.zeros(3, 3, 4, 4)
    other = torch.stack([torch.full((3, 4, 4), level) for level in (1.0, 0.1, 0.01)])
    assert psnr(black, other).tolist() == pytest.approx([0.0, 20.0, 40.0], abs=1e-4)


def test_psnr_is_of_each_picture_symmetric_and_bounded():
    a, b = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert psnr(a, b).shape == (5,)
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert psnr(a, a).tolist() == pytest.approx([PSNR_CEILING] * 5)
    assert torch.equal(psnr(a[None], b[None])[0], psnr(a, b)), "any leading dimensions"


def test_psnr_falls_as_the_picture_gets_noisier():
    noise = torch.Generator().manual_seed(0)
    a = torch.full((1, 3, 16, 16), 0.5)
    values = [psnr(a, a + torch.randn(a.shape, generator=noise) * s).item() for s in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)


def test_psnr_of_half_precision_pictures_is_computed_in_float32():
    a = torch.full((1, 3, 4, 4), 0.5)
    b = a + 2**-9
    assert psnr(a.half(), b.half()).item() == pytest.approx(psnr(a, b).item())


def test_token_accuracy():
    truth = torch.arange(12).view(1, 3, 4)
    wrong = truth.clone()
    wrong[0, 0] = 99
    assert token_accuracy(torch.cat([truth, wrong, truth + 1]), truth.expand(3, 3, 4)).tolist() == [
        1.0,
        pytest.approx(2 / 3),
        0.0,
    ]


def test_shuffled_tokens_score_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 8, (2, 1, 200, 200), generator=generator).unbind(0)
    assert token_accuracy(a, b).item() == pytest.approx(1 / 8, abs=0.01)


def test_unique_codes_and_their_ratio():
    grids = torch.tensor([[[5, 5], [5, 5]], [[1, 2], [2, 1]], [[4, 3], [2, 1]]])
    assert unique_codes(grids).tolist() == [1, 2, 4]
    assert unique_codes(grids[None]).tolist() == [[1, 2, 4]]
    assert codes_ratio(grids, grids.flip(0)).tolist() == [0.25, 1.0, 4.0]


def test_bits_per_token_of_a_uniform_guess():
    truth = torch.randint(0, 1024, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    nats = torch.nn.functional.cross_entropy(torch.zeros(2, 1024, 6, 6), truth, reduction="sum").item()
    assert bits_per_token(nats, truth.numel()) == pytest.approx(10.0, rel=1e-5)
    assert bits_per_token(0.0, 7) == 0.0
    assert bits_per_token(3 * math.log(2), 3) == pytest.approx(1.0)


def test_code_usage():
    assert code_usage(torch.tensor([7, 0, 0, 0])) == (1, pytest.approx(1.0))
    assert code_usage(torch.tensor([3, 3, 3, 0])) == (3, pytest.approx(3.0))
    used, perplexity = code_usage(torch.tensor([90, 5, 5, 0]))
    assert used == 3 and 1 < perplexity < 2, "rarely used codes count little"


def test_bootstrap_interval_of_clips_that_agree_is_narrow():
    weights = np.array([10.0, 20.0, 30.0])
    assert bootstrap_interval(0.7 * weights, weights, seed=0) == pytest.approx((0.7, 0.7))


def test_bootstrap_interval_is_as_wide_as_theory_says_and_repeats():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(values, np.ones(400), seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == bootstrap_interval(values, np.ones(400), seed=1)
    assert (low, high) != bootstrap_interval(values, np.ones(400), seed=2)


def test_one_clip_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.ones(1), np.ones(1), seed=0))
