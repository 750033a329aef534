"""Slots: who holds them, and what a snapshot accepts."""

from __future__ import annotations

import json

import pytest
import torch
from toy_models import WIDTH, Null, Toy

from antiphon.models.streaming import TensorSpec
from antiphon.pipelines.engine import BadSlot, BadSnapshot, OutOfSlots, SlotStore


def scribble(store: SlotStore, row: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in store.state.values():
        tensor[row] = (torch.rand(tensor[row].shape, generator=generator) * 100).to(tensor.dtype)


def test_layout_and_bytes() -> None:
    store = SlotStore(Toy(), 3)
    assert {name: tuple(tensor.shape) for name, tensor in store.state.items()} == {
        "keys": (4, 2, 4, 12, 16),
        "values": (4, 2, 4, 12, 16),
        "tail": (4, WIDTH, 4),
        "frames": (4,),
        "level": (4,),
    }
    assert store.scratch == 3
    assert store.slot_bytes == 2 * 2 * 4 * 12 * 16 * 4 + WIDTH * 4 * 4 + 8 + 4
    assert store.total_bytes == 4 * store.slot_bytes
    assert all(tensor[1].is_contiguous() for tensor in store.state.values())


def test_acquire_resets_what_the_last_holder_left() -> None:
    store = SlotStore(Toy(), 1)
    slot = store.acquire()
    scribble(store, slot.row)
    store.release(slot)
    again = store.acquire()
    assert again.row == slot.row
    for name, spec in store.specs.items():
        assert torch.equal(store.state[name][again.row], torch.full(spec.shape, spec.reset, dtype=spec.dtype))


def test_a_slot_is_held_by_one_generation() -> None:
    store, other = SlotStore(Null(), 2), SlotStore(Null(), 2)
    first, second = store.acquire(), store.acquire()
    assert (store.used, store.free) == (2, 0)
    with pytest.raises(OutOfSlots, match="all 2 slots"):
        store.acquire()
    store.release(first)
    with pytest.raises(BadSlot, match="not held"):
        store.release(first)
    third = store.acquire()
    assert third.row == first.row
    for call in (store.release, store.reset, store.snapshot, store.fork):
        with pytest.raises(BadSlot):
            call(first)
        with pytest.raises(BadSlot):
            call(other.acquire())
        other = SlotStore(Null(), 2)
    assert store.used == 2
    store.release(second)


def test_snapshot_restore_and_fork_copy_every_tensor() -> None:
    store = SlotStore(Toy(), 3)
    source, target = store.acquire(), store.acquire()
    scribble(store, source.row)
    snapshot = store.snapshot(source)
    kept = {name: tensor.clone() for name, tensor in snapshot.items()}
    scribble(store, source.row, seed=1)
    assert all(torch.equal(snapshot[name], kept[name]) for name in kept)
    store.restore(target, store.from_bytes(store.to_bytes(snapshot)))
    assert all(torch.equal(store.state[name][target.row], kept[name]) for name in kept)
    copy = store.fork(target)
    assert all(torch.equal(store.state[name][copy.row], kept[name]) for name in kept)
    scribble(store, copy.row, seed=2)
    assert all(torch.equal(store.state[name][target.row], kept[name]) for name in kept)


def test_a_failed_fork_or_acquire_takes_nothing() -> None:
    store = SlotStore(Null(), 1)
    slot = store.acquire()
    with pytest.raises(OutOfSlots):
        store.fork(slot)
    store.release(slot)
    assert store.free == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda snapshot: snapshot.pop("level"), "lacks"),
        (lambda snapshot: snapshot.update(extra=torch.zeros(1)), "holds"),
        (lambda snapshot: snapshot.update(tail=torch.zeros(3, 3)), r"'tail' is \[3, 3\]"),
        (lambda snapshot: snapshot.update(frames=torch.tensor(1.0)), "'frames' is"),
    ],
)
def test_snapshots_that_do_not_fit_are_named(change, message: str) -> None:
    store = SlotStore(Toy(), 1)
    slot = store.acquire()
    snapshot = store.snapshot(slot)
    change(snapshot)
    with pytest.raises(BadSnapshot, match=message):
        store.restore(slot, snapshot)


def test_bytes_of_another_model_layout_or_release_are_refused() -> None:
    store = SlotStore(Toy(), 1, name="toy")
    data = store.to_bytes(store.snapshot(store.acquire()))
    with pytest.raises(BadSnapshot, match="model is 'toy'"):
        SlotStore(Toy(), 1, name="other").from_bytes(data)
    with pytest.raises(BadSnapshot, match="spec is"):
        SlotStore(Toy(layers=3), 1, name="toy").from_bytes(data)
    with pytest.raises(BadSnapshot, match="version is"):
        store.from_bytes(data.replace(b'"version":"1"', b'"version":"0"'))


def test_bytes_that_are_no_snapshot_are_refused() -> None:
    store = SlotStore(Null(), 1)
    data = store.to_bytes(store.snapshot(store.acquire()))
    header = json.dumps({"__metadata__": "no"}).encode()
    for bad in (b"", b"1234567", data[:-1], data[:20], b"\xff" * 64, len(header).to_bytes(8, "little") + header):
        with pytest.raises(BadSnapshot):
            store.from_bytes(bad)


def test_a_store_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        SlotStore(Null(), 0)


def test_reset_values_other_than_zero() -> None:
    class Odd(Null):
        def state_spec(self):
            return {"a": TensorSpec((2,), torch.int64, -1), "b": TensorSpec((), torch.bool, True)}

    store = SlotStore(Odd(), 1)
    slot = store.acquire()
    assert store.state["a"][slot.row].tolist() == [-1, -1]
    assert bool(store.state["b"][slot.row])
