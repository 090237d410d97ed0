"""FlexAttention: compiled, in narrow types, and the pools that it can read."""

from __future__ import annotations

from shutil import which
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from pagedkv import InvalidSpec  # noqa: E402
from pagedkv.attention import flex  # noqa: E402
from test_attention import mixed, world  # noqa: E402


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flex_in_narrow_types(dtype: str) -> None:
    with world(dtype=dtype) as w:
        mixed(w, "flex", softcap=3.0)


@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("window", [None, 50])
def test_flex_compiled_reads_the_blocks_that_its_mask_lists(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Uncompiled, every key of the pool is computed, and the lists of blocks go unread."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    monkeypatch.setattr(flex, "kernel", lambda on_gpu: compiled)
    with world() as w:
        w.check("flex", w.new([30, 5]), [150, 150], window=window)


def test_flex_stays_compiled_however_many_variants_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own limit is 8, behind which it goes on uncompiled: with a warning, which fails."""
    num_compiled = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal num_compiled
        num_compiled += 1
        return graph

    compiled = flex.compile_kernel(backend=count)
    monkeypatch.setattr(flex, "kernel", lambda on_gpu: compiled)
    for dtype in ("float32", "bfloat16"):
        with world(dtype=dtype) as w:
            for pool in w.kv.read(0):
                pool.zero_()  # `count` has all of it computed
            ids = w.new([30, 5])
            for options in ({}, {"window": 7}, {"softcap": 2.0}):
                for batch, counts in ((ids, [1, 1]), (ids[:1], [1]), (ids, [3, 3])):
                    if num_compiled <= 8:
                        w.check("flex", batch, counts, **options)
    assert num_compiled > 8


def test_flex_wants_the_blocks_of_a_layer_side_by_side() -> None:
    with (
        world(layout="block_major") as w,
        pytest.raises(InvalidSpec, match='as in layout "layer_major"'),
    ):
        w.check("flex", [w.kv.create()], [2])
    with world(dtype="float8_e5m2") as w, pytest.raises(InvalidSpec, match="of one dtype"):
        w.check("flex", [w.kv.create()], [2])
