"""What attention refuses, and that what torch is set to elsewhere is nothing to it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import pagedkv as pk  # noqa: E402
from attention_world import AttentionWorld  # noqa: E402
from pagedkv.attention import blockwise  # noqa: E402
from pagedkv.errors import InvalidSpec, InvalidState  # noqa: E402


def world(**options: Any) -> AttentionWorld:
    kv = pk.KVCache(pk.KVSpec(1, 2, 16, "float32", 4), num_device_blocks=400, **options)
    return AttentionWorld(kv, 4, torch.float32)


@pytest.mark.parametrize("backend", ["gather", "blockwise", "auto"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [30, 1, 5]])
def test_defaults_for_new_tensors_change_nothing(
    monkeypatch: pytest.MonkeyPatch, backend: str, counts: list[int]
) -> None:
    """Buffers are of the right type on the right device, whatever torch's defaults are."""
    monkeypatch.setattr(blockwise, "SHARED_BYTES", 0)  # beams read apart what they share
    monkeypatch.setattr(blockwise, "RUN_BYTES", 4096)
    w = world()
    ids = w.kv.fork(w.new([200])[0], 3)
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        k, q = w.randn(sum(counts), 2, 16), w.randn(sum(counts), 4, 16)
        with w.kv.step(ids, counts=np.array(counts)) as step:
            w.kv.write(0, k, k, step)
            expected = w.kv.attention(0, q, step, backend="gather")
            step.rollback()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), w.kv.step(ids, counts=np.array(counts)) as step:
                w.kv.write(0, k, k, step)
                found = w.kv.attention(0, q, step, backend=backend)
                step.rollback()
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected)


def test_queries_are_plain_floats_without_gradients() -> None:
    w = world()
    with w.kv.step(w.new([5, 5])) as step:
        w.kv.write(0, w.randn(2, 2, 16), w.randn(2, 2, 16), step)
        q = w.randn(2, 4, 16)
        for wrong in (q.long(), q.to(torch.complex64), q > 0, q.numpy(), None):
            with pytest.raises(InvalidSpec, match="expected a tensor of floats"):
                w.kv.attention(0, wrong, step)
        learned = q.clone().requires_grad_()
        with pytest.raises(InvalidSpec, match="requires a gradient"):
            w.kv.attention(0, learned, step)
        with torch.no_grad():
            assert torch.equal(w.kv.attention(0, learned, step), w.kv.attention(0, q, step))
        with pytest.raises(InvalidSpec, match=r"window is 2\.5"):
            w.kv.attention(0, q, step, window=2.5)  # type: ignore[arg-type]
        with pytest.raises(InvalidState):
            w.kv.attention(0, q, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 1, 1, 6), "expected \\[2, 4, 1, 6\\]"),
        (torch.ones(2, 3, 1, 6), "expected"),
        (torch.ones(1, 1, 1, 7), "expected"),
        (torch.ones(1, 1, 1, 1, 6), "expected"),
        (torch.ones(1, 1, 1, 6).long(), "attn_mask is torch.int64"),
    ],
)
def test_a_mask_is_of_the_shape_of_the_step(mask: Any, message: str) -> None:
    w = world()
    with w.kv.step(w.new([5, 5])) as step:
        with pytest.raises(InvalidSpec, match=message):
            w.kv.attention(0, w.randn(2, 4, 16), step, attn_mask=mask)
        step.rollback()
    with (
        w.kv.step(w.new([5, 5]), counts=np.array([2, 1])) as step,
        pytest.raises(InvalidSpec, match="rows of one length"),
    ):
        w.kv.attention(0, w.randn(3, 4, 16), step, attn_mask=torch.ones(1, 1, 1, 7))


def test_a_mask_of_one_key_is_one_of_all() -> None:
    """Broadcast as any, also to rows of near lengths, which are read together."""
    w = world()
    with w.kv.step(w.new([5, 9])) as step:
        w.kv.write(0, w.randn(2, 2, 16), w.randn(2, 2, 16), step)
        q = w.randn(2, 4, 16)
        expected = w.kv.attention(0, q, step)
        for one in (torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)):
            torch.testing.assert_close(w.kv.attention(0, q, step, attn_mask=one), expected)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_turns_the_order_round(scale: float) -> None:
    w = world()
    w.check("blockwise", w.new([30]), [9], scale=scale)


def test_tensors_without_memory_of_their_own_are_refused() -> None:
    """Fake ones, and such as have lost it: the interpreter must not read at address 0."""
    w = world()
    real = w.randn(2, 2, 16)
    lost = real.clone()
    lost.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake, fake_q = torch.empty(2, 2, 16), torch.empty(2, 4, 16)
    with w.kv.step(w.new([5, 5])) as step:
        with FakeTensorMode(), pytest.raises(InvalidSpec, match="slots"):
            _ = step.slots  # which would stay for all layers
        for k in (fake, lost, torch._efficientzerotensor(2, 2, 16)):
            with pytest.raises(InvalidSpec, match="without memory of its own"):
                w.kv.write(0, k, real, step)
            with pytest.raises(InvalidSpec, match="without memory of its own"):
                w.kv.write(0, real, k, step)
        w.kv.write(0, real, real, step)
        with pytest.raises(InvalidSpec, match="without memory of its own"):
            w.kv.attention(0, fake_q, step)


@pytest.mark.parametrize(
    ("tables", "lens", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, dtype=torch.int32), "block_tables is torch.float32"),
        (
            torch.zeros(1, 2, dtype=torch.int32),
            torch.zeros(9, dtype=torch.int32),
            r"int32 \[9, W\]",
        ),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), "block_tables is"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), "torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int32).T, torch.zeros(2, dtype=torch.int32), "strides"),
        (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2), "num_tokens is torch.float32"),
        (
            torch.zeros(2, 2, dtype=torch.int32, device="meta"),
            torch.zeros(2, dtype=torch.int32),
            "block_tables is on meta, expected cpu",
        ),
    ],
)
def test_tables_that_are_gathered_by_are_looked_at(tables: Any, lens: Any, message: str) -> None:
    w = world()
    with pytest.raises(InvalidSpec, match=message):
        w.kv.gather_blocks(0, tables, 0, lens, 8)


def test_adopted_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        tensors = [(torch.zeros(9, 4, 2, 16), torch.zeros(9, 4, 2, 16))]
    with pk.KVCache(pk.KVSpec(1, 2, 16, "float32", 4), tensors=tensors, num_host_blocks=4) as kv:
        AttentionWorld(kv, 4, torch.float32).check("auto", [kv.create()], [3])


@pytest.mark.parametrize("backend", ["gather", "blockwise", "flex"])
def test_a_cache_made_and_used_in_inference_mode_is_used_without(backend: str) -> None:
    with torch.inference_mode():
        w = world(layout="layer_major")
        w.kv.read(0)[1].zero_()
        ids = w.new([3, 4])
        w.check(backend, ids, [1, 2])
    w.check(backend, ids, [2, 1])
    with w.kv.step(ids) as step:
        assert not any(t.is_inference() for t in (*w.kv.pools()[0], *w.kv.gather(0, step)))
