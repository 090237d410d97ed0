"""Instances of the extension's classes are whole, however they are made. Needs no torch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

import pagedkv as pk
from pagedkv import _core

CLASSES = sorted(name for name, value in vars(_core).items() if isinstance(value, type))

# What comes into being without __init__ is read at once: if it can be, the process may die of it.
HALF_MADE = """
import sys
from pagedkv import _core
cls = getattr(_core, sys.argv[1])
class Careless(cls if sys.argv[1] in ("CudaRuntime", "Device", "Pool") else object):
    def __init__(self): pass
def become(other):
    other.__class__ = cls
    return other
manager = _core.BlockManager(4)
found = manager.stats()
ways = [
    lambda: cls.__new__(cls),
    lambda: object.__new__(cls),
    lambda: become(found.device if cls is _core.Stats else found),
]
if issubclass(Careless, cls):
    ways += [Careless, lambda: type.__call__(Careless), lambda: Careless.__new__(Careless)]
for i, way in enumerate(ways):
    try:
        half = way()
    except TypeError:
        continue
    for name in dir(half):
        try:
            getattr(half, name)
        except Exception:
            pass
    sys.exit(f"way {i} makes {type(half)}")
"""


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_makes_an_instance_without_its_value(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HALF_MADE, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def plans() -> list[object]:
    """A step's, its value, and a transfer's."""
    manager = pk.BlockManager(20, 10, block_size=4)
    seq = manager.create()
    manager.commit(manager.append([seq], [1, 2], counts=[2]))
    step = manager.append(manager.fork(seq, 2), [3, 4])
    other = pk.BlockManager(20, 10, block_size=4)
    ids = [other.create()]
    other.commit(other.append(ids, [1, 2, 3, 4, 5], counts=[5]))
    return [step, step.copy(), other.swap_out(ids)]


@pytest.mark.parametrize("plan", plans(), ids=["step", "value", "transfer"])
def test_plans_are_copied_and_pickled_by_every_protocol(plan: object) -> None:
    for again in (copy.copy(plan), copy.deepcopy(plan)):
        assert again == plan
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(plan, protocol)) == plan


@pytest.mark.parametrize("plan", plans(), ids=["step", "value", "transfer"])
def test_plans_are_unpickled_by_another_process(plan: object) -> None:
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(plan), capture_output=True, check=False
    )
    assert run.stdout.decode() == f"{plan}\n", run.stderr
