"""K and V stored in 8 bits: scales, rounding, the same bits on the CPU and by the kernel."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.fp8 import to_fp8  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda  # noqa: E402

FORMATS = ["float8_e4m3fn", "float8_e5m2"]
SOURCES = [torch.bfloat16, torch.float16, torch.float32]
SCALES = [(0.25, 4.0), (1.0, 3.0)]
SHAPE = 2, 16  # heads, head_dim


def cache(dtype: str, **options: Any) -> pk.KVCache:
    spec = pk.KVSpec(2, *SHAPE, dtype, 4)
    return pk.KVCache(spec, num_device_blocks=40, max_batch=4, **options)


def write(kv: pk.KVCache, k: torch.Tensor, v: torch.Tensor) -> int:
    """A sequence of these tokens, in both layers. Returns its id."""
    seq = kv.create()
    with kv.step([seq], counts=[len(k)]) as step:
        for layer in range(2):
            kv.write(layer, k, v, step)
    return seq


def stored(kv: pk.KVCache, seq: int) -> list[torch.Tensor]:
    """Per layer the bits of keys and of values, [tokens, heads, dim]."""
    table, length = kv.block_table(seq), kv.length(seq)
    rows = torch.as_tensor(table, dtype=torch.int64, device=kv.device)
    pools = [pool for layer in range(2) for pool in (kv.k(layer), kv.v(layer))]
    return [pool.view(torch.uint8)[rows].flatten(0, 1)[:length].cpu() for pool in pools]


def values(dtype: torch.dtype, num_tokens: int = 9) -> torch.Tensor:
    """Of all sizes, those that are too large and NaN among them."""
    torch.manual_seed(num_tokens)
    sizes = torch.logspace(-9, 5, num_tokens * 32).reshape(num_tokens, *SHAPE)
    found = sizes * torch.randn(num_tokens, *SHAPE).sign()
    found[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return found.to(dtype)


@pytest.mark.parametrize("device", ["simulated", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_kernel_and_the_cpu_store_the_same_bits(
    dtype: str, source: torch.dtype, device: str
) -> None:
    k, v = values(source), values(source).flip(0)
    cuda, on_gpu = SimulatedCuda(1), device == "cuda:0"
    with (
        cache(dtype, scales=SCALES) as there,
        cache(dtype, scales=SCALES, device=device if on_gpu else CudaDevice(cuda)) as kv,
    ):
        expected = stored(there, write(there, k, v))
        seq = write(kv, k.to(kv.device), v.to(kv.device))
        kv.machine.land()
        assert on_gpu or cuda.num_calls("scatter_fp8") == 2
        assert cuda.num_calls("scatter_kv") == 0
        for found, wanted in zip(stored(kv, seq), expected, strict=True):
            is_nan = wanted.view(getattr(torch, dtype)).float().isnan()
            assert 0 < is_nan.sum() < 3
            assert found.view(getattr(torch, dtype)).float()[is_nan].isnan().all()
            assert torch.equal(found[~is_nan], wanted[~is_nan])
    assert cuda.violations == []


@pytest.mark.parametrize("dtype", FORMATS)
def test_stored_times_scale_is_the_nearest_that_8_bits_can_say(dtype: str) -> None:
    form = getattr(torch, dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(form).float()
    codes = codes[codes.isfinite()].sort().values
    scale, largest = 0.5, torch.finfo(form).max
    real = torch.cat((values(torch.float32).flatten(), codes * scale, (codes + 1e-3) * scale))
    real = real[real.isfinite()]
    found = to_fp8(real, scale, form).float()
    nearest = (real / scale).clamp(-largest, largest)
    best = (codes[None] - nearest[:, None]).abs().min(1).values
    assert torch.equal((found - nearest).abs(), best)
    assert to_fp8(torch.tensor([torch.inf, -torch.inf]), 1, form).tolist() == [largest, -largest]
    assert to_fp8(torch.tensor([torch.nan]), 1, form).isnan().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_reads_with_the_scales(softcap: float | None, shared: bool) -> None:
    torch.manual_seed(0)
    k, v = 20 * torch.randn(9, *SHAPE), 500 * torch.randn(9, *SHAPE)
    scales = [(0.125, 4.0), (0.125, 4.0)]
    with cache("float8_e4m3fn", scales=scales) as kv:
        form = torch.float8_e4m3fn
        exact = [to_fp8(t, s, form).float() * s for t, s in zip((k, v), scales[0], strict=True)]
        seqs = kv.fork(write(kv, k[:8], v[:8]), 3 if shared else 1)
        n = len(seqs)
        with kv.step(seqs) as step:
            q = torch.randn(n, 4, SHAPE[1])
            kv.write(1, k[8:].expand(n, -1, -1), v[8:].expand(n, -1, -1), step)
            kv.write(0, k[8:].expand(n, -1, -1), v[8:].expand(n, -1, -1), step)
            found = kv.attention(1, q, step, softcap=softcap)
    keys, vals = (t.repeat_interleave(2, 1).transpose(0, 1) for t in exact)  # [4, 9, dim]
    scores = torch.einsum("nhd,htd->nht", q, keys) * SHAPE[1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    expected = torch.einsum("nht,htd->nhd", scores.softmax(-1), vals)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_products_of_float16_with_what_is_stored_do_not_overflow(num_rows: int) -> None:
    k, q = torch.full((5, *SHAPE), 8.0), torch.full((num_rows, 2, SHAPE[1]), 30.0)
    with cache("float8_e4m3fn", scales=[(0.02, 1.0)] * 2) as kv:
        seqs = kv.fork(write(kv, k[:4], k[:4]), num_rows)
        with kv.step(seqs) as step:
            kv.write(0, k[:1].expand(num_rows, -1, -1), k[:1].expand(num_rows, -1, -1), step)
            found = kv.attention(0, q.half(), step)
    assert (30 * 8 / 0.02) * SHAPE[1] > torch.finfo(torch.float16).max
    assert torch.equal(found, torch.full_like(found, 8.0))


def test_generate_has_no_scales_so_a_paged_cache_refuses_8_bits() -> None:
    pytest.importorskip("transformers")
    with cache("float8_e4m3fn") as kv, pytest.raises(pk.InvalidSpec, match="layer 0 is stored"):
        pk.PagedCache(kv)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_in_8_bits_already_is_stored_as_it_is(device: str) -> None:
    form = torch.float8_e5m2
    k = torch.randint(0, 124, (5, *SHAPE), dtype=torch.uint8)
    options: dict[str, Any] = {"device": CudaDevice(SimulatedCuda())} if device == "cuda" else {}
    with cache("float8_e5m2", scales=SCALES, **options) as kv:
        seq = write(kv, k.view(form), k.view(form))
        kv.machine.land()
        assert all(torch.equal(bits, k) for bits in stored(kv, seq))
        mixed = write(kv, k.view(form), k.view(form).float() * SCALES[0][1])  # two types at once
        kv.machine.land()
        assert all(torch.equal(bits, k) for bits in stored(kv, mixed)[:2])


@pytest.mark.parametrize(
    ("dtype", "scales", "message"),
    [
        ("float8_e4m3fn", [(1.0, 1.0)], "1 entries, expected 2"),
        ("float8_e4m3fn", [(1.0, 1.0), (1.0,)], r"scales\[1\]"),
        ("float8_e4m3fn", [(1.0, 1.0), "ab"], r"scales\[1\]"),
        ("float8_e4m3fn", [(1.0, 0.0), (1.0, 1.0)], "positive"),
        ("float8_e4m3fn", [(float("nan"), 1.0), (1.0, 1.0)], "positive"),
        ("float8_e4m3fn", [(1e-50, 1.0), (1.0, 1.0)], "positive"),
        ("float8_e4m3fn", [(1.0, 1.0), (1.0, 1e39)], "positive"),
        ("bfloat16", [(1.0, 2.0), (1.0, 1.0)], "stored as bfloat16"),
    ],
)
def test_scales_that_mean_nothing_are_refused(dtype: str, scales: Any, message: str) -> None:
    with pytest.raises(pk.InvalidSpec, match=message):
        cache(dtype, scales=scales)
