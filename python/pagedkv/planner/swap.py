"""A preempted sequence: to host memory and back, or computed again."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.planner.fit import Fit
from pagedkv.planner.model import Model
from pagedkv.preemption import PreemptRequest, swap_or_recompute

__all__ = ["COPY_EFFICIENCY", "PREFILL_EFFICIENCY", "Preemption", "preemption"]

COPY_EFFICIENCY = 0.8  # of the link's bytes per second
PREFILL_EFFICIENCY = 0.5  # of the GPU's operations per second


@dataclass(frozen=True)
class Preemption:
    """What one sequence of the load's full length costs when it is preempted.

    Attributes:
        host_blocks: blocks of the host tier on each GPU; 0 without host_memory.
        num_bytes: what a swap copies on each GPU, in one direction.
        swap_seconds: out and back; None where the link's speed is not known.
        recompute_seconds: one prefill of all its tokens; None where the GPU's speed is not known.
        cheaper: "swap" or "recompute", by `pagedkv.preemption.swap_or_recompute`, which KVCache
            uses too; None where either is not known.
    """

    host_blocks: int
    num_bytes: int
    swap_seconds: float | None
    recompute_seconds: float | None
    cheaper: str | None


def prefill_flops(model: Model, fit: Fit, length: int) -> float:
    """Operations of one prefill of `length` tokens.

    2 per active parameter and token (Kaplan et al. 2020), and in each attention layer, causally,
    2 * heads * (k_dim + v_dim) per pair of tokens, half of which are masked.
    """
    config, pairs = model.config, 0.0
    heads = config.number("num_attention_heads", 0, least=0)
    for layer in fit.pool.spec.layers:
        if not layer.token_bytes:
            continue
        dims = 2 * layer.k_dim
        if layer.kind == "latent":
            dims = config.number("qk_nope_head_dim") + config.number("qk_rope_head_dim")
            dims += config.number("v_head_dim")
        seen = min(layer.window or length, length)
        pairs += 2 * heads * dims * (length * seen - seen * seen / 2)
    return 2 * fit.weighed.num_active * length + pairs


def preemption(model: Model, fit: Fit) -> Preemption:
    load, gpu = fit.load, fit.gpu
    num_bytes = fit.pool.bytes_of(load.length, load.max_batched_tokens)
    bandwidth = gpu.pcie * COPY_EFFICIENCY if gpu.pcie else None
    rate = None
    if gpu.flops and gpu.bandwidth:
        work = prefill_flops(model, fit, load.length) / load.tp
        seconds = max(
            work / (gpu.flops * PREFILL_EFFICIENCY), fit.weights.num_bytes / gpu.bandwidth
        )
        rate = load.length / seconds
    request = PreemptRequest(num_bytes, load.length, bandwidth, bandwidth, rate)
    host = load.host_memory // load.tp if load.host_memory is not None else 0
    return Preemption(
        host_blocks=fit.pool.num_blocks(host),
        num_bytes=num_bytes,
        swap_seconds=2 * num_bytes / bandwidth if bandwidth else None,
        recompute_seconds=load.length / rate if rate else None,
        cheaper=swap_or_recompute(request) if bandwidth and rate else None,
    )
