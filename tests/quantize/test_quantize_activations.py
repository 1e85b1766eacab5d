"""The activation cache: memory or disk, the same values; snapshots survive."""

import errno

import pytest
import torch

from posttrain.errors import UserError
from posttrain.quantize import activations
from posttrain.quantize.activations import ActivationStore, _write_exactly

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


@pytest.mark.parametrize("reference", [False, True])
def test_a_snapshot_is_there_until_the_next_one_is_saved(tmp_path, reference):
    """Kept in memory, killed, resumed on disk, and killed again before anything was saved."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))

    def store(budget):
        made = ActivationStore(tmp_path, SHAPE, budget)
        if reference:
            made.reference = ActivationStore(tmp_path / "reference", SHAPE, budget)
        return made

    def both(made):
        return [made, made.reference] if reference else [made]

    first = store(1 << 20)
    for one in both(first):
        fill(one, values)
    name = first.snapshot(3)
    for _ in range(2):
        again = store(0)
        assert again.restore(name)
        for one in both(again):
            assert torch.equal(one.get(0, 5), values)
            fill(one, values + 1)
            assert torch.equal(one.get(0, 5), values + 1)
    for one in both(again):
        fill(one, values + 2)  # the two files in turn
        assert torch.equal(one.get(0, 5), values + 2)
    later = again.snapshot(5)
    again.forget_older(later)
    assert later != name and not (tmp_path / name).exists()
    last = store(1 << 20)
    assert last.restore(later) and torch.equal(last.get(0, 5), values + 2)


class Short:
    """A file that takes a few bytes at a time, and no more once it is full."""

    name = "short.bin"

    def __init__(self, room):
        self.room, self.written = room, b""

    def write(self, view):
        part = bytes(view[: min(7, self.room - len(self.written))])
        self.written += part
        return len(part)


def test_a_write_is_whole_or_an_error():
    view = memoryview(bytes(range(60)))
    file = Short(60)
    _write_exactly(file, view)
    assert file.written == bytes(view)
    with pytest.raises(OSError) as caught:
        _write_exactly(Short(59), view)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "short.bin")


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path, budget, monkeypatch):
    def full(file, view):
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    monkeypatch.setattr(activations, "_write_exactly", full)
    store = ActivationStore(tmp_path, SHAPE, budget)
    with pytest.raises(UserError, match=r"\.bin: cannot be written: .*No space"):
        store.put(0, torch.ones(SHAPE))
        store.snapshot(1)
