"""What the tests of bad input share: wrong buffers, and a manager that must not change."""

from __future__ import annotations

import array
from collections.abc import Callable

import numpy as np

import pagedkv as pk
from small import admit, hit, late, state

Call = Callable[..., object]

WRONG_BUFFERS: list[object] = [
    np.array([1.0]),
    np.array([1], np.float32),
    np.array([True]),
    np.array([1], np.uint8),
    np.array([1], np.int8),
    np.array([1], np.int16),
    np.array([1], np.uint32),
    np.array([1], np.uint64),
    np.array([1], np.complex64),
    np.array([1], ">i8"),
    np.array([1], ">i4"),
    np.array([1], object),
    np.array(["1"]),
    np.array([1], "M8[s]"),
    np.array([(1, 2)], "i4,i4"),
    np.array(1),
    np.array([[1]]),
    np.zeros((1, 1, 1), np.int64),
    np.arange(4)[::2],
    np.arange(2)[::-1],
    np.broadcast_to(np.int64(1), (3,)),
    memoryview(b"12345678"),
    b"12345678",
    bytearray(8),
    array.array("d", [1.0]),
    array.array("H", [1]),
    "1",
    5,
    1.5,
    {1: 2},
    {1},
    range(1),
    iter([1]),
    object(),
    [1.0],
    [True],
    [None],
    ["1"],
    [[1]],
    [2**63],
    [-(2**63) - 1],
    [10**100],
    (1.5,),
    [np.float64(1)],
    [np.array([1])],
    [np.bool_(True)],
]


class Here:
    """A manager with a published, an open and a late sequence, and a check that nothing changed."""

    def __init__(self) -> None:
        self.m = pk.BlockManager(16, block_size=2, max_batch=4, max_model_len=12)
        self.ids = [admit(self.m, [1, 2, 3, 4]), admit(self.m, [5]), late(self.m, 3)]
        self.m.release([admit(self.m, [8, 9])])
        self.before = state(self.m)

    def refuses(self, call: Call, error: type[pk.KVError], *names: str) -> None:
        raised: Exception | None = None
        try:
            call(self.m)
        except Exception as e:
            raised = e
        assert type(raised) is error, f"{raised!r}, expected {error.__name__} with {names}"
        assert all(name in str(raised) for name in names), f"{raised!r}, expected {names}"
        assert state(self.m) == self.before
        assert hit(self.m, [8, 9]) == 2
