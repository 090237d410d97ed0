"""Padded decode steps: what a captured graph is replayed on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.graphs import DecodeGraph, Padded  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda  # noqa: E402

H, D, VOCAB = 2, 8, 50
DEVICES = ["cpu", "simulated", pytest.param("cuda:0", marks=pytest.mark.gpu)]


class Model:
    """Two layers of attention over embeddings; reads what `write` and `attention` it is given."""

    def __init__(self, device: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids, self.places = (
            torch.randn(n, H * D, generator=generator).to(device) for n in (VOCAB, 200)
        )
        self.out = torch.randn(2, H * D, H * D, generator=generator).to(device) / 4

    def __call__(self, ids: Any, positions: Any, write: Any, attention: Any) -> Any:
        x = self.ids[ids] + self.places[positions]
        for layer in (0, 1):
            q = x.unflatten(1, (H, D))
            write(layer, q * 2, q + layer)
            x = x + attention(layer, q).flatten(1) @ self.out[layer]
        return x

    def padded(self, step: Padded) -> Any:
        return self(step.input_ids, step.positions, step.write, step.attention)

    def plain(self, kv: pk.KVCache, step: Any) -> Any:
        return self(
            step.input_ids, step.positions,
            lambda layer, k, v: kv.write(layer, k, v, step),
            lambda layer, q: kv.attention(layer, q, step),
        )  # fmt: skip


def cache(device: str, **options: Any) -> pk.KVCache:
    spec = pk.KVSpec(2, H, D, "float32", 4)
    there: Any = CudaDevice(SimulatedCuda(1, schedule="eager")) if device == "simulated" else device
    options = {"num_device_blocks": 80, "max_batch": 8, "max_model_len": 64} | options
    return pk.KVCache(spec, device=there, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_hazard_23_a_replayed_graph_reads_old_tables(device: str) -> None:
    """One graph serves growing, forked, reordered and swapped sequences."""
    random = np.random.default_rng(0)
    with cache(device, num_host_blocks=40) as kv, cache("cpu") as twin:
        model, there = Model(kv.device), Model("cpu")
        graph = DecodeGraph(kv, model.padded, num_rows=8, width=64)
        addresses = set()

        def step(ids: Any, others: Any, tokens: Any, counts: Any = None) -> None:
            with kv.step(ids, tokens, counts) as one, twin.step(others, tokens, counts) as other:
                expected = there.plain(twin, other)
                found = model.plain(kv, one) if counts is not None else graph(one)
                if counts is None:
                    padded = graph._padded(one)
                    addresses.add(tuple(t.data_ptr() for t in padded[2:]))
                    assert not padded.seq_lens[len(ids) :].any()
                    assert not padded.slots[len(ids) :].any()
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)

        prompt = random.integers(0, VOCAB, 6)
        a, b = (np.array([k.create(), k.create()]) for k in (kv, twin))
        step(a, b, np.concatenate([prompt[:4], prompt]), [4, 6])
        for _ in range(5):  # growing
            step(a, b, random.integers(0, VOCAB, 2))
        a, b = (np.concatenate([k.fork(x[0], 3), x[1:]]) for k, x in ((kv, a), (twin, b)))
        for n in range(6):  # forked, reordered
            step(a, b, random.integers(0, VOCAB, 4))
            parents = np.array([n % 3, 0, 2])
            kv.reorder(a[:3], parents)
            twin.reorder(b[:3], parents)
        kv.swap_out(a[1:2]).wait()
        step(np.delete(a, 1), np.delete(b, 1), random.integers(0, VOCAB, 3))  # fewer rows
        kv.swap_in(a[1:2]).wait()
        step(a[::-1].copy(), b[::-1].copy(), random.integers(0, VOCAB, 4))
        assert len(addresses) == 1


def test_a_graph_whose_first_step_was_in_inference_mode() -> None:
    with cache("cpu") as kv:
        graph, ids = DecodeGraph(kv, Model("cpu").padded, num_rows=8, width=32), [kv.create()]
        with torch.inference_mode(), kv.step(ids, [3]) as step:
            graph(step)
        with kv.step(ids, [3]) as step:
            assert graph(step).shape == (1, H * D)


def test_padding_attends_to_nothing_and_writes_to_the_padding_block() -> None:
    with cache("cpu") as kv:
        model = Model("cpu")
        graph = DecodeGraph(kv, lambda p: seen.append(p) or model.padded(p), num_rows=8, width=32)
        seen: list[Padded] = []
        bits = kv.k(0)[1:].view(torch.int32).fill_(-1)  # what no key is
        before = bits.clone()
        with kv.step([kv.create()], [3]) as step:
            found = graph(step)
            slot = int(step.slots[0])
        assert found.shape == (1, H * D)
        changed = (bits != before).any(-1).any(-1).flatten()
        assert changed.nonzero().flatten().tolist() == [slot - 4]
        rows = seen[0].attention(0, torch.ones(8, H, D))
        assert not rows[1:].any()
        assert rows[0].any()


def test_on_a_cpu_only_what_the_step_before_filled_is_cleared() -> None:
    with cache("cpu") as kv:
        machine, ids = kv.machine, [kv.create() for _ in range(3)]

        def padded(step: Any, name: str) -> Any:
            return machine.padded_tensor(step.plan, name, 8)

        with kv.step(ids, [1] * 30, [9, 1, 20]) as step:
            table, expected = padded(step, "block_tables"), step.plan.block_tables
            assert table[:3, :5].tolist() == expected.tolist()
            table[7, 15] = 1  # as nobody does, so that clearing all shows
        with kv.step(ids[1:2], [3]) as step:
            assert padded(step, "block_tables") is table
            assert padded(step, "input_ids").tolist() == [3] + [0] * 7
            assert table[0, :1].tolist() == step.plan.block_tables[0].tolist()
            assert table.nonzero().tolist() == [[0, 0], [7, 15]]
        with kv.step(ids[:2]) as step:
            assert not padded(step, "input_ids").any()
            assert padded(step, "seq_lens").tolist() == [10, 3] + [0] * 6


def test_windows_and_softcap() -> None:
    torch.manual_seed(0)
    layers = [pk.LayerSpec("sliding", H, D, D, "float32", window=3)]
    kv = pk.KVCache(pk.KVSpec(layers=layers, block_size=4), num_device_blocks=20, max_batch=4)
    outputs: list[Any] = []

    def attend(p: Padded) -> Any:
        p.write(0, q, q * 2)
        return p.attention(0, q, softcap=2.0, scale=0.5)

    graph = DecodeGraph(kv, attend, num_rows=4, width=16)
    a = kv.create()
    with kv.step([a], counts=[9]) as step:
        k = torch.randn(9, H, D)
        kv.write(0, k, k * 2, step)
    with kv.step([a]) as step:
        q = torch.randn(4, H, D)
        outputs.append(graph(step))
        expected = kv.attention(0, q[:1], step, softcap=2.0, scale=0.5, backend="gather")
    torch.testing.assert_close(outputs[0], expected)


def test_what_a_graph_was_not_made_for_is_refused() -> None:
    kv = cache("cpu")
    model = Model("cpu")
    for options in ({"num_rows": 9, "width": 8}, {"num_rows": 0, "width": 8},
                    {"num_rows": 2, "width": 65}, {"num_rows": 2.5, "width": 8}):  # fmt: skip
        with pytest.raises(pk.InvalidSpec, match="expected an int of 1 to"):
            DecodeGraph(kv, model.padded, **options)
    graph = DecodeGraph(kv, model.padded, num_rows=2, width=8)
    ids = [kv.create() for _ in range(3)]
    with kv.step(ids[:1], [1, 2], [2]) as step, pytest.raises(pk.InvalidSpec, match="one each"):
        graph(step)
    with kv.step(ids, [1, 2, 3]) as step, pytest.raises(pk.InvalidSpec, match="one each"):
        graph(step)
    with kv.step(ids[:1], [0] * 6, [6]) as step:
        model.plain(kv, step)
    with kv.step(ids[:1], [1]) as step, pytest.raises(pk.InvalidSpec, match="at most 8"):
        graph(step)
    with pytest.raises(pk.InvalidState, match="not open"):
        graph(step)
    with cache("cpu") as other, other.step([other.create()], [1]) as its:
        before = kv.k(0).view(torch.int32).clone()
        with pytest.raises(pk.InvalidState, match="another cache"):
            graph(its)
        assert torch.equal(kv.k(0).view(torch.int32), before)
    kv.close()
    with pytest.raises(pk.InvalidState, match=r"closed|not open"):
        graph(step)


def test_adopted_tensors_that_have_moved_are_noticed() -> None:
    tensors = [(torch.zeros(9, 4, H, D), torch.zeros(9, 4, H, D)) for _ in range(2)]
    with cache("cpu", num_device_blocks=None, tensors=tensors) as kv:
        graph = DecodeGraph(kv, Model("cpu").padded, num_rows=2, width=8)
        with kv.step([kv.create()], [1]) as step:
            graph(step)
        storage = tensors[1][0].untyped_storage()
        storage.resize_(2 * storage.nbytes())
        with kv.step([kv.create()], [1]) as step, pytest.raises(pk.InvalidState, match="moved"):
            graph(step)


def test_a_call_looks_at_no_layer_of_a_cache_of_its_own_tensors() -> None:
    num_calls = {1: 0, 40: 0}  # of functions, by the number of layers
    for num_layers in num_calls:
        with pk.KVCache(pk.KVSpec(num_layers, H, D, "float32", 4), num_device_blocks=4) as kv:
            graph = DecodeGraph(kv, lambda padded: padded.slots, num_rows=1, width=8)
            with kv.step([kv.create()], [1]) as step:

                def count(*event: Any) -> None:
                    num_calls[num_layers] += 1  # noqa: B023

                sys.setprofile(count)
                graph(step)
                sys.setprofile(None)
    assert num_calls[1] == num_calls[40]


def test_scales_are_refused() -> None:
    spec = pk.KVSpec(1, H, D, "float8_e4m3fn", 4)
    with (
        pk.KVCache(spec, num_device_blocks=4, scales=[(0.5, 1.0)]) as kv,
        pytest.raises(pk.InvalidSpec, match="scales"),
    ):
        DecodeGraph(kv, Model("cpu").padded, num_rows=1, width=4)


@pytest.mark.parametrize("with_tokens", [True, False])
def test_addresses_are_the_same_with_tokens_and_without(with_tokens: bool) -> None:
    with cache("simulated") as kv:
        found = []
        for tokens in ([3], None) if with_tokens else (None, [3]):
            with kv.step([kv.create()], tokens) as step:
                padded = DecodeGraph(kv, lambda p: p.slots, num_rows=8, width=8)._padded(step)
                found.append([t.data_ptr() for t in padded[2:]])
                assert padded.input_ids.tolist() == [3 if tokens else 0] + [0] * 7
        assert found[0] == found[1]


def test_a_step_of_more_rows_than_step_tokens_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.machine.MAX_STEP_TOKENS", 2)
    with cache("simulated") as kv:
        ids = [kv.create() for _ in range(6)]
        with kv.step(ids, [1] * 6) as step:
            padded = DecodeGraph(kv, lambda p: p.slots, num_rows=8, width=8)._padded(step)
            assert padded.slots.tolist() == [*step.plan.slots.tolist(), 0, 0]


class FakeGraphs:
    """torch.cuda as far as DecodeGraph goes, which says what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = False

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def Stream(self, device: Any) -> str:
        return f"a stream of {device}"

    def CUDAGraph(self) -> Any:
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.calls.append("replay")

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: str) -> Iterator[None]:
        self.calls.append(f"capture on {stream} into {pool}")
        if self.fails:
            raise RuntimeError("not while capturing")
        yield


def test_hazard_22_a_call_breaks_the_capture_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned and fenced before, warmed up, captured once, then replayed; a failure leaves none."""
    fake = FakeGraphs()
    with cache("simulated") as kv:
        follow = kv._follow
        monkeypatch.setattr(kv, "_follow", lambda: (fake.calls.append("follow"), follow()))
        graph = DecodeGraph(
            kv, lambda p: (fake.calls.append("model"), p.slots)[1], num_rows=8, width=8,
            pool=(0, 7),
        )  # fmt: skip
        monkeypatch.setattr(kv, "device", torch.device("cuda", 1))
        monkeypatch.setattr("pagedkv.graphs.torch.cuda", fake)
        a = kv.create()
        fake.fails = True
        with kv.step([a]) as step:
            for _ in range(2):  # and again, not an empty graph
                with pytest.raises(RuntimeError, match="capturing"):
                    graph(step)
        fake.fails, fake.calls = False, []
        for n in range(3):
            with kv.step([a]) as step:
                assert graph(step).shape == (1,)
            if n == 0:
                assert fake.calls == [
                    "follow", "model", "capture on a stream of cuda:1 into (0, 7)", "model",
                    "replay",
                ]  # fmt: skip
                fake.calls = []
        assert fake.calls == ["follow", "replay"] * 2


@pytest.mark.gpu
def test_what_a_step_launches_can_be_captured() -> None:
    """Its arrays keep their addresses."""
    spec = pk.KVSpec(1, 2, 64, "float16", 16)
    with pk.KVCache(spec, device="cuda:0", num_device_blocks=64, max_model_len=256) as kv:
        ids = [kv.create() for _ in range(4)]
        k = torch.randn(4, 2, 64, device="cuda:0", dtype=torch.float16)
        for _ in range(2):
            with kv.step(ids) as step:
                kv.write(0, k, k, step)
        graph = torch.cuda.CUDAGraph()
        with kv.step(ids) as step:
            with torch.cuda.graph(graph):
                kv.write(0, k, k, step)
                found, _ = kv.gather(0, step)
            kv.gather_blocks(0, step.block_tables, 0, step.seq_lens, 256)  # into a larger workspace
            graph.replay()
            assert found[:, :, -1].equal(k)
        for _ in range(3):
            with kv.step(ids) as step:
                k.copy_(torch.randn_like(k))
                graph.replay()
                keys, _ = kv.gather(0, step)
                assert keys[:, :, -1].equal(k)
