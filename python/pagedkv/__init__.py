"""pagedkv: the KV-cache block manager for your own LLM inference code.

A sequence is a path in a tree of blocks: forks share it, copy-on-write keeps them apart, full
blocks stay as prefix hits. `BlockManager` decides, `KVCache` holds the tensors, `PagedCache` plugs
into transformers' generate(). Importing this module imports neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module

from pagedkv._core import (
    BlockManager,
    PrefixHit,
    Snapshot,
    Stats,
    StepPlan,
    TierStats,
    __version__,
)
from pagedkv.errors import (
    BrokenInvariant,
    ConcurrentUse,
    DeviceError,
    InvalidSpec,
    InvalidState,
    KVError,
    NotResident,
    OutOfBlocks,
    TransferError,
    UnknownSequence,
)

TYPE_CHECKING = False  # `typing` has it too, and takes longer to import than all the rest here
if TYPE_CHECKING:
    from typing import Any

    from pagedkv.cache import KVCache
    from pagedkv.integrations.transformers import CacheStats, PagedCache
    from pagedkv.planner.plan import MemoryPlan, plan_memory
    from pagedkv.preemption import CostModel, PreemptRequest
    from pagedkv.simulator.report import SimulationReport
    from pagedkv.simulator.run import simulate
    from pagedkv.simulator.service import ServiceModel
    from pagedkv.simulator.setting import SimulationSetting
    from pagedkv.spec import KVSpec, LayerSpec
    from pagedkv.step import Step
    from pagedkv.transfers import Transfer

__all__ = [
    "BlockManager",
    "BrokenInvariant",
    "CacheStats",
    "ConcurrentUse",
    "CostModel",
    "DeviceError",
    "InvalidSpec",
    "InvalidState",
    "KVCache",
    "KVError",
    "KVSpec",
    "LayerSpec",
    "MemoryPlan",
    "NotResident",
    "OutOfBlocks",
    "PagedCache",
    "PreemptRequest",
    "PrefixHit",
    "ServiceModel",
    "SimulationReport",
    "SimulationSetting",
    "Snapshot",
    "Stats",
    "Step",
    "StepPlan",
    "TierStats",
    "Transfer",
    "TransferError",
    "UnknownSequence",
    "__version__",
    "plan_memory",
    "simulate",
]

# What needs torch, or is not needed by everybody, is imported when it is first used.
_LAZY = {
    "CacheStats": "pagedkv.integrations.transformers",
    "CostModel": "pagedkv.preemption",
    "KVCache": "pagedkv.cache",
    "KVSpec": "pagedkv.spec",
    "LayerSpec": "pagedkv.spec",
    "MemoryPlan": "pagedkv.planner.plan",
    "PagedCache": "pagedkv.integrations.transformers",
    "PreemptRequest": "pagedkv.preemption",
    "ServiceModel": "pagedkv.simulator.service",
    "SimulationReport": "pagedkv.simulator.report",
    "SimulationSetting": "pagedkv.simulator.setting",
    "Step": "pagedkv.step",
    "Transfer": "pagedkv.transfers",
    "plan_memory": "pagedkv.planner.plan",
    "simulate": "pagedkv.simulator.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pagedkv' has no attribute {name!r}")
    try:
        value = getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(
            f"pagedkv.{name} needs {error.name}: pip install 'pagedkv[{error.name}]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
