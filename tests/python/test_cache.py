"""KVCache on CPU tensors: contents, attention, closing, errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pagedkv import InvalidSpec, InvalidState, KVCache, KVSpec, LayerSpec, OutOfBlocks  # noqa: E402

torch.set_num_threads(1)  # small tensors; and other processes may want the cores

LAYOUTS = ["block_major", "layer_major"]
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture(params=LAYOUTS)
def kv(request: pytest.FixtureRequest) -> Iterator[KVCache]:
    spec = KVSpec(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_size=4)
    with KVCache(spec, num_device_blocks=100, layout=request.param) as cache:
        yield cache


class Mirror:
    """Dense K and V of every sequence, beside the cache."""

    def __init__(self, kv: KVCache, layer: int = 0, query_heads: int = 4) -> None:
        self.kv, self.layer, self.query_heads = kv, layer, query_heads
        self.random = torch.Generator().manual_seed(0)
        self.rows: dict[int, tuple[Any, Any]] = {}

    def randn(self, *shape: int) -> Any:
        return torch.randn(*shape, generator=self.random)

    def step(self, ids: Any, counts: list[int], **options: Any) -> None:
        """Append, write, attend; the answer must be dense attention's."""
        spec = self.kv.spec.layers[self.layer]
        total = sum(counts)
        k = self.randn(total, spec.num_kv_heads, spec.k_dim)
        v = self.randn(total, spec.num_kv_heads, spec.v_dim)
        q = self.randn(total, self.query_heads, spec.k_dim)
        with self.kv.step(ids, counts=counts) as step:
            self.kv.write(self.layer, k, v, step)
            found = self.kv.attention(self.layer, q, step, **options)
        at = 0
        for id, count in zip(ids, counts, strict=True):
            new = slice(at, at + count)
            old = self.rows.get(int(id), (k[:0], v[:0]))
            self.rows[int(id)] = tuple(
                torch.cat((a, b[new])) for a, b in zip(old, (k, v), strict=True)
            )
            expected = dense(q[new], *self.rows[int(id)], **options)
            torch.testing.assert_close(found[new], expected, atol=1e-5, rtol=1e-4)
            at += count

    def fork(self, id: int, n: int) -> Any:
        ids = self.kv.fork(id, n)
        self.rows.update({int(i): self.rows[int(id)] for i in ids})
        return ids

    def reorder(self, ids: Any, parents: list[int]) -> None:
        self.kv.reorder(ids, parents)
        old = dict(self.rows)
        self.rows.update({int(i): old[int(ids[p])] for i, p in zip(ids, parents, strict=True)})

    def check(self) -> None:
        """Every sequence's K and V through its block table."""
        for id, (k, v) in self.rows.items():
            table = torch.from_numpy(self.kv.manager.block_table(id)).long()
            for pool, expected in ((self.kv.k, k), (self.kv.v, v)):
                rows = pool(self.layer)[table].flatten(0, 1)[: len(expected)]
                assert torch.equal(rows, expected)
        self.kv.manager.verify()


def dense(q: Any, k: Any, v: Any, scale: float | None = None, softcap: float | None = None,
          window: int | None = None) -> Any:  # fmt: skip
    """Causal attention of the last len(q) tokens, written out in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * (scale or q.shape[2] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    hidden = torch.arange(len(k)) > at
    if window is not None:
        hidden |= torch.arange(len(k)) <= at - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).float()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 5}, {"scale": 0.7}])
def test_attention_is_dense_attention(kv: KVCache, options: dict[str, Any]) -> None:
    mirror = Mirror(kv, layer=1)
    first = kv.create()
    mirror.step([first], [13], **options)
    beams = mirror.fork(first, 4)
    for _ in range(9):
        mirror.step(beams, [1] * 4, **options)
    mirror.reorder(beams, [2, 2, 0, 1])
    mirror.step(beams, [1] * 4, **options)
    other = kv.create()
    mirror.step([other, *beams[1:3]], [6, 1, 3], **options)  # prefill, decode and chunk together
    twins = mirror.fork(other, 2)
    mirror.step([*beams, *twins], [1] * 6, **options)  # two shared runs in one batch
    mirror.check()


def test_gather_gives_whole_sequences_and_zeros_behind(kv: KVCache) -> None:
    mirror = Mirror(kv)
    a, b = kv.create(), kv.create()
    mirror.step([a, b], [11, 5])
    with kv.step([b, a]) as step:
        k, v = torch.ones(2, 2, 8), torch.full((2, 2, 8), 2.0)
        kv.write(0, k, v, step)
        found_k, found_v = kv.gather(0, step)
    assert found_k.shape == found_v.shape == (2, 2, 12, 8)
    assert torch.equal(found_k[1, :, :11], mirror.rows[a][0].transpose(0, 1))
    assert torch.equal(found_k[0, :, 5], torch.ones(2, 8))
    assert torch.equal(found_v[0, :, 6:], torch.zeros(2, 6, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_types(dtype: str, layout: Any) -> None:
    kv = KVCache(KVSpec(1, 2, 8, dtype, 4), num_device_blocks=10, layout=layout)
    sequence = kv.create()
    k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    with kv.step([sequence], counts=[5]) as step:
        kv.write(0, k, v, step)
        found = kv.attention(0, torch.randn(5, 2, 8), step)
    stored = kv.k(0)[torch.from_numpy(kv.manager.block_table(sequence)).long()].flatten(0, 1)[:5]
    assert torch.equal(stored.float(), k.to(getattr(torch, dtype)).float())
    assert torch.isfinite(found).all()
    assert kv.k(0).dtype == kv.v(0).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_different_shapes(layout: Any) -> None:
    spec = KVSpec(
        layers=[
            LayerSpec("full", 2, 8, 4, "float32"),
            LayerSpec("sliding", 1, 16, 16, "float32", window=3),
        ],
        block_size=4,
    )
    with KVCache(spec, num_device_blocks=20, layout=layout) as kv:
        for layer, options in ((0, {}), (1, {})):
            mirror = Mirror(kv, layer=layer, query_heads=2)
            sequence = kv.create()
            if layer == 1:  # its own window applies without being asked for
                q = torch.randn(7, 2, 16)
                k = torch.randn(7, 1, 16)
                with kv.step([sequence], counts=[7]) as step:
                    kv.write(1, k, k, step)
                    found = kv.attention(1, q, step)
                torch.testing.assert_close(found, dense(q, k, k, window=3), atol=1e-5, rtol=1e-4)
            else:
                mirror.step([sequence], [7], **options)
                mirror.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pool_is_as_large_as_the_spec_says(layout: Any) -> None:
    spec = KVSpec(3, 2, 8, "float16", 4)
    kv = KVCache(spec, device_memory=spec.pool_bytes(7), layout=layout)
    assert kv.manager.num_device_blocks == 7
    assert kv.pool_bytes == spec.pool_bytes(7)
    parts = [t for layer in kv.pools() for t in layer]
    assert sum(t.nbytes for t in parts) == kv.pool_bytes
    first = min(t.data_ptr() for t in parts)
    assert max(t.data_ptr() + t.untyped_storage().nbytes() for t in parts) - first == kv.pool_bytes
    assert len({t.data_ptr() for t in parts}) == 6
    assert all(t.storage_offset() == 0 for t in parts)  # see torch.compile
    assert kv.k(0).shape == (8, 4, 2, 8)


def test_copy_on_write_keeps_forks_apart(kv: KVCache) -> None:
    mirror = Mirror(kv)
    first = kv.create()
    mirror.step([first], [6])
    forks = mirror.fork(first, 3)
    mirror.step(forks[1:2], [1])  # the others still hold the open block
    mirror.step(forks, [1, 2, 1])
    mirror.check()
    kv.truncate(forks[:1], [5])
    mirror.rows[int(forks[0])] = tuple(t[:5] for t in mirror.rows[int(forks[0])])
    mirror.step(forks[:1], [4])
    mirror.check()


def test_a_random_program_keeps_every_byte(kv: KVCache) -> None:
    random = np.random.default_rng(5)
    mirror = Mirror(kv)
    ids: list[int] = []
    for _ in range(300):
        action = random.integers(6)
        if not ids or (action == 0 and len(ids) < 6):
            ids.append(kv.create())
            mirror.rows[ids[-1]] = (torch.empty(0, 2, 8), torch.empty(0, 2, 8))
        elif action == 1 and len(ids) < 8:
            ids += [int(i) for i in mirror.fork(int(random.choice(ids)), 3)[1:]]
        elif action == 2:
            gone = ids.pop(int(random.integers(len(ids))))
            kv.release([gone])
            del mirror.rows[gone]
        elif action == 3:
            mirror.reorder(np.array(ids), random.integers(0, len(ids), len(ids)).tolist())
        elif action == 4:
            id = int(random.choice(ids))
            keep = int(random.integers(kv.length(id) + 1))
            kv.truncate([id], [keep])
            mirror.rows[id] = tuple(t[:keep] for t in mirror.rows[id])
        else:
            batch = [int(i) for i in random.permutation(ids)[: 1 + random.integers(len(ids))]]
            counts = random.integers(1, 6, len(batch)).tolist()
            if kv.num_needed(batch, counts) <= kv.stats().device.num_free:
                mirror.step(batch, counts)
        mirror.check()


def test_an_exception_rolls_the_step_back(kv: KVCache) -> None:
    sequence = kv.create()
    with pytest.raises(ZeroDivisionError), kv.step([sequence], counts=[3]):
        _ = 1 / 0
    assert kv.length(sequence) == 0
    with kv.step([sequence], counts=[3]) as step:
        step.commit(lengths=[2])
    assert kv.length(sequence) == 2
    assert kv.stats().num_steps == 1


def test_tokens_make_prefix_hits(kv: KVCache) -> None:
    prompt = np.arange(11)
    first = kv.create(prompt)
    with kv.step([first], prompt, counts=[11]) as step:
        assert torch.equal(step.input_ids, torch.arange(11))
        kv.write(0, torch.randn(11, 2, 8), torch.randn(11, 2, 8), step)
    kept = kv.k(0)[torch.from_numpy(kv.manager.block_table(first)[:2]).long()].clone()
    kv.release([first])
    second = kv.create(torch.arange(11))
    assert kv.num_cached(second) == kv.lookup(prompt).num_tokens == 8
    again = kv.k(0)[torch.from_numpy(kv.manager.block_table(second)).long()]
    assert torch.equal(again, kept)


@contextmanager
def warn_always() -> Iterator[None]:
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(False)


def test_step_outputs_are_tensors(kv: KVCache) -> None:
    ids = [kv.create(), kv.create()]
    with warn_always(), warnings.catch_warnings(), kv.step(ids, counts=[5, 2]) as step:
        warnings.simplefilter("error")  # such as that the plan's arrays are read only
        assert step.seq_lens.tolist() == [5, 2]
        assert step.query_starts.tolist() == [0, 5, 7]
        assert step.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
        assert step.slots.dtype == torch.int64
        assert step.block_tables.dtype == torch.int32
        assert (step.slots // 4).tolist() == [
            *step.block_tables[0].repeat_interleave(4)[:5].tolist(),
            *step.block_tables[1].repeat_interleave(4)[:2].tolist(),
        ]
        with pytest.raises(InvalidState, match="without tokens"):
            _ = step.input_ids


@pytest.mark.parametrize(
    "name", ["input_ids", "slots", "positions", "query_starts", "seq_lens", "block_tables"]
)
def test_a_step_whose_buffers_are_another_ones_says_so(kv: KVCache, name: str) -> None:
    a = kv.create([])
    with kv.step([a], [1, 2], counts=[2]) as old:
        assert old.slots_at == old.slots.data_ptr()
        before = getattr(old, name).clone()
    assert getattr(old, name).equal(before)  # closed, and still what it was
    with kv.step([a], [3]) as new:
        getattr(new, name)
        with pytest.raises(InvalidState, match="before the next"):
            getattr(old, name)
        with pytest.raises(InvalidState, match="before the next"):
            _ = old.slots_at


@pytest.mark.parametrize("command", ["ready", "wait", "resume"])
def test_ids_are_a_batch(kv: KVCache, command: str) -> None:
    a = kv.create()
    for bad in (5, [a + 0.7], [str(a)]):
        with pytest.raises(InvalidSpec, match=r"ids is .*, expected a batch"):
            getattr(kv, command)(bad)


def test_a_closed_step_or_another_cache_s_is_refused(kv: KVCache) -> None:
    sequence, k = kv.create(), torch.zeros(1, 2, 8)
    with kv.step([sequence]) as step:
        pass
    for closed in (step, None):
        with pytest.raises(InvalidState, match="not open"):
            kv.write(0, k, k, closed)  # type: ignore[arg-type]
    with KVCache(kv.spec, num_device_blocks=4) as other, other.step([other.create()]) as theirs:
        with pytest.raises(InvalidState, match="not open"):
            kv.write(0, k, k, theirs)
        with pytest.raises(InvalidState, match="not open"):
            kv.attention(0, k, theirs)


def test_wrong_tensors_are_refused(kv: KVCache) -> None:
    good = torch.zeros(2, 2, 8)
    with kv.step([kv.create()], counts=[2]) as step:
        for bad in (torch.zeros(1, 2, 8), torch.zeros(2, 1, 8), torch.zeros(2, 16)):
            with pytest.raises(InvalidSpec, match="k is"):
                kv.write(0, bad, good, step)
        with pytest.raises(InvalidSpec, match="v is"):
            kv.write(0, good, torch.zeros(2, 2, 7), step)
        with pytest.raises(InvalidSpec, match="k is"):
            kv.write(0, good.to("meta"), good, step)
        with pytest.raises(InvalidSpec, match="q is"):
            kv.attention(0, torch.zeros(2, 4, 7), step)
        with pytest.raises(InvalidSpec, match="heads"):
            kv.attention(0, torch.zeros(2, 3, 8), step)
        with pytest.raises(InvalidSpec, match="backend"):
            kv.attention(0, torch.zeros(2, 4, 8), step, backend="nothing")
        for layer in (-1, 2, True):
            with pytest.raises(InvalidSpec, match="layer"):
                kv.write(layer, good, good, step)


def test_strided_keys_are_written_right(kv: KVCache) -> None:
    dense_k = torch.randn(2, 3, 8).transpose(0, 1)  # [3, 2, 8], heads outermost in memory
    sequence = kv.create()
    with kv.step([sequence], counts=[3]) as step:
        kv.write(0, dense_k, dense_k[:, :, ::1].flip(2), step)
    block = int(kv.manager.block_table(sequence)[0])
    assert torch.equal(kv.k(0)[block, :3], dense_k)
    assert torch.equal(kv.v(0)[block, :3], dense_k.flip(2))


def test_out_of_blocks_leaves_the_cache_usable() -> None:
    with KVCache(KVSpec(1, 1, 4, "float32", 4), num_device_blocks=2, max_model_len=99) as kv:
        sequence = kv.create()
        with pytest.raises(OutOfBlocks, match="needs 3") as error:
            kv.step([sequence], counts=[9])
        assert (error.value.tier, error.value.needed, error.value.available) == ("device", 3, 2)
        with kv.step([sequence], counts=[8]):
            pass
        kv.manager.verify()


def test_close() -> None:
    kv = KVCache(KVSpec(1, 1, 4, "float32", 4), num_device_blocks=2)
    sequence = kv.create()
    step = kv.step([sequence])
    kv.close()
    kv.close()
    assert not step.is_open
    for call in (
        lambda: kv.create(),
        lambda: kv.step([sequence]),
        lambda: kv.fork(sequence, 2),
        lambda: kv.release([sequence]),
        lambda: kv.k(0),
    ):
        with pytest.raises(InvalidState, match="closed"):
            call()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_device_blocks": None}, "device_memory"),
        ({"device_memory": "1GiB"}, "one of device_memory"),
        ({"num_device_blocks": None, "device_memory": 100}, "device_memory"),
        ({"num_device_blocks": 0}, "num_device_blocks"),
        ({"device": "meta"}, "device"),
        ({"device_memory": 0.5, "num_device_blocks": None}, "fraction"),
        ({"device_memory": 1.5, "num_device_blocks": None}, "fraction"),
        ({"device": "nowhere"}, "device"),
        ({"copy_method": "batch"}, "copy_method"),
        ({"layout": "diagonal"}, "layout"),
        ({"num_device_blocks": 1 << 29}, "pool|memory"),
        ({"watermark": 9}, "watermark"),
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSpec, match=named):
        KVCache(KVSpec(64, 64, 256), **{"num_device_blocks": 1, **arguments})
