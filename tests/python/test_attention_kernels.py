"""Kernels that only a GPU has: what they are called with, checked by stand-ins as documented.

The stand-ins take each argument in the type, shape and memory that the real one takes, and compute
by it alone. The same batches run on the real kernels where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from attention_world import AttentionWorld, dense  # noqa: E402
from pagedkv import InvalidSpec  # noqa: E402
from pagedkv.attention import BACKENDS, flash_attn, flashinfer, varlen  # noqa: E402
from pagedkv.attention import _choose as choose  # noqa: E402
from pagedkv.attention.call import Call  # noqa: E402

Tensor = Any
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"window": 5}, {"window": 1}, {"scale": 0.7}]


def ints(tensor: Tensor, *shape: int, device: str = "cpu") -> list[Any]:
    assert tensor.dtype == torch.int32
    assert tuple(tensor.shape) == shape
    assert tensor.stride(-1) == 1
    assert tensor.device.type == device
    found: list[Any] = tensor.tolist()
    return found


def over_blocks(
    q: Tensor, k: Tensor, v: Tensor, starts: list[int], tables: list[list[int]], lens: list[int],
    **options: Any,
) -> Tensor:  # fmt: skip
    """Attention of each row, by its blocks and its length."""
    assert q.is_contiguous()
    assert k.dim() == v.dim() == 4
    assert k.stride(-1) == v.stride(-1) == 1
    assert k.stride() == v.stride()
    size, rows = k.shape[1], []
    assert starts[0] == 0
    assert starts[-1] == len(q)
    for b, length in enumerate(lens):
        blocks = tables[b][: -(-length // size)]
        assert 0 not in blocks
        assert len(blocks) == -(-length // size)
        keys, values = (pool[blocks].float().flatten(0, 1)[:length] for pool in (k, v))
        rows.append(dense(q[starts[b] : starts[b + 1]], keys, values, **options))
    return torch.cat(rows).to(q.dtype)


def left(window_size: tuple[int, int]) -> int | None:
    """The number of tokens seen, from how many before it a token sees; none behind it."""
    assert window_size[1] == 0
    assert window_size[0] >= -1
    return None if window_size[0] == -1 else window_size[0] + 1


def fake_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor, block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert cu_seq_k is None
    assert enable_gqa == (query.shape[1] != key.shape[2])
    starts, lens = ints(cu_seq_q, len(seqused_k) + 1), ints(seqused_k, len(seqused_k))
    assert max_q == int(np.diff(starts).max())
    assert max_k == max(lens)
    tables = ints(block_table, len(lens), block_table.shape[1])
    return over_blocks(
        query, key, value, starts, tables, lens, scale=scale, window=left(window_size)
    )


def fake_flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool,
    window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    assert causal
    lens = ints(cache_seqlens, len(cache_seqlens))
    starts = ints(cu_seqlens_q, len(lens) + 1)
    assert max_seqlen_q == int(np.diff(starts).max())
    tables = ints(page_table, len(lens), page_table.shape[1])
    options = {"scale": softmax_scale, "softcap": softcap or None, "window": left(window_size)}
    return over_blocks(q, k_cache, v_cache, starts, tables, lens, **options)


def fake_flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, softmax_scale: float, causal: bool, window_size: tuple[int, int],
    softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert causal
    rows = len(block_table)
    starts, ends = ints(cu_seqlens_q, rows + 1), ints(cu_seqlens_k, rows + 1)
    lens = np.diff(ends).tolist()
    assert (max_seqlen_q, max_seqlen_k) == (int(np.diff(starts).max()), max(lens))
    tables = ints(block_table, rows, block_table.shape[1])
    options = {"scale": softmax_scale, "softcap": softcap or None, "window": left(window_size)}
    return over_blocks(q, k, v, starts, tables, lens, **options)


class FakeEvent:
    """What is behind it was not read before somebody waited."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


class FakeWrapper:
    """FlashInfer's BatchPrefillWithPagedKVCacheWrapper, NHD."""

    num_made = 0
    num_plans = 0
    planned: FakeWrapper | None = None  # the last one
    event: FakeEvent | None = None  # behind its last plan

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        FakeWrapper.num_made += 1

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, *, causal: bool, sm_scale: float, window_left: int,
        logits_soft_cap: float | None, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        FakeWrapper.num_plans += 1
        assert self.event is None or self.event.waited  # its plan's copy has been read
        FakeWrapper.planned, self.event = self, None
        assert causal
        rows = len(paged_kv_last_page_len)
        self.starts, ends = ints(qo_indptr, rows + 1), ints(paged_kv_indptr, rows + 1)
        indices = ints(paged_kv_indices, ends[-1])
        last = ints(paged_kv_last_page_len, rows)
        assert all(1 <= n <= page_size for n in last)
        self.tables = [indices[a:b] for a, b in pairwise(ends)]
        self.lens = [
            (len(row) - 1) * page_size + n for row, n in zip(self.tables, last, strict=True)
        ]
        window = left((window_left, 0))
        self.options = {"scale": sm_scale, "softcap": logits_soft_cap, "window": window}
        self.expected = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self.types = q_data_type, kv_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[2], q.shape[2], k.shape[1]) == self.expected
        assert (q.dtype, k.dtype) == self.types
        return over_blocks(q, k, v, self.starts, self.tables, self.lens, **self.options)


def mark(device: Any) -> FakeEvent:
    assert FakeWrapper.planned is not None
    FakeWrapper.planned.event = event = FakeEvent()
    return event


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend's name, its kernels replaced, and the rest of what it asks for as if met."""
    name = str(request.param)
    packages = {
        "flash_attn 2": {"flash_attn": {"flash_attn_varlen_func": fake_flash_attn_varlen_func}},
        "flash_attn 3": {
            "flash_attn_interface": {"flash_attn_with_kvcache": fake_flash_attn_with_kvcache}
        },
        "flashinfer": {"flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": FakeWrapper}},
        "varlen": {},
    }[name]
    for module in (flash_attn, flashinfer):
        monkeypatch.setattr(
            module,
            "installed",
            lambda n: SimpleNamespace(**packages[n]) if n in packages else "is not installed",
        )
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(varlen, "_takes_tables", lambda: True)
    monkeypatch.setattr(flashinfer, "_mark", mark)
    monkeypatch.setattr(FakeWrapper, "num_made", 0)
    monkeypatch.setattr(FakeWrapper, "num_plans", 0)
    return name.split()[0]


NAMES = ["varlen", "flashinfer", "flash_attn 2", "flash_attn 3"]


@contextmanager
def world(
    dtype: str = "float32", layout: Any = "block_major", size: int = 4, **options: Any
) -> Iterator[AttentionWorld]:
    spec = pk.KVSpec(2, 2, 64, dtype, size)
    computed = "float16" if dtype.startswith("float8") else dtype
    with pk.KVCache(
        spec, num_device_blocks=100, max_model_len=16 * size, layout=layout, **options
    ) as kv:
        yield AttentionWorld(kv, 4, getattr(torch, computed))


def call(w: AttentionWorld, q: Tensor, step: Any = None, **options: Any) -> Call:
    """Without a step for those who only look whether they can."""
    spec = w.kv.spec.layers[0]
    scale = options.get("scale") or spec.k_dim**-0.5
    given = [options.get(name) for name in ("softcap", "window", "attn_mask")]
    return Call(w.kv, step, 0, spec, q * w.kv.scales[0][0], scale, *given)


@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stand_in", NAMES, indirect=True)
def test_the_kernel_gets_its_own_tables(
    stand_in: str, options: dict[str, Any], layout: str
) -> None:
    if stand_in == "varlen" and "softcap" in options:
        pytest.skip("has no softcap")
    with world(layout=layout) as w:
        ids = w.new([9, 4, 22])
        for batch, counts in ((ids, [1, 1, 1]), ([ids[2], ids[0]], [5, 1]), (ids[:1], [13])):
            q, found = w.step(
                batch,
                counts,
                lambda q, s: BACKENDS[stand_in].attend(call(w, q, s, **options)),
            )
            expected = w.expected(batch, counts, q, **options)
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stand_in", ["flashinfer"], indirect=True)
def test_flashinfer_plans_once_for_layers_of_a_kind(stand_in: str) -> None:
    with world("float8_e4m3fn", scales=[(0.5, 1.0)] * 2) as w:
        ids = w.new([9, 4])
        for _ in range(2):
            q, (one, other) = w.step(ids, [1, 1], lambda q, s: [
                BACKENDS["flashinfer"].attend(call(w, q, s, **o))
                for o in ({}, {"window": 3}, {}, {"window": 3}, {})
            ][:2])  # fmt: skip
            for found, window in ((one, None), (other, 3)):
                expected = w.expected(ids, [1, 1], q, window=window)
                torch.testing.assert_close(found.double(), expected, atol=5e-3, rtol=5e-3)
        assert (FakeWrapper.num_made, FakeWrapper.num_plans) == (4, 4)  # two take turns
        for _ in range(3):
            w.step(ids, [1, 1], lambda q, s: BACKENDS["flashinfer"].attend(call(w, q, s)))
        assert (FakeWrapper.num_made, FakeWrapper.num_plans) == (4, 7)
        assert w.kv.backend_memory
    assert not w.kv.backend_memory  # closed


def on_gpu(monkeypatch: pytest.MonkeyPatch, w: AttentionWorld) -> None:
    """For refusals, which look at nothing there."""
    monkeypatch.setattr(w.kv, "device", torch.device("cuda"))
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")


REFUSED = [
    ("varlen", "bfloat16", {"softcap": 1.0}, 16, "has no softcap"),
    ("varlen", "bfloat16", {}, 16, None),
    ("varlen", "float32", {}, 16, "takes queries of float16 and bfloat16"),
    ("varlen", "float8_e5m2", {}, 16, "of one dtype: torch.float16, and stored are"),
    ("flashinfer", "float8_e5m2", {"softcap": 1.0}, 16, None),
    ("flashinfer", "float16", {"attn_mask": torch.ones(1)}, 16, "takes no attn_mask"),
    ("flash_attn 3", "float16", {"softcap": 1.0, "window": 3}, 16, None),
    ("flash_attn 3", "float8_e4m3fn", {}, 16, "of one dtype"),
    ("flash_attn 2", "float16", {}, 16, "block_size that is a multiple of 256, and it is 16"),
    ("flash_attn 2", "float16", {}, 256, None),
]


@pytest.mark.parametrize(
    ("stand_in", "dtype", "options", "size", "reason"), REFUSED, indirect=["stand_in"]
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    stand_in: str,
    dtype: str,
    options: dict[str, Any],
    size: int,
    reason: str | None,
) -> None:
    with world(dtype, size=size) as w:
        q = w.randn(1, 4, 64)
        if reason is None:
            assert "needs a GPU" in str(BACKENDS[stand_in].refusal(call(w, q)))
        on_gpu(monkeypatch, w)
        found = BACKENDS[stand_in].refusal(call(w, q, **options))
        assert (found is None) if reason is None else (reason in str(found))


@pytest.mark.parametrize("stand_in", NAMES, indirect=True)
def test_refusals_for_the_layer_s_shape(monkeypatch: pytest.MonkeyPatch, stand_in: str) -> None:
    for dims, reason in (((64, 32), "equal k_dim and v_dim"), ((60, 60), "multiple of 8")):
        layer = pk.LayerSpec("full", 2, *dims, "float16")
        spec = pk.KVSpec(layers=[layer], block_size=256)
        with pk.KVCache(spec, num_device_blocks=2, max_model_len=64) as kv:
            w = AttentionWorld(kv, 4, torch.float16)
            q = w.randn(1, 4, dims[0])
            on_gpu(monkeypatch, w)
            found = BACKENDS[stand_in].refusal(call(w, q))
            assert reason in str(found)


@pytest.mark.parametrize("stand_in", NAMES, indirect=True)
def test_auto_on_a_gpu_takes_the_first_that_can(
    monkeypatch: pytest.MonkeyPatch, stand_in: str
) -> None:
    with world("float16", size=256) as w, w.kv.step(w.new([0]), counts=[1]) as step:
        q = w.randn(1, 4, 64)
        on_gpu(monkeypatch, w)
        assert choose(call(w, q, step), "auto") is BACKENDS[stand_in]
        masked = call(w, q, step, attn_mask=torch.ones(1))
        assert choose(masked, "auto") is BACKENDS["gather"]


def test_torch_s_own_kernels_take_no_block_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with world("float16", size=256) as w:
        q = w.randn(1, 4, 64)
        monkeypatch.setattr(w.kv, "device", torch.device("cuda"))
        assert "activate_flash_attention_impl" in str(varlen.refusal(call(w, q)))


def test_a_torch_without_block_tables_is_told_from_one_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert varlen._takes_tables.__wrapped__()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value: None)
    assert not varlen._takes_tables.__wrapped__()
    monkeypatch.setattr(varlen, "_takes_tables", lambda: False)
    with world("float16") as w:
        assert "needs torch 2.13" in str(varlen.refusal(call(w, w.randn(1, 4, 64))))


@pytest.fixture
def _kernels(name: str) -> Iterator[None]:
    """torch told to use kernels that take block tables, if they are installed."""
    if name != "varlen":
        yield
        return
    three = torch.cuda.get_device_capability()[0] == 9
    pytest.importorskip("flash_attn_interface" if three else "flash_attn.cute.interface")
    torch.nn.attention.activate_flash_attention_impl("FA3" if three else "FA4")
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.gpu
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "blockwise"])
def test_on_a_gpu_it_is_dense_attention(
    name: str, layout: str, dtype: str, options: dict[str, Any]
) -> None:
    size = 256 if name == "flash_attn" else 16
    torch._dynamo.reset()  # variants of "flex" that others have compiled
    with world(dtype, layout, size, device="cuda:0") as w:
        ids = w.new([3 * size + 5, size, 7])
        try:
            w.check(name, ids, [1, 1, 1], **options)
        except InvalidSpec as error:  # not installed, or not for this
            pytest.skip(str(error))
        w.check(name, [ids[2], ids[0]], [2 * size, 1], **options)
        w.check(name, [*w.kv.fork(ids[1], 3), ids[0]], [1] * 4, **options)
