"""Simulates loads on policies of KV memory: `simulate()`, and what goes in and comes out of it.

Everything here is imported when it is first used: the command line needs a part of it only.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pagedkv.simulator.lengths import synthetic_trace
    from pagedkv.simulator.prefix import hit_rates
    from pagedkv.simulator.report import CacheSize, PolicyReport, SimulationReport
    from pagedkv.simulator.run import simulate
    from pagedkv.simulator.service import ServiceModel
    from pagedkv.simulator.setting import POLICIES, SimulationSetting
    from pagedkv.simulator.trace import Request, Trace, read_trace

__all__ = [
    "POLICIES",
    "CacheSize",
    "PolicyReport",
    "Request",
    "ServiceModel",
    "SimulationReport",
    "SimulationSetting",
    "Trace",
    "hit_rates",
    "read_trace",
    "simulate",
    "synthetic_trace",
]

_LAZY = {
    "POLICIES": "setting",
    "CacheSize": "report",
    "PolicyReport": "report",
    "Request": "trace",
    "ServiceModel": "service",
    "SimulationReport": "report",
    "SimulationSetting": "setting",
    "Trace": "trace",
    "hit_rates": "prefix",
    "read_trace": "trace",
    "simulate": "run",
    "synthetic_trace": "lengths",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pagedkv.simulator' has no attribute {name!r}")
    value = getattr(import_module(f"pagedkv.simulator.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
