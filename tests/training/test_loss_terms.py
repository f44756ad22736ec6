"""The loss terms against values computed by hand, their gradients, and their normalisation."""

import math

import pytest
import torch

from training import loss_terms as losses
from vq_vae.tokenizer import Tokenizer
from vq_vae.vq_vae import VQVAE, VQVAEConfig


def log_probs_of(*rows: list[float]) -> torch.Tensor:
    """Probabilities of the cells of one row -> log-probabilities [1, 1, W, V]."""
    return torch.tensor(rows).log()[None, None]


def test_cross_entropy_by_hand():
    log_probs = log_probs_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    target = torch.tensor([[[0, 1]]])
    exact = -(math.log(0.5) + math.log(0.8)) / 2
    assert losses.cross_entropy(log_probs, target).item() == pytest.approx(exact, rel=1e-5)
    # With smoothing s the target has 1 - s + s/V of the mass and each other code s/V.
    s = 0.3
    first = -((1 - s + s / 3) * math.log(0.5) + s / 3 * 2 * math.log(0.25))
    second = -((1 - s + s / 3) * math.log(0.8) + s / 3 * 2 * math.log(0.1))
    assert losses.cross_entropy(log_probs, target, s).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_cross_entropy_agrees_with_torch():
    logits, target = torch.randn(3, 7, 4, 5), torch.randint(7, (3, 4, 5))
    ours = losses.cross_entropy(losses.log_probabilities(logits), target, 0.1)
    theirs = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(ours, theirs.mean((1, 2)))


def test_neighbourhood_tolerates_a_shift_and_counts_a_code_once():
    # Targets 0 1 1 in a row. The first cell has 0 and 1 around it (0 also beyond the edge), the last only 1.
    log_probs = log_probs_of([0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3])
    target = torch.tensor([[[0, 1, 1]]])
    near = -(math.log(0.7) + math.log(0.7) + math.log(0.5)) / 3
    assert losses.neighbourhood_loss(log_probs, target, 3, 0.0).item() == pytest.approx(near, rel=1e-5)
    exact = losses.cross_entropy(log_probs, target).item()
    mixed = losses.neighbourhood_loss(log_probs, target, 3, 0.25).item()
    assert mixed == pytest.approx(0.25 * exact + 0.75 * near, rel=1e-5)
    assert losses.neighbourhood_loss(log_probs, target, 1, 0.0).item() == pytest.approx(exact, rel=1e-5)


def test_semantic_loss_is_the_distance_of_the_expected_vector():
    codebook = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    log_probs = log_probs_of([0.5, 0.25, 0.25])  # expected vector [0.5, 1.0]
    target = torch.tensor([[[1]]])
    assert losses.semantic_loss(log_probs, target, codebook).item() == pytest.approx((1.5**2 + 1.0) / 2)


def test_entropy_floor_and_sharpness():
    uniform, certain = log_probs_of([0.25] * 4), log_probs_of([1 - 3e-9, 1e-9, 1e-9, 1e-9])
    assert losses.entropy_floor_loss(uniform, 1.0).item() == 0
    assert losses.entropy_floor_loss(uniform, 2.0).item() == pytest.approx(2 - math.log(4), rel=1e-5)
    assert losses.entropy_floor_loss(certain, 1.0).item() == pytest.approx(1.0, abs=1e-5)
    assert losses.sharpness_loss(uniform).item() == pytest.approx(0.75)
    assert losses.sharpness_loss(certain).item() == pytest.approx(0.0, abs=1e-6)


def test_temporal_loss_is_a_mean_over_cells_and_gives_the_previous_step_no_gradient():
    previous = torch.tensor([0.5, 0.5]).log().repeat(2, 3, 4, 1).requires_grad_()
    now = torch.tensor([0.25, 0.75]).log().repeat(2, 3, 4, 1).requires_grad_()
    loss = losses.temporal_loss(now, previous)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(loss, torch.full((2,), by_hand))
    loss.sum().backward()
    assert previous.grad is None and now.grad.abs().sum() > 0


def test_straight_through_pictures_are_hard_forward_and_soft_backward():
    tokenizer = Tokenizer(VQVAE(VQVAEConfig(8, 8, codebook_size=5, embedding_dim=4, hidden_dim=8)))
    logits = torch.randn(2, 5, 2, 2, requires_grad=True)
    log_probs = losses.log_probabilities(logits)
    pictures = losses.straight_through_pictures(log_probs, tokenizer)
    torch.testing.assert_close(pictures, tokenizer.decode(logits.argmax(1)))
    pictures.sum().backward()
    # Every code that the expected vector contains gets a gradient, not only the most likely one.
    assert (logits.grad.abs() > 0).float().mean() > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_step_lowers_each_loss(seed):
    torch.manual_seed(seed)
    target, codebook = torch.randint(6, (2, 3, 4)), torch.randn(6, 3)
    previous = losses.log_probabilities(torch.randn(2, 6, 3, 4))
    terms = {
        "ce": lambda lp: losses.cross_entropy(lp, target, 0.1),
        "neighbour": lambda lp: losses.neighbourhood_loss(lp, target),
        "semantic": lambda lp: losses.semantic_loss(lp, target, codebook),
        "entropy": lambda lp: losses.entropy_floor_loss(lp, 1.7),
        "sharpness": losses.sharpness_loss,
        "temporal": lambda lp: losses.temporal_loss(lp, previous),
    }
    for name, term in terms.items():
        logits = torch.randn(2, 6, 3, 4, requires_grad=True)
        before = term(losses.log_probabilities(logits)).sum()
        (gradient,) = torch.autograd.grad(before, logits)
        after = term(losses.log_probabilities(logits - 0.1 * gradient)).sum()
        assert after < before, name
