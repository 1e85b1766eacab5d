"""The activation cache: memory or disk, the same values; snapshots survive."""

import pytest
import torch

from posttrain.quantize.activations import ActivationStore

SHAPE = (5, 3, 4)


def fill(store, values):
    for start in range(0, len(values), 2):
        store.put(start, values[start : start + 2])
    store.advance()


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_what_was_put_comes_back(tmp_path, budget):
    store = ActivationStore(tmp_path, SHAPE, budget)
    assert store.spilled == (budget == 0)
    for seed in range(4):
        values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        fill(store, values)
        assert torch.equal(store.get(0, 5), values)
        assert torch.equal(store.get(3, 4), values[3:4])
        assert torch.equal(store.get(4, 6), values[4:])


def test_reading_and_replacing_batch_by_batch(tmp_path):
    """Writing the outputs of one batch must not disturb the inputs of the next."""
    for budget in (0, 1 << 20):
        store = ActivationStore(tmp_path / str(budget), SHAPE, budget)
        values = torch.arange(60.0).reshape(SHAPE)
        fill(store, values)
        for start in (0, 2, 4):
            store.put(start, store.get(start, min(start + 2, 5)) * 2)
        store.advance()
        assert torch.equal(store.get(0, 5), values * 2)


@pytest.mark.parametrize("before", [0, 1 << 20])
@pytest.mark.parametrize("after", [0, 1 << 20])
def test_snapshot_is_restored_whatever_the_budget_was(tmp_path, before, after):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    store = ActivationStore(tmp_path, SHAPE, before)
    fill(store, values)
    name = store.snapshot(3)
    # What a run does between its last snapshot and its death.
    store.put(0, values[:2] * 0)
    again = ActivationStore(tmp_path, SHAPE, after)
    assert again.restore(name)
    assert torch.equal(again.get(0, 5), values)
    again.put(0, values[:2] + 1)
    again.put(2, values[2:4] + 1)
    again.put(4, values[4:] + 1)
    again.advance()
    assert torch.equal(again.get(0, 5), values + 1)


def test_a_torn_snapshot_is_refused(tmp_path):
    store = ActivationStore(tmp_path, SHAPE, 1 << 20)
    fill(store, torch.ones(SHAPE))
    name = store.snapshot(1)
    (tmp_path / name).write_bytes(b"short")
    assert not store.restore(name)
    assert not store.restore("inputs-of-block-9.bin")
