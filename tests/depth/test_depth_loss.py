"""The terms of the depth network's loss, by hand."""

import math

import pytest
import torch

from depth.depth_loss import FAR_WEIGHT, depth_error, error_likelihood, gradient_error, near_weight


def log_inverse(*metres: float) -> torch.Tensor:
    """[1, 1, N] log inverse ray distances."""
    return -torch.tensor([[metres]], dtype=torch.float32).log()


def test_near_surfaces_weigh_more():
    found = near_weight(log_inverse(0.5, 10.0, 20.0, 100.0))[0, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.5, FAR_WEIGHT]))


def test_depth_error_by_hand():
    truth, predicted = log_inverse(5.0, 20.0), log_inverse(10.0, 20.0)
    assert depth_error(predicted, truth).item() == pytest.approx(math.log(2) / 1.5)
    same_far = depth_error(log_inverse(5.0, 40.0), truth).item()
    assert same_far == pytest.approx(math.log(2) * 0.5 / 1.5), "the same factor costs half as much at 20 m"
    assert depth_error(truth, truth) == 0


def test_gradient_error_ignores_a_constant_factor_and_counts_a_missed_edge():
    torch.manual_seed(0)
    truth = torch.randn(2, 6, 8)
    assert gradient_error(truth + 0.7, truth).item() == pytest.approx(0, abs=1e-6)
    edge = log_inverse(*[2.0] * 4, *[8.0] * 4).expand(1, 6, 8)
    flat, sharp = torch.full_like(edge, edge.mean()), edge + 0.1
    assert gradient_error(flat, edge) > 10 * gradient_error(sharp, edge) + 0.1


def test_the_expected_error_is_best_at_the_mean_of_the_errors_made():
    torch.manual_seed(0)
    truth = torch.zeros(1, 20, 20)
    predicted = torch.rand(1, 20, 20, requires_grad=True)
    mean = predicted.detach().abs().mean().log()
    at = {
        shift: error_likelihood((mean + shift).expand(1, 20, 20), predicted, truth)
        for shift in (-0.3, 0, 0.3)
    }
    assert at[0] < at[-0.3] and at[0] < at[0.3]
    log_error = torch.zeros(1, 20, 20, requires_grad=True)
    error_likelihood(log_error, predicted, truth).backward()
    assert predicted.grad is None and log_error.grad is not None
