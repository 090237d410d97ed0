"""Hazard 15 of docs/hazards.md: transfers are given up at any point of their lives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import World, holds  # noqa: E402


@pytest.mark.parametrize("when", range(4))
def test_hazard_15_cancel_with_copies_in_flight(when: int) -> None:
    """Copies that have begun run to their end; blocks come back when it has come, and once."""

    def scenario(w: World) -> None:
        ids = [w.admit([10 * n]) for n in range(10)]
        transfers = [w.kv.swap_out([i]) for i in ids]  # eight go to the device, two queue
        for _ in range(when):
            w.kv.poll()
        free = w.kv.stats().host.num_free
        under_way = [t for t in transfers if not t.done]
        for transfer in reversed(transfers):
            cancelled = transfer.cancel()
            assert not transfer.cancel()
            assert not (cancelled and transfer not in under_way)
            if cancelled:
                assert transfer.done
                assert "cancelled" in str(transfer.error)
                with pytest.raises(pk.TransferError, match="cancelled"):
                    transfer.wait()
            w.forget(transfer.dropped)
            w.kv.manager.verify()
        gone = [i for t in transfers for i in t.dropped]
        if w.device.num_pending and when == 0:
            assert w.kv.stats().host.num_free == free + len(gone)
        w.kv.release(ids)
        w.texts.clear()
        while w.kv.stats().num_transfers:
            w.kv.poll()
        assert w.kv.stats().host.num_free == 12
        assert w.kv.stats().device.num_active == 0

    holds(scenario, device_blocks=12, host_blocks=12)
    with World(device_blocks=12, host_blocks=12) as w:
        ids = [w.admit([n]) for n in range(10)]
        transfers = [w.kv.swap_out([i]) for i in ids]
        assert [t.cancel() for t in transfers] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("ahead", [0, 6, 7, 8])  # at most eight are with the device
@pytest.mark.parametrize("which", ["out", "in", "out in", "in out"])
def test_hazard_15_cancel_at_every_point_of_a_copy_that_another_needs(
    ahead: int, which: str
) -> None:
    """A sequence goes out and in again, its copy back waiting for the copy out."""

    def scenario(w: World, num_polls: int) -> None:
        before = [w.admit([10 * n]) for n in range(ahead)]
        for i in before:
            w.kv.swap_out([i])
        a = w.admit([1, 2, 3, 4, 5])
        pair = {"out": w.kv.swap_out([a]), "in": w.kv.swap_in([a])}
        for _ in range(num_polls):
            w.kv.poll()
        any_cancelled = False
        for name in which.split():
            over, tiers = pair[name].done, (w.kv.stats().host, w.kv.stats().device)
            cancelled = pair[name].cancel()
            assert not (cancelled and over)
            assert not pair[name].cancel()
            w.kv.manager.verify()
            if not cancelled and w.device.num_pending:  # nothing comes back before its end
                assert tiers == (w.kv.stats().host, w.kv.stats().device) or pair[name].done
            any_cancelled |= cancelled
        if which == "out" and any_cancelled:  # nobody asked for this one's end
            with pytest.raises(pk.TransferError, match="is void"):
                pair["in"].wait()
        w.overwrite()
        w.settle()
        dropped = [i for transfer in pair.values() for i in transfer.dropped]
        assert dropped == ([a] if any_cancelled else [])
        assert w.kv.is_dropped(a) == any_cancelled
        w.forget(i for i in w.texts if w.kv.is_dropped(i))
        w.kv.release(list(w.texts))
        w.texts.clear()
        w.kv.clear()
        stats = w.kv.stats()
        assert (stats.device.num_free, stats.host.num_free) == (16, 16)

    for num_polls in range(8):
        holds(lambda w, n=num_polls: scenario(w, n), device_blocks=16, host_blocks=16)
