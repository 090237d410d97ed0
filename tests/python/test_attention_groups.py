"""Rows of one step that attention takes together: which they are, and what comes out."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.attention.groups import groups  # noqa: E402

LAYERS, HEADS, DIM, SIZE = 2, 2, 8, 4
SPEC = pk.KVSpec(
    num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype="float32", block_size=SIZE
)


class World:
    """A cache, and beside it the keys and values of each sequence in plain tensors."""

    def __init__(self, kv: pk.KVCache, seed: int) -> None:
        self.kv, self.random = kv, np.random.default_rng(seed)
        self.past: dict[int, torch.Tensor] = {}  # [tokens, layers, 2, heads, dim]

    def create(self) -> int:
        id = self.kv.create()
        self.past[id] = torch.empty(0, LAYERS, 2, HEADS, DIM)
        return id

    def fork(self, id: int, n: int) -> list[int]:
        ids: list[int] = self.kv.fork(id, n).tolist()
        self.past |= dict.fromkeys(ids, self.past[id])
        return ids

    def step(self, ids: list[int], counts: list[int], window: int | None = None) -> list[tuple]:
        """One step of new tokens; every layer's attention is the naive one. The groups it had."""
        new = [torch.randn(n, LAYERS, 2, HEADS, DIM) for n in counts]
        for id, rows in zip(ids, new, strict=True):
            self.past[id] = torch.cat([self.past[id], rows])
        total = sum(counts)
        with self.kv.step(ids, None, counts) as step:
            for layer in range(LAYERS):
                k, v = torch.cat(new)[:, layer].unbind(1)
                q = torch.randn(total, 2 * HEADS, DIM)
                self.kv.write(layer, k.contiguous(), v.contiguous(), step)
                outputs = self.kv.attention(layer, q, step, window=window)
                for id, mine, out in zip(ids, q.split(counts), outputs.split(counts), strict=True):
                    expected = naive(mine, self.past[id][:, layer], window)
                    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            found = groups(step, SIZE)
            assert [first for first, _, _ in found] == [0, *(last for _, last, _ in found)][:-1]
            assert found[-1][1] == len(ids)
        return found


def naive(q: torch.Tensor, past: torch.Tensor, window: int | None) -> torch.Tensor:
    """One token and one head at a time."""
    out = torch.empty_like(q)
    for t in range(len(q)):
        at = len(past) - len(q) + t
        begin = 0 if window is None else max(0, at + 1 - window)
        for h in range(q.shape[1]):
            k, v = past[begin : at + 1, :, h // 2].unbind(1)
            out[t, h] = torch.softmax(k @ q[t, h] * DIM**-0.5, 0) @ v
    return out


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    torch.manual_seed(request.param)
    with pk.KVCache(SPEC, num_device_blocks=4000) as kv:
        yield World(kv, request.param)


@pytest.mark.parametrize("window", [None, 5, 60])
def test_rows_of_any_lengths_and_counts(world: World, window: int | None) -> None:
    ids = [world.create() for _ in range(9)]
    world.step(ids, world.random.integers(1, 150, 9).tolist(), window)
    for _ in range(4):
        order = world.random.permutation(ids).tolist()
        some = order[: world.random.integers(1, 10)]
        counts = np.where(world.random.random(len(some)) < 0.7, 1, 3).tolist()
        world.step(some, counts, window)


@pytest.mark.parametrize("shared", [4, 40, 200])
def test_rows_that_share_a_little_or_much(world: World, shared: int) -> None:
    trunk, other = world.create(), world.create()
    world.step([trunk, other], [shared, 30])
    beams = world.fork(trunk, 4)
    for beam in beams:
        world.step([beam], [int(world.random.integers(20, 60))])
    found = world.step([*beams, other], [1] * 5)
    assert any(blocks for _, _, blocks in found) == (shared > 4)
    world.step([beams[0], other, *beams[1:]], [1, 2, 1, 1, 1])
    world.step([*beams, other], [2, 1, 1, 1, 1])


def test_near_lengths_go_together_and_far_ones_apart(world: World) -> None:
    lengths = [100, 101, 120, 500, 510, 1900]
    ids = [world.create() for _ in lengths]
    for id, length in zip(ids, lengths, strict=True):
        world.kv.step([id], None, [length]).commit()
        world.past[id] = torch.zeros(0, LAYERS, 2, HEADS, DIM)
    with world.kv.step(ids) as step:
        assert groups(step, SIZE) == [(0, 3, 0), (3, 5, 0), (5, 6, 0)]
    with world.kv.step(ids, None, [1, 1, 2, 1, 1, 1]) as step:
        assert groups(step, SIZE) == [(0, 2, 0), (2, 3, 0), (3, 5, 0), (5, 6, 0)]
    with world.kv.step(ids[::-1]) as step:
        assert groups(step, SIZE) == [(0, 1, 0), (1, 3, 0), (3, 6, 0)]


def test_little_is_read_for_nothing(world: World) -> None:
    lengths = np.sort(world.random.integers(1, 400, 40))
    ids = [world.create() for _ in lengths]
    for id, length in zip(ids, lengths, strict=True):
        world.kv.step([id], None, [int(length)]).commit()
    with world.kv.step(ids) as step:
        lens = step.plan.seq_lens
        for first, last, _ in groups(step, SIZE):
            real = int(lens[first:last].sum())
            padded = (last - first) * int(lens[first:last].max())
            assert padded - real <= max(256, real / 4)
        assert len(groups(step, SIZE)) < 10
