"""The stream of training batches: order, resuming, slices of several processes, balance of actions."""

import numpy as np
import pytest
import torch
from tiny_world import COLUMNS, ROWS, write_world

from dataset.actions import CLASS_NAMES
from dataset.token_files import DataError
from dataset.windows import TokenClips, WindowBatches, class_shares, sample_by_class


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> TokenClips:
    return TokenClips(write_world(tmp_path_factory.mktemp("world")), "train")


def test_batches_continue_from_a_saved_position(clips):
    stream = WindowBatches(clips, 4, seed=3)
    for _ in range(9):
        stream.next(5)
    other = WindowBatches(clips, 4, seed=3)
    other.restore(stream.position)
    for _ in range(12):  # across the end of a pass
        a, b = stream.next(5), other.next(5)
        assert np.array_equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    assert stream.position["epoch"] >= 3
    epoch = stream.position["epoch"]
    assert stream.next(6)[1].shape == (4, 7, ROWS, COLUMNS) and stream.position["epoch"] == epoch + 1


def test_too_few_windows_for_a_batch_are_refused(clips):
    with pytest.raises(DataError, match="lower BATCH_SIZE or SEQ_LEN"):
        WindowBatches(clips, 500, seed=3).next(5)


def test_processes_share_the_batch_of_one(clips):
    whole = WindowBatches(clips, 4, seed=3)
    parts = [WindowBatches(clips, 4, seed=3, rank=rank, processes=2) for rank in (0, 1)]
    for _ in range(8):
        expected = whole.next(5)[0]
        assert np.array_equal(np.concatenate([part.next(5)[0] for part in parts]), expected)
        assert parts[0].position == parts[1].position == whole.position


def test_balance_samples_windows_of_rare_actions_more_often():
    classes = [np.zeros(90, int), np.full(10, 1)]
    windows = np.array([(0, i) for i in range(0, 90, 5)] + [(1, 0), (1, 5)])
    assert sample_by_class(windows, classes, 6, 0.0, 1, 0) is windows
    even = sample_by_class(np.repeat(windows, 50, 0), classes, 6, 1.0, 1, 0)
    assert np.array_equal(even, sample_by_class(np.repeat(windows, 50, 0), classes, 6, 1.0, 1, 0))
    assert not np.array_equal(even, sample_by_class(np.repeat(windows, 50, 0), classes, 6, 1.0, 1, 1))
    before, after = (class_shares(w, classes, 6, 2) for w in (windows, even))
    assert before == pytest.approx([0.9, 0.1]) and after == pytest.approx([0.5, 0.5], abs=0.05)


def test_class_shares_are_reported_before_and_after_balancing(clips):
    even, balanced = (WindowBatches(clips, 4, 3, balance=balance).class_shares(5) for balance in (0.0, 1.0))
    assert set(even) == set(CLASS_NAMES)
    assert all(data == pytest.approx(sampled) for data, sampled in even.values())
    assert any(abs(data - sampled) > 0.01 for data, sampled in balanced.values())
    for column in (0, 1):
        assert sum(shares[column] for shares in balanced.values()) == pytest.approx(1)
