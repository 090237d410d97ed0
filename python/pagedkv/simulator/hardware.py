"""A model on a GPU, as the simulator sees it: how many tokens fit, and how long steps take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.simulator.service import ServiceModel

__all__ = ["Hardware"]


@dataclass(frozen=True)
class Hardware:
    """The defaults are OPT-13B in 16 bit on an A100 with 40 GB.

    Attributes:
        num_slots: tokens of K and V that fit; None where nobody said.
        token_bytes: of one token's K and V, on one GPU.
        num_parameters: that a token is multiplied with, on one GPU.
        weight_bytes: that a step reads, on one GPU; None for 2 for each parameter.
        bandwidth: bytes per second from the GPU's memory.
        flops: operations per second at the peak.
        copy_bandwidth: bytes per second between device and host.
        efficiency: share of `flops` that is reached.
    """

    num_slots: int | None = None
    token_bytes: int = 819_200
    num_parameters: float = 12_853_473_280
    weight_bytes: float | None = None
    bandwidth: float = 1.555e12
    flops: float = 312e12
    copy_bandwidth: float = 25e9
    efficiency: float = 0.5

    @classmethod
    def of(
        cls, model: str, gpu: str, *, tp: int | None = None, block_size: int = 16, **options: Any
    ) -> Hardware:
        """What `plan_memory` says of a model on a GPU, windows kept in full, as KVCache does.

        Raises InvalidSpec as that does, where no block fits, and for a GPU of unknown speed.
        """
        from pagedkv.planner.plan import plan_memory
        from pagedkv.planner.swap import COPY_EFFICIENCY

        plan = plan_memory(model, gpu, tp=tp, block_size=block_size, windows="full", **options)
        gpu_facts = plan.gpu
        if not (gpu_facts.bandwidth and gpu_facts.flops and gpu_facts.pcie):
            raise InvalidSpec(f"gpu is {gpu!r}, of which no speed is known: expected one by name")
        if plan.kv.num_blocks < 1:
            raise InvalidSpec(f"{plan.model} leaves no memory for K and V on {gpu_facts.name}")
        return cls(
            num_slots=plan.kv.num_tokens,
            token_bytes=plan.kv.token_bytes,
            num_parameters=plan.weights.num_active / plan.load.tp,
            weight_bytes=plan.weights.num_bytes,
            bandwidth=gpu_facts.bandwidth,
            flops=gpu_facts.flops,
            copy_bandwidth=gpu_facts.pcie * COPY_EFFICIENCY,
        )

    def changed(self, **values: Any) -> Hardware:
        """With those of `values` that are not None."""
        return replace(self, **{name: v for name, v in values.items() if v is not None})

    @property
    def service(self) -> ServiceModel:
        weights = self.weight_bytes
        return ServiceModel.from_hardware(
            weight_bytes=2 * self.num_parameters if weights is None else weights,
            num_parameters=self.num_parameters,
            token_bytes=self.token_bytes,
            bandwidth=self.bandwidth,
            flops=self.flops,
            efficiency=self.efficiency,
            copy_bandwidth=self.copy_bandwidth,
        )
