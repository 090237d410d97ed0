"""FlashInfer, if it is installed: its prefill over blocks, which does decode and mixes of both.

It plans on the host, once for each step and kind of layer, by lengths alone, which the host has;
the blocks, step.csr(), stay on the device. What a plan copies to the device lies in pinned memory
of its wrapper, which the next plan fills anew: so two wrappers take turns, and the host waits for
the copy of the step before the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pagedkv.attention.call import installed, kernel_refusal, window_pair
from pagedkv.machine import host_tensor

if TYPE_CHECKING:
    from pagedkv.attention.call import Call

__all__ = ["attend", "refusal"]

WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
HEAD_DIMS = (64, 128, 256)


def refusal(call: Call) -> str | None:
    package = installed("flashinfer")
    if isinstance(package, str):
        return package
    reason = kernel_refusal(call, fp8=True)
    if reason is not None:
        return reason
    kv, dim = call.kv, call.spec.k_dim
    if dim not in HEAD_DIMS:
        return f"needs a k_dim of {', '.join(map(str, HEAD_DIMS))}, and the layer's is {dim}"
    if kv.k(call.layer).stride() != kv.v(call.layer).stride():
        return "needs K and V of equal strides"
    if kv.machine.is_capturing():
        return "plans on the host, which a graph cannot capture"
    return None


def attend(call: Call) -> torch.Tensor:
    key = call.q.shape[1], call.spec, call.q.dtype, call.scale, call.softcap, call.window
    wrapper = call.step.kept(("flashinfer", key), lambda: _planned(call, key))
    out: torch.Tensor = wrapper.run(call.q, call.kv.read(call.layer))
    return out


def _planned(call: Call, key: object) -> Any:
    """A wrapper that has planned this step for layers of this kind."""
    kv, step, layer = call.kv, call.step, call.spec
    memory, size = kv.backend_memory, kv.spec.block_size
    if "flashinfer" not in memory:  # one for all: its kernels run one after the other
        memory["flashinfer"] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=kv.device)
    turn = ("flashinfer", key, step.plan.step % 2)
    if turn not in memory:
        package: Any = installed("flashinfer")
        memory[turn] = _Turn(
            package.BatchPrefillWithPagedKVCacheWrapper(memory["flashinfer"], "NHD")
        )
    wrapper = memory[turn].begin()
    lens = host_tensor(step.plan.seq_lens)
    num_blocks = (lens + size - 1) // size
    wrapper.plan(
        host_tensor(step.plan.query_starts).clone(),
        F.pad(num_blocks.cumsum(0, dtype=torch.int32), (1, 0)),
        step.csr().kv_indices,
        lens - (num_blocks - 1) * size,
        call.q.shape[1],
        layer.num_kv_heads,
        layer.k_dim,
        size,
        causal=True,
        sm_scale=call.scale,
        window_left=window_pair(call.window)[0],
        logits_soft_cap=call.softcap,
        q_data_type=call.q.dtype,
        kv_data_type=kv.k(call.layer).dtype,
    )
    memory[turn].copied = _mark(kv.device)
    return wrapper


@dataclass
class _Turn:
    """A wrapper, and an event behind the copies that its last plan queued."""

    wrapper: Any
    copied: torch.cuda.Event | None = None

    def begin(self) -> Any:
        if self.copied is not None:
            self.copied.synchronize()
        return self.wrapper


def _mark(device: torch.device) -> torch.cuda.Event:
    """The end of what is queued."""
    event = torch.cuda.Event()
    torch.cuda.current_stream(device).record_event(event)
    return event
