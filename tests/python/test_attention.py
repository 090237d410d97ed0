"""Every backend of kv.attention gives dense attention, or says why it cannot and which can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from attention_world import AttentionWorld  # noqa: E402
from pagedkv import InvalidSpec, InvalidState  # noqa: E402
from pagedkv.attention import BACKENDS, blockwise, decode  # noqa: E402
from pagedkv.attention import _choose as choose  # noqa: E402
from pagedkv.attention.call import Call  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

torch.set_num_threads(1)

HERE = ["gather", "blockwise", "flex"]  # what a CPU can run
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"window": 5}, {"window": 1}, {"scale": 0.7}]
OPTIONS += [{"softcap": 3.0, "window": 11}, {"scale": -0.3, "softcap": 2.0}, {"window": 1 << 40}]


@pytest.fixture(autouse=True)
def _small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens are many runs of blocks, and several tiles of queries."""
    monkeypatch.setattr(blockwise, "RUN_BYTES", 1)
    monkeypatch.setattr(blockwise, "SHARED_BYTES", 1)
    monkeypatch.setattr(blockwise, "QUERY_TILE", 6)


@contextmanager
def world(
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: str = "float32",
    layout: Any = "layer_major",
    seed: int = 0,
    kind: Any = "full",
    **options: Any,
) -> Iterator[AttentionWorld]:
    """`heads` of queries and of K and V, `dims` of K and of V."""
    layer = pk.LayerSpec(kind, heads[1], *dims, dtype)
    spec = pk.KVSpec(layers=[layer, replace(layer)], block_size=4)
    computed = "bfloat16" if dtype.startswith("float8") else dtype
    with pk.KVCache(spec, num_device_blocks=120, layout=layout, **options) as kv:
        for pool in kv.read(0):  # where anything was before
            pool.view(torch.uint8).fill_(0xFF)
            assert pool.float().isnan().all()
        yield AttentionWorld(kv, heads[0], getattr(torch, computed), seed)


def mixed(w: AttentionWorld, backend: str, **options: Any) -> None:
    """Prefill, chunks, decode, all three at once, and beams."""
    w.check(backend, [w.kv.create()], [13], **options)
    ids = w.new([9, 0, 4, 22])
    w.check(backend, ids, [1, 7, 5, 3], **options)
    w.check(backend, ids, [1, 1, 1, 1], **options)
    w.check(backend, [ids[2], ids[0], ids[3], ids[1]], [1, 1, 14, 1], **options)
    beams = w.kv.fork(ids[3], 3)
    w.check(backend, [*beams, ids[0], *w.kv.fork(ids[1], 2)], [1] * 6, **options)
    w.check(backend, [*beams, ids[0]], [2, 2, 2, 1], **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_it_is_dense_attention(backend: str, options: dict[str, Any]) -> None:
    with world() as w:
        mixed(w, backend, **options)


@pytest.mark.parametrize("dims", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("backend", HERE)
def test_heads_in_groups_and_values_of_another_size(
    backend: str, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    with world(heads, dims) as w:
        mixed(w, backend)


@pytest.mark.parametrize("heads", [(31, 1), (32, 1), (62, 2), (64, 2)])
def test_our_kernel_is_for_few_query_heads_to_one_of_keys(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's products are quicker for more."""
    calls: list[int] = []
    attend = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *a: (calls.append(1), attend(*a))[1])
    with world(heads) as w:
        mixed(w, "auto")
        mixed(w, "blockwise")
    assert bool(calls) == (heads[0] // heads[1] < 32)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 5}], ids=str)
@pytest.mark.parametrize("dims", [(64, 8), (16, 16), (24, 40)])
@pytest.mark.parametrize("backend", ["gather", "blockwise"])
def test_latents(backend: str, dims: tuple[int, int], options: dict[str, Any]) -> None:
    with world((6, 1), dims, kind="latent") as w:
        mixed(w, backend, scale=0.1, **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 5}], ids=str)
@pytest.mark.parametrize("kind", ["full", "latent"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("backend", ["gather", "blockwise"])
def test_narrow_types_and_both_layouts(
    backend: str, layout: str, dtype: str, kind: str, options: dict[str, Any]
) -> None:
    scales = [(0.25, 2.0), (1.0, 1.0)] if dtype.startswith("float8") else None
    heads = (4, 1 if kind == "latent" else 2)
    with world(heads, dtype=dtype, layout=layout, scales=scales, kind=kind) as w:
        mixed(w, backend, scale=0.25, **options)


@pytest.mark.parametrize("backend", HERE)
def test_random_batches(backend: str, runs: int, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + max(1, runs // 6)):
        random = np.random.default_rng(seed)
        message = f"run again with --first-seed={seed} --runs=1"
        with world(((2, 2), (4, 2), (4, 1))[seed % 3], seed=seed) as w:
            ids = w.new(random.integers(0, 40, 4).tolist())
            for _ in range(4):
                picked = random.permutation(ids)[: random.integers(1, 5)]
                counts = np.where(random.random(len(picked)) < 0.6, 1, random.integers(1, 16))
                options = OPTIONS[random.integers(len(OPTIONS))]
                try:
                    w.check(backend, picked, counts.tolist(), **options)
                except AssertionError as error:
                    raise AssertionError(f"{error}\n{message}") from error
                if random.random() < 0.3:
                    w.kv.reorder(np.array(ids), random.integers(0, len(ids), len(ids)))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("device", ["simulated", "cuda"])
def test_work_that_is_still_queued_is_waited_for(device: str, backend: str) -> None:
    machine = SimulatedDevice(1, schedule="lazy") if device == "simulated" else None
    cuda = SimulatedCuda(1, schedule="lazy")
    with world(device=machine or CudaDevice(cuda)) as w:
        mixed(w, backend)
    assert cuda.violations == []
    assert machine is None or machine.violations == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_one_token_are_read_off_their_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Also long ones, whose softmax runs over several parts, and beams, with nothing gathered."""
    monkeypatch.setattr(blockwise, "SHARED_BYTES", 1 << 20)
    with world((6, 2), dtype=dtype) as w:
        ids = w.new([300, 1, 0])
        beams = w.kv.fork(ids[0], 3)
        w.kv.reorder(np.array(ids), np.array([0, 0, 2]))
        monkeypatch.setattr(w.kv, "gather_blocks", None)
        for options in OPTIONS:
            w.check("blockwise", ids, [1, 1, 1], **options)
            w.check("auto", [*beams, ids[2]], [1] * 4, **options)


def test_the_kernel_leaves_float64_to_others() -> None:
    with world() as w:
        ids, q = w.new([7]), torch.randn(1, 4, 16)
        for odd, takes in ((q, True), (q.double(), False), (q.half(), True)):
            _, (found, out) = w.step(
                ids, [1],
                lambda _, s, odd=odd: (
                    decode.takes(plain(w.kv, odd, s)),
                    w.kv.attention(0, odd, s, backend="blockwise"),
                ),
            )  # fmt: skip
            assert found == takes
            assert out.dtype == odd.dtype


IN_A_CHILD = """
import os, sys, numpy as np, torch, pagedkv as pk
kv = pk.KVCache(pk.KVSpec(1, 8, 128, "float32"), num_device_blocks=200)
sequences, random = np.array([kv.create(), kv.create()]), torch.Generator().manual_seed(0)
with kv.step(sequences, counts=np.array([1500, 300])) as step:
    k = torch.randn(1800, 8, 128, generator=random)
    kv.write(0, k, k, step)
step, q = kv.step(sequences, counts=np.array([1, 1])), torch.randn(2, 16, 128, generator=random)
kv.write(0, k[:2], k[:2], step)
found, helpers = [], []
for num_threads in (1, 2, 7):
    torch.set_num_threads(num_threads)
    before = len(os.listdir("/proc/self/task"))
    found.append(kv.attention(0, q, step))
    helpers.append(len(os.listdir("/proc/self/task")) - before)
    torch.testing.assert_close(found[-1], kv.attention(0, q, step, backend="gather"))
assert helpers == [0, 1, 5], helpers  # there is work for so many, and they stay
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kv.attention(0, q, step), found[-1]) else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_the_kernel_takes_as_many_threads_as_torch_has_and_in_a_forked_child_one() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


CLOSED_BY_ANOTHER_THREAD = """
import threading, time, numpy as np, torch, pagedkv as pk
torch.set_num_threads(1)
kv = pk.KVCache(pk.KVSpec(1, 8, 128, "float32"), num_device_blocks=600)
sequence = kv.create()
step = kv.step([sequence], counts=[8000])
step.commit()
step, ended = kv.step([sequence]), []
def work():
    try:
        while True:
            kv.attention(0, torch.ones(1, 32, 128), step)
            kv.write(0, torch.ones(1, 8, 128), torch.ones(1, 8, 128), step)
    except pk.KVError as error:
        ended.append(error)
thread = threading.Thread(target=work)
thread.start()
time.sleep(0.2)
kv.close()
thread.join()
assert len(ended) == 1
"""


def test_a_cache_that_is_closed_meanwhile_is_there_until_its_kernel_has_ended() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CLOSED_BY_ANOTHER_THREAD], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_blockwise_gathers_a_run_of_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(dtype="float16") as w:  # for which there is no kernel
        token_bytes = w.kv.spec.layers[0].k_bytes + w.kv.spec.layers[0].v_bytes
        monkeypatch.setattr(blockwise, "RUN_BYTES", 16 * token_bytes)
        ids = w.new([300])
        w.check("blockwise", ids, [1])
        w.check("blockwise", ids, [6])
        held = sum(memory.nbytes for memory, _ in w.kv._workspaces.values())
        assert 0 < held <= 16 * token_bytes * 5 // 4
        w.check("gather", ids, [1])
        assert sum(memory.nbytes for memory, _ in w.kv._workspaces.values()) > 300 * token_bytes


@pytest.mark.parametrize(("dtype", "tails"), [("float32", 0), ("float16", 3)])
def test_blockwise_reads_what_rows_share_once(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tails: int
) -> None:
    """The kernel reads the rest off its blocks, where there is one."""
    with world(dtype=dtype) as w:
        read: list[tuple[int, int]] = []
        gather = w.kv.gather_blocks

        def counted(layer: int, tables: Any, first: int, num: Any, width: int) -> Any:
            read.append((first, width))
            return gather(layer, tables, first, num, width)

        monkeypatch.setattr(w.kv, "gather_blocks", counted)
        beams = w.kv.fork(w.new([40])[0], 3)
        w.check("blockwise", beams, [1, 1, 1])
        assert sum(first < 10 for first, _ in read) == 10  # blocks that all three have
        assert sum(first >= 10 for first, _ in read) == tails


def plain(kv: pk.KVCache, q: torch.Tensor, step: pk.Step) -> Call:
    return Call(kv, step, 0, kv.spec.layers[0], q, 1.0, None, None, None)


def test_auto_on_a_cpu_takes_the_kernel_and_else_goes_by_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world(dtype="float16") as w:
        monkeypatch.setattr(blockwise, "RUN_BYTES", 19 * w.kv.spec.token_bytes // 4)
        ids = w.new([18])
        for expected in ("gather", "blockwise"):
            _, found = w.step(ids, [1], lambda q, s: choose(plain(w.kv, q, s), "auto"))
            assert found is BACKENDS[expected]
        w.check("auto", ids, [1])
    monkeypatch.setattr(blockwise, "RUN_BYTES", 1 << 20)
    for dims, expected in (((16, 16), "blockwise"), ((12, 16), "gather"), ((16, 12), "gather")):
        with world(dims=dims) as w:
            for counts, its in (([1, 1], expected), ([1, 9], expected), ([5, 9], "gather")):
                found = w.step(
                    w.new([7, 0]), counts, lambda q, s, w=w: choose(plain(w.kv, q, s), "auto")
                )[1]
                assert found is BACKENDS[its]


def test_the_tables_in_one_piece() -> None:
    with world() as w:
        ids = w.new([7, 0, 12, 3])
        with w.kv.step(np.array(ids), counts=np.array([1, 3, 1, 6])) as step:
            csr, lens, tables = step.csr(), step.plan.seq_lens, step.plan.block_tables
            assert [t.dtype for t in csr] == [torch.int32] * 3
            expected = [tables[b, : -(-n // 4)].tolist() for b, n in enumerate(lens)]
            assert csr.kv_indptr.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
            assert csr.kv_indices.tolist() == [block for row in expected for block in row]
            assert csr.kv_last_page_len.tolist() == [4, 3, 1, 1]
            assert step.csr() is csr
        with w.kv.step(np.array(ids), counts=np.ones(4, np.int64)), \
                pytest.raises(InvalidState, match="before the next"):  # fmt: skip
            step.csr()


REFUSED = [
    ("varlen", {}, r'backend "varlen" needs a GPU.*these can: "gather", "blockwise", "flex"'),
    ("flashinfer", {}, r'"flashinfer" is not installed; these can: "gather"'),
    ("flash_attn", {}, r'"flash_attn" is not installed; these can: "gather"'),
    (
        "blockwise",
        {"attn_mask": torch.ones(1, 1, 2, 2)},
        r'takes no attn_mask but one that hides beginnings.*; these can: "gather"$',
    ),
    ("flex", {"attn_mask": torch.ones(1, 1, 2, 2)}, r'takes no attn_mask; these can: "gather"$'),
    ("sdpa", {}, r"backend is 'sdpa', expected \"auto\" or one of \"gather\", \"blockwise\""),
    (None, {}, r"backend is None, expected"),
    ("auto", {"softcap": 0.0}, "softcap is 0.0, expected"),
    ("auto", {"softcap": -1}, "softcap is -1, expected"),
    ("auto", {"softcap": float("nan")}, "softcap is nan, expected"),
    ("auto", {"window": 0}, "window is 0, expected"),
]


@pytest.mark.parametrize(("backend", "options", "message"), REFUSED)
def test_what_cannot_be_says_what_can(backend: Any, options: Any, message: str) -> None:
    installed = {"flashinfer": "flashinfer", "flash_attn": "flash_attn"}.get(str(backend))
    if installed and not isinstance(BACKENDS[installed].installed(installed), str):  # type: ignore[attr-defined]
        pytest.skip(f"{installed} is installed")
    with world() as w, pytest.raises(InvalidSpec, match=message):
        w.step(
            [w.kv.create()],
            [2],
            lambda q, step: w.kv.attention(0, q, step, backend=backend, **options),
        )


def test_queries_of_no_heads_or_from_elsewhere_are_refused() -> None:
    with world() as w, w.kv.step(np.array([w.kv.create()]), counts=np.array([2])) as step:
        with pytest.raises(InvalidSpec, match="q has 0 heads"):
            w.kv.attention(0, torch.zeros(2, 0, 16), step)
        with pytest.raises(InvalidSpec, match="q is on meta, expected cpu"):
            w.kv.attention(0, torch.zeros(2, 4, 16, device="meta"), step)
