from __future__ import annotations

import numpy as np
import pytest

from fibopolicy.datasets import batch_indices, epoch_order


def test_an_epoch_visits_every_sample_once_in_its_own_order() -> None:
    orders = [epoch_order(50, 7, epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert list(orders[0]) != list(orders[1])
    assert list(epoch_order(50, 8, 0)) != list(orders[0])


def test_the_batch_of_a_step_does_not_depend_on_earlier_batches() -> None:
    in_a_row = [batch_indices(10, 3, seed=1, step=step).tolist() for step in range(9)]
    epoch_order.cache_clear()
    assert [
        batch_indices(10, 3, seed=1, step=step).tolist() for step in reversed(range(9))
    ] == in_a_row[::-1]


def test_the_batches_of_an_epoch_are_its_order_without_the_last_partial_one() -> None:
    for epoch in range(3):
        steps = [batch_indices(10, 3, seed=1, step=3 * epoch + i) for i in range(3)]
        assert np.concatenate(steps).tolist() == epoch_order(10, 1, epoch)[:9].tolist()


def test_a_batch_larger_than_the_dataset_spans_several_epochs() -> None:
    stream = np.concatenate([batch_indices(3, 7, seed=5, step=step) for step in range(6)])
    assert stream.shape == (42,)
    assert (
        stream.tolist()
        == np.concatenate([epoch_order(3, 5, epoch) for epoch in range(14)]).tolist()
    )


def test_the_sampling_order_matches_stored_values() -> None:
    """A changed order would make a resumed run another run."""
    assert batch_indices(20, 8, seed=0, step=3).tolist() == [7, 11, 3, 18, 17, 6, 16, 14]


def test_the_shared_order_cannot_be_overwritten() -> None:
    with pytest.raises(ValueError, match="read-only"):
        batch_indices(10, 3, seed=1, step=0)[0] = 5


@pytest.mark.parametrize("arguments", [(0, 3, 1, 0), (5, 0, 1, 0), (5, 3, 1, -1)])
def test_invalid_arguments_are_rejected(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        batch_indices(*arguments)
