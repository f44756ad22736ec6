"""rollout/code_balance.py: codes stay as frequent as they were recorded."""

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

from model_convGru import ConvGRUWorldModel
from rollout.code_balance import (
    EVEN_SHARE,
    FRAMES,
    MAX_SHIFT,
    NEIGHBOURS,
    CodeBalance,
    frequencies,
    similarity,
)
from rollout.rollout import Rollout
from rollout.sampling import SamplingConfig

CODES = 64


@pytest.fixture
def codebook() -> torch.Tensor:
    return torch.randn(CODES, 4, generator=torch.Generator().manual_seed(0)) * 10


def test_frequencies_are_the_shares_of_each_world():
    tokens = torch.tensor([[[0, 0], [1, 3]], [[2, 2], [2, 2]]])
    assert frequencies(tokens, 4).tolist() == [[0.5, 0.25, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0]]
    assert torch.equal(frequencies(tokens[:, None].expand(-1, 5, -1, -1), 4), frequencies(tokens, 4))


def test_similar_codes_share_their_frequency(codebook):
    similar = similarity(codebook)
    assert torch.allclose(similar.sum(1), torch.ones(CODES))
    order = torch.cdist(codebook, codebook).argsort(1)
    assert torch.equal(similar.argsort(1, descending=True)[:, :NEIGHBOURS], order[:, :NEIGHBOURS])
    assert (similar.argmax(1) == torch.arange(CODES)).all()
    # Codebooks of any size, also one in which all codes are equal.
    assert torch.allclose(similarity(codebook[:3]).sum(1), torch.ones(3))
    assert torch.allclose(similarity(torch.zeros(5, 2)), torch.full((5, 5), 0.2))


def test_the_shift_is_zero_until_the_codes_differ(codebook):
    recorded = torch.randint(0, CODES, (2, 3, 4, 8), generator=torch.Generator().manual_seed(1))
    balance = CodeBalance.of_recorded(recorded, codebook)
    assert torch.equal(balance.shift(), torch.zeros(2, CODES))
    same = recorded.flatten(1).view(2, 12, 8)
    assert balance.after(same).shift().abs().max() < 1e-5


def test_a_code_that_is_too_frequent_is_sampled_less_and_others_more(codebook):
    recorded = torch.randint(0, CODES, (2, 3, 4, 8), generator=torch.Generator().manual_seed(1))
    recorded[0, 0, 0, :4] = 5
    start = balance = CodeBalance.of_recorded(recorded, codebook)
    shown = recorded[:, 0].clone()
    shown[0] = 5
    for _ in range(4 * FRAMES):
        balance = balance.after(shown)
    shift = balance.shift()
    assert shift[0].argmin() == 5 and shift[0, 5] < -1
    unlike = torch.cdist(codebook[5:6], codebook)[0].topk(CODES // 2).indices
    found = unlike[frequencies(recorded, CODES)[0, unlike] > 0]
    assert len(found) > 10 and (shift[0, found] > 1).all()
    assert shift.abs().max() <= MAX_SHIFT
    assert torch.equal(start.shift(), torch.zeros(2, CODES))  # nothing is changed in place
    # The log of the ratio of two distributions, each with a share that is spread evenly.
    even = EVEN_SHARE / CODES
    ratio = (balance.recorded[0, 5] + even) / (balance.generated[0, 5] + even)
    assert shift[0, 5].item() == pytest.approx(ratio.log().item(), abs=1e-5)


def test_a_model_that_prefers_a_code_keeps_the_recorded_ones():
    torch.manual_seed(0)
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()
    tokens = torch.randint(0, 8, (2, 6, 4, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.head.bias[40] += 5.0
    share = {}
    for balance in (0.0, 1.0):
        rollout = Rollout(model, SamplingConfig(code_balance=balance))
        rollout.prime(tokens, torch.zeros(2, 5, 5))
        made = rollout.run(torch.zeros(2, 64, 5))[:, -FRAMES:]
        share[balance] = (made == 40).float().mean().item()
    assert share[0.0] > 0.5 and share[1.0] < share[0.0] / 2


def test_a_copy_and_a_return_take_the_balance_with_them():
    torch.manual_seed(0)
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()
    tokens = torch.randint(0, 64, (1, 3, 4, 8), generator=torch.Generator().manual_seed(2))
    rollout = Rollout(model, SamplingConfig(code_balance=1.0))
    rollout.prime(tokens, torch.zeros(1, 2, 5))
    rollout.run(torch.zeros(1, 4, 5))
    earlier = rollout.copy()
    ahead = torch.ones(1, 8, 5)
    first = rollout.run(ahead)
    rollout.go_back_to(earlier)
    rollout.generator.set_state(earlier.generator.get_state())
    assert torch.equal(rollout.run(ahead), first)
