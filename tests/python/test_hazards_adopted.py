"""Hazard 45 of docs/hazards.md: memory that is somebody else's."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv._core import HostPool  # noqa: E402
from pagedkv.adopt import adopt  # noqa: E402
from pagedkv.machine import Machine  # noqa: E402
from pagedkv.tryout import try_copies  # noqa: E402

SPEC = pk.KVSpec(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32", block_size=2)


def test_hazard_45_the_layout_changes_under_an_adopted_tensor() -> None:
    memory = torch.zeros(6, 2, 2, 2, 4)
    right = memory[:, 0].transpose(1, 2), memory[:, 1].transpose(1, 2)  # [N, 2, H, P, D]
    taken_for = memory[:, 0], memory[:, 1]  # [N, 2, P, H, D]: the shape does not tell
    pool, other = (adopt(SPEC, [pair], memory.device) for pair in (right, taken_for))
    wrong = dataclasses.replace(pool, regions=other.regions)
    with pytest.raises(pk.InvalidSpec, match="layer 0's k does not hold what it should"):
        try_copies(wrong, HostPool(list(wrong.regions), 6, 2), None, 0, Machine())
    with pk.KVCache(SPEC, tensors=[right], num_host_blocks=4) as kv:
        kv.verify()
        memory.untyped_storage().resize_(0)  # as engines do that go to sleep
        with pytest.raises(pk.InvalidState, match="adopted tensors have changed"):
            kv.verify()
        memory.untyped_storage().resize_(6 * 2 * 16 * 4 * 2)
    keys, values = torch.zeros(2, 6, 2, 2, 4)
    with pk.KVCache(SPEC, tensors=[(keys, values)]) as kv:
        kv.verify()
        keys.data = torch.zeros(6, 2, 2, 4)  # as Module.to() does
        with pytest.raises(pk.InvalidState, match="in other memory now"):
            kv.verify()
