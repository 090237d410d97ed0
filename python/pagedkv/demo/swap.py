"""The demo's last scene: more requests than fit on the device, and a timeline of their copies.

The engine is examples/engine.py, which the build installs in the package as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pagedkv.cache import KVCache
from pagedkv.demo.model import DemoModel
from pagedkv.spec import KVSpec
from pagedkv.transfers import Transfer

_engine: Any = import_module("pagedkv._example_engine")

NEW_TOKENS = 48
_NUM_FITTING = 3  # requests that the device has room for


@dataclass
class EngineRun:
    """Tokens of each request, and when what was computed and copied for which of them."""

    title: str
    prompts: list[list[int]]
    tokens: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    num_blocks: int = 0
    num_preemptions: int = 0
    num_recomputed: int = 0
    steps: list[tuple[float, float, list[int]]] = field(default_factory=list)
    copies: list[tuple[Transfer, int]] = field(default_factory=list)

    def num_bytes(self, direction: str) -> int:
        return sum(t.num_bytes for t, _ in self.copies if t.direction == direction)


def _watched(run: EngineRun) -> type[Any]:
    """The engine, which also notes its steps and transfers in `run`."""

    class Watched(_engine.Engine):  # type: ignore[misc]
        def forward(self, step: Any, last: torch.Tensor) -> torch.Tensor:
            numbers = [r.number for r in self.running]
            begin = time.perf_counter()
            logits: torch.Tensor = super().forward(step, last)
            run.steps.append((begin, time.perf_counter(), numbers))
            return logits

        def preempt(self, request: Any) -> None:
            super().preempt(request)
            self.note(request)

        def resume(self, request: Any) -> None:
            super().resume(request)
            self.note(request)

        def note(self, request: Any) -> None:
            known = {t.id for t, _ in run.copies}
            new = (t for t in self.kv.under_way() if t.num_bytes and t.id not in known)
            run.copies += [(transfer, request.number) for transfer in new]

    return Watched


def can_run(model: DemoModel) -> bool:
    """The engine runs models of a few kinds only."""
    return model.network.config.model_type in _engine.MODEL_TYPES


def run_all(model: DemoModel) -> list[EngineRun]:
    """With room, by swap, and by recompute."""
    prompts = _engine.prompts(model)
    spec = KVSpec.from_config(model.network.config, dtype=str(model.network.dtype))
    each = -(-(max(map(len, prompts)) + NEW_TOKENS) // spec.block_size)
    plenty, few = 2 * each * len(prompts), each * _NUM_FITTING
    found = []
    for title, mode, num_blocks in (
        ("with room", "swap", plenty),
        ("by swap", "swap", few),
        ("by recompute", "recompute", few),
    ):
        run = EngineRun(title, prompts, num_blocks=num_blocks)
        with KVCache(
            spec,
            device=model.network.device,
            num_device_blocks=num_blocks,
            num_host_blocks=plenty,
        ) as kv:
            engine = _watched(run)(model.network, kv, mode)
            begin = time.perf_counter()
            requests = [_engine.Request(prompt, NEW_TOKENS) for prompt in prompts]
            run.tokens = [outputs[0] for outputs in engine.run(requests)]
            run.seconds = time.perf_counter() - begin
            for transfer in kv.under_way():
                transfer.wait()
        run.num_preemptions, run.num_recomputed = engine.num_preemptions, engine.num_recomputed
        found.append(run)
    return found


def draw_timeline(run: EngineRun, out: Path, model: str) -> None:
    """Write what was computed and copied when to `out`, as a PNG: a line for each request."""
    colours, start, count = matplotlib.colormaps["tab10"], run.steps[0][0], len(run.prompts)
    figure = Figure(figsize=(11, 5.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, sharey=True)
    for begin, end, numbers in run.steps:
        for n in numbers:
            axes[0].broken_barh(
                [(begin - start, end - begin)], (n + 0.1, 0.8), facecolor=colours(n), linewidth=0
            )
    for transfer, n in run.copies:
        lane = axes[1 if transfer.direction == "out" else 2]
        assert transfer.ended is not None
        at, took = transfer.begun - start, transfer.ended - transfer.begun
        lane.broken_barh([(at, took)], (n + 0.1, 0.8), facecolor=colours(n), alpha=0.3)
        copying = [(at, transfer.seconds or took)]
        lane.broken_barh(copying, (n + 0.1, 0.8), facecolor=colours(n), edgecolor=colours(n))
    for lane, name in zip(axes, ("computing", "copies out", "copies in"), strict=True):
        lane.set_ylabel(name)
        lane.set(ylim=(count, 0), yticks=[i + 0.5 for i in range(count)])
        lane.set_yticklabels(map(str, range(1, count + 1)), fontsize=7.5)
        lane.tick_params(length=0)
        lane.spines[["top", "right"]].set_visible(False)
        lane.grid(axis="x", color="#e5e7eb", linewidth=0.6)
        lane.set_axisbelow(True)
    axes[-1].set_xlabel("seconds. Full: what its copies took. Pale: until the engine looked.")
    figure.suptitle(
        f"{count} requests on a device that holds {_NUM_FITTING}: {run.num_preemptions} preempted, "
        f"swapped out and in again. Model: {model}.",
        fontsize=11,
    )
    figure.savefig(out, format="png")
