"""Simulates loads on policies of KV memory: `simulate()` and what goes in and comes out of it."""

from __future__ import annotations

from pagedkv.simulator.lengths import synthetic_trace
from pagedkv.simulator.prefix import hit_rates
from pagedkv.simulator.report import CacheSize, PolicyReport, SimulationReport
from pagedkv.simulator.service import ServiceModel
from pagedkv.simulator.setting import POLICIES, SimulationSetting
from pagedkv.simulator.simulate import simulate
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
