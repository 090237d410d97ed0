"""Arguments that are wrong: a typed error that names them, and a manager that is as it was."""

from __future__ import annotations

import array
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pagedkv as pk
from bad import WRONG_BUFFERS, Call, Here
from small import state

# ----------------------------------------------------------------------- building a manager

CONFIGS: dict[str, list[object]] = {
    "num_device_blocks": [
        0,
        -1,
        2**30,
        2**31,
        2**40,
        2**62,
        2**63,
        2**64,
        -(2**64),
        1.0,
        True,
        "8",
    ],
    "num_host_blocks": [-1, 2**40, 2**64, 0.0, False, None],
    "block_size": [0, -1, 4097, 2**32, 2**64, 16.0, None, "16"],
    "max_batch": [0, -1, 65536, 2**33, 2**64, 1.5, None],
    "max_model_len": [0, -1, 2**31, 2**40, 2**64, 8.0, "8", True],
    "watermark": [-1, 8, 2**40, 2**64, 0.0, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CONFIGS.items() for value in values]
)
def test_a_config_names_what_is_wrong(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"num_device_blocks": 8} | {name: value}
    with pytest.raises(pk.InvalidSpec, match=name):
        pk.BlockManager(**arguments)


def test_a_pool_that_memory_cannot_describe_is_refused() -> None:
    """Before the machine is driven out of memory."""
    with pytest.raises(pk.InvalidSpec):
        pk.BlockManager(2**30 - 1, block_size=4096)
    with pytest.raises(pk.InvalidSpec):
        pk.BlockManager(8, 2**30 - 1, block_size=4096)
    with pytest.raises(pk.InvalidSpec):
        pk.BlockManager(8, block_size=1, max_batch=65535, max_model_len=2**31 - 5000)


# ----------------------------------------------------------------------- buffers

BATCH_ARGUMENTS: dict[str, list[Callable[[pk.BlockManager, list[int], Any], object]]] = {
    "ids": [
        lambda m, ids, x: m.append(x),
        lambda m, ids, x: m.record(x, [1]),
        lambda m, ids, x: m.reorder(x, [0]),
        lambda m, ids, x: m.truncate(x, [0]),
        lambda m, ids, x: m.release(x),
        lambda m, ids, x: m.num_needed(x),
        lambda m, ids, x: m.num_freed(x),
    ],
    "tokens": [
        lambda m, ids, x: m.create(x),
        lambda m, ids, x: m.lookup(x),
        lambda m, ids, x: m.append(ids[:1], x),
        lambda m, ids, x: m.record(ids[2:], x),
    ],
    "counts": [
        lambda m, ids, x: m.append(ids[:1], counts=x),
        lambda m, ids, x: m.record(ids[2:], [1], counts=x),
        lambda m, ids, x: m.num_needed(ids[:1], x),
    ],
    "parents": [lambda m, ids, x: m.reorder(ids[:1], x)],
    "lengths": [lambda m, ids, x: m.truncate(ids[:1], x)],
}


@pytest.mark.parametrize("name", BATCH_ARGUMENTS)
def test_wrong_buffers(here: Here, name: str) -> None:
    for call, wrong in itertools.product(BATCH_ARGUMENTS[name], WRONG_BUFFERS):
        here.refuses(lambda m, c=call, x=wrong: c(m, here.ids, x), pk.InvalidSpec, name, "expected")


def test_missing_buffers(here: Here) -> None:
    """None is no buffer where one is required."""
    for call in BATCH_ARGUMENTS["ids"] + BATCH_ARGUMENTS["parents"] + BATCH_ARGUMENTS["lengths"]:
        here.refuses(lambda m, c=call: c(m, here.ids, None), pk.InvalidSpec, "expected")
    here.refuses(lambda m: m.lookup(None), pk.InvalidSpec, "tokens")
    here.refuses(lambda m: m.record(here.ids[2:], None), pk.InvalidSpec, "tokens")


def test_wrong_commit_lengths(here: Here) -> None:
    plan = here.m.append(here.ids[:1], [7, 7], counts=[2])
    for wrong in [*WRONG_BUFFERS, [], [4, 4], [3], [7], [-1], [2**62]]:
        with pytest.raises(pk.InvalidSpec, match="lengths"):
            here.m.commit(plan, wrong)
    for wrong in (None, 5, "plan", here.m, object()):
        with pytest.raises((pk.KVError, TypeError)):
            here.m.commit(wrong)  # type: ignore[arg-type]
    here.m.rollback(plan)
    assert state(here.m) == here.before


def test_every_integer_buffer_works(here: Here) -> None:
    """numpy, array, memoryview, read-only, misaligned, a list, a tuple, numpy scalars in a list."""
    a = here.ids[1]
    misaligned = [
        np.frombuffer(b"?" + np.array([6, 7], dtype).tobytes(), dtype, offset=1)
        for dtype in (np.int64, np.int32)
    ]
    frozen = np.array([6, 7], np.int32)
    frozen.setflags(write=False)
    buffers: list[object] = [
        np.array([6, 7]),
        np.array([6, 7], "<i4"),
        *misaligned,
        frozen,
        np.arange(6, 8, dtype=np.int64)[:],
        array.array("q", [6, 7]),
        array.array("i", [6, 7]),
        memoryview(np.array([6, 7])),
        [6, 7],
        (6, 7),
        [np.int32(6), np.int64(7)],
    ]
    for tokens in buffers:
        plan = here.m.append([a], tokens, counts=np.array([2], np.int32))
        assert plan.input_ids is not None
        assert plan.input_ids.tolist() == [6, 7]
        here.m.rollback(plan)
    one = np.arange(2)[::2]  # one element: contiguous whatever its stride
    assert here.m.num_needed([a], one + 1) == here.m.num_needed(np.array([a])) == 0
    assert here.m.num_needed([]) == 0
    here.m.rollback(here.m.append([]))


# ----------------------------------------------------------------------- values


@pytest.mark.parametrize("tokens", [[-1], [2**31], [1, 2**40], [1, -(2**31)], [0, 2**32]])
def test_tokens_out_of_range(here: Here, tokens: list[int]) -> None:
    at = f"tokens[{len(tokens) - 1}] is {tokens[-1]}"
    wrong: list[object] = [tokens, np.array(tokens, np.int64)]
    if abs(tokens[-1]) < 2**31 or tokens[-1] == -(2**31):
        wrong.append(np.array(tokens, np.int32))
    for x in wrong:
        here.refuses(lambda m, x=x: m.create(x), pk.InvalidSpec, at)
        here.refuses(lambda m, x=x: m.lookup(x), pk.InvalidSpec, at)
        here.refuses(lambda m, x=x: m.append([here.ids[0]], x, counts=[2]), pk.InvalidSpec, at)
        here.refuses(lambda m, x=x: m.record([here.ids[2]], x, counts=[2]), pk.InvalidSpec, at)
    last = here.m.append([here.ids[0]], [2**31 - 1])
    here.m.rollback(last)


def test_ids(here: Here) -> None:
    """Unknown ones, repeated ones, and what is no int at all."""
    a, b, c = here.ids
    m = here.m
    m.release([gone := m.create()])
    here.before = state(m)
    batches: list[Call] = [
        lambda m, ids: m.append(ids),
        lambda m, ids: m.num_needed(ids),
        lambda m, ids: m.num_freed(ids),
        lambda m, ids: m.release(ids),
        lambda m, ids: m.truncate(ids, [0] * len(ids)),
        lambda m, ids: m.reorder(ids, [0] * len(ids)),
    ]
    for call in batches:
        for unknown in (gone, 0, -1, a + 2**32, 2**63 - 1, -(2**63)):
            ids = [a, b, unknown]
            here.refuses(lambda m, f=call, i=ids: f(m, i), pk.UnknownSequence, str(unknown))
        here.refuses(lambda m, f=call: f(m, [a, b, a]), pk.InvalidSpec, "ids[2]", str(a))
    here.refuses(lambda m: m.record([c, c], [1, 1]), pk.InvalidSpec, "ids[1]")
    here.refuses(lambda m: m.record([gone], [1]), pk.UnknownSequence)
    singles: list[Call] = [
        lambda m, i: m.length(i),
        lambda m, i: m.num_cached(i),
        lambda m, i: m.block_table(i),
        lambda m, i: m.fork(i, 2),
    ]
    for call in singles:
        for unknown in (gone, 0, -1, 2**63 - 1):
            here.refuses(lambda m, f=call, i=unknown: f(m, i), pk.UnknownSequence, str(unknown))
        for wrong in (1.0, True, None, "1", [a], np.array([a]), 2**63, -(2**63) - 1, 10**100):
            here.refuses(lambda m, f=call, i=wrong: f(m, i), pk.InvalidSpec, "id")
    assert isinstance(pk.UnknownSequence("x"), KeyError)


def test_sizes_and_ranges(here: Here) -> None:
    """Arguments of different lengths; counts, lengths, parents and forks out of range."""
    a, b, c = here.ids
    wrong: list[tuple[str, Call]] = [
        ("counts", lambda m: m.append([a, b], counts=[1])),
        ("counts", lambda m: m.append([a], counts=[])),
        ("counts", lambda m: m.num_needed([a, b], [1])),
        ("counts", lambda m: m.num_needed([a], [])),
        ("counts", lambda m: m.record([c], [1], counts=[1, 1])),
        ("counts", lambda m: m.record([c], [1], counts=[])),
        ("counts", lambda m: m.num_needed([], [1])),
        ("parents", lambda m: m.reorder([a, b], [0])),
        ("lengths", lambda m: m.truncate([a], [1, 1])),
        ("tokens", lambda m: m.append([a, b], [1])),
        ("tokens", lambda m: m.append([a], [])),
        ("tokens", lambda m: m.append([a], [1, 2, 3], counts=[2])),
        ("tokens", lambda m: m.record([c], [1, 2])),
        ("tokens", lambda m: m.record([c], [])),
        ("tokens", lambda m: m.create([1] * 13)),
        ("max_model_len", lambda m: m.create([1] * 13)),
        ("max_model_len", lambda m: m.append([a], counts=[9])),
        ("max_batch", lambda m: m.append([a, b, c, a, b])),
        ("max_batch", lambda m: m.num_needed([a, b, c, a, b])),
        ("record", lambda m: m.append([a, c], [1, 1])),
        *(
            ("counts[0]", lambda m, n=n: m.append([a], counts=[n]))
            for n in (0, -1, 2**31, 2**62, 2**63 - 1, -(2**63))
        ),
        ("counts[1]", lambda m: m.append([a, b], counts=[1, 2**63 - 1])),
        *(("counts[0]", lambda m, n=n: m.num_needed([a], [n])) for n in (0, -1, 2**63 - 1)),
        *(("counts[0]", lambda m, n=n: m.record([c], [1], counts=[n])) for n in (0, -1, 4, 2**62)),
        ("counts[0]", lambda m: m.record([a], [1])),
        *(
            ("parents[1]", lambda m, p=p: m.reorder([a, b], [0, p]))
            for p in (-1, 2, 2**40, -(2**63))
        ),
        *(("lengths[0]", lambda m, n=n: m.truncate([a], [n])) for n in (-1, 5, 2**40, -(2**63))),
        *(("n", lambda m, n=n: m.fork(a, n)) for n in (0, -1, 2**17, 2**63, 1.0, True, None, "2")),
        *(("salt", lambda m, s=s: m.create([1], salt=s)) for s in (1, 1.5, [b"a"], "\ud800", {})),
        *(("salt", lambda m, s=s: m.lookup([1], salt=s)) for s in (1, bytearray(1), "\udfff")),
        *(("salt", lambda m, s=s: m.clear(s)) for s in (1, (), "\ud800")),
    ]
    for name, call in wrong:
        here.refuses(call, pk.InvalidSpec, name)


def test_errors_are_what_python_programs_expect() -> None:
    m = pk.BlockManager(2, block_size=1)
    with pytest.raises(ValueError, match="counts"):
        m.append([m.create()], counts=[0])
    with pytest.raises(KeyError, match="no live sequence"):
        m.length(99)
    with pytest.raises(pk.OutOfBlocks) as error:
        m.append([m.create(), m.create()], counts=[2, 1])
    assert (error.value.tier, error.value.needed, error.value.available) == ("device", 3, 2)
    restored = pickle.loads(pickle.dumps(error.value))
    assert (type(restored), str(restored)) == (pk.OutOfBlocks, str(error.value))
