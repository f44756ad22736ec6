"""Token metrics on grids whose values are known."""

import math

import pytest
import torch

from metrics import bits_per_token, code_usage, codes_ratio, flip_rate, token_accuracy, unique_codes


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


def test_flip_rate():
    grid = torch.arange(12).view(1, 3, 4)
    changed = grid.clone()
    changed[0, 0, :3] = 99
    assert flip_rate(grid.expand(3, 3, 4), torch.cat([grid, changed, grid + 20])).tolist() == [
        0.0,
        pytest.approx(0.25),
        1.0,
    ]


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
    assert used == 3 and 1 < perplexity < 2, "rarely used codes have little weight"
