"""`pagedkv simulate`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from pagedkv.errors import InvalidSpec
from pagedkv.units import parse_bytes

if TYPE_CHECKING:  # what takes longer to import than other commands take to run
    from pagedkv.simulator.hardware import Hardware
    from pagedkv.simulator.report import SimulationReport
    from pagedkv.simulator.service import ServiceModel
    from pagedkv.simulator.setting import SimulationSetting
    from pagedkv.simulator.trace import Trace

__all__ = ["simulate"]

CACHE_SIZES = "16K,64K,256K,1M,4M,16M,unbounded"


def _option(panel: str | None, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_M, _L, _S = "The memory and the scheduler", "The load", "The service model"
TraceName = Annotated[
    str, _option(None, "A file of requests, synthetic:sharegpt or synthetic:alpaca.", "--trace")
]
Policy = Annotated[str, _option(None, 'Policies, separated by commas, or "all".', "--policy")]
CacheSizes = Annotated[
    str,
    _option(None, f"Study a prefix cache of these sizes in tokens, such as {CACHE_SIZES}."),
]
Plot = Annotated[Path | None, _option(None, "Draw charts into a .png, .svg or .pdf file.")]
AsJson = Annotated[bool, _option(None, "Print JSON instead of tables.", "--json")]

Model = Annotated[
    str | None, _option(_M, "What `pagedkv plan` says of this model; needs --gpu, too.")
]
GpuName = Annotated[str | None, _option(_M, "The GPU that it is on, by name.")]
Tp = Annotated[int | None, _option(_M, "GPUs that divide one copy of it.")]
NumSlots = Annotated[int | None, _option(_M, "Tokens of K and V on the device. [default: 15728]")]
Memory = Annotated[str | None, _option(_M, 'Or its bytes, such as "12GiB" or "40GB".')]
TokenBytes = Annotated[int | None, _option(_M, "Bytes of K and V of one token. [default: 819200]")]
BlockSize = Annotated[int, _option(_M, "Tokens in a block.")]
HostMemory = Annotated[
    str | None, _option(_M, "Bytes of the host tier. [default: as many as the device's]")
]
MaxModelLen = Annotated[
    int | None, _option(_M, "Most tokens of a sequence. [default: the trace's longest, or 2048]")
]
MaxBatch = Annotated[int, _option(_M, "Most sequences in a step.")]
Watermark = Annotated[float, _option(_M, "Share of the blocks that admission leaves free.")]
Preempt = Annotated[str, _option(_M, '"swap", "recompute", or "auto": what takes less time.')]

Samples = Annotated[int, _option(_L, "Outputs sampled for each prompt.")]
Beams = Annotated[int, _option(_L, "Beam width.")]
BeamSwitch = Annotated[
    float, _option(_L, "Modelled: probability that a beam goes on from another one.")
]
Rate = Annotated[
    str | None,
    _option(_L, "Requests per second at random, or saturated. [default: the trace's times]"),
]
NumRequests = Annotated[
    int | None,
    _option(_L, "Only so many requests. [default: all; 2000 if synthetic]"),
]
Seed = Annotated[int, _option(_L, "Of all that is drawn.")]
HashBlockSize = Annotated[int, _option(_L, "Tokens that one of a trace's hash_ids stands for.")]
SkipBroken = Annotated[bool, _option(_L, "Leave out broken lines instead of refusing the trace.")]

Parameters = Annotated[
    float | None,
    _option(_S, "Parameters that a token is multiplied with. [default: 12853473280]"),
]
Weights = Annotated[
    str | None, _option(_S, "Bytes of the weights. [default: 2 for each parameter]")
]
Bandwidth = Annotated[
    str | None, _option(_S, "Bytes per second from the GPU's memory. [default: 1555GB]")
]
Tflops = Annotated[
    float | None, _option(_S, "Peak of the GPU, in 10^12 operations per second. [default: 312]")
]
Efficiency = Annotated[float, _option(_S, "Share of the peak that is reached.")]
CopyBandwidth = Annotated[
    str | None, _option(_S, "Bytes per second between device and host. [default: 25GB]")
]
StepMs = Annotated[
    float | None, _option(_S, "Milliseconds of a decode step, however long the context.")
]
PrefillRate = Annotated[float | None, _option(_S, "Tokens per second that are prefilled.")]


def simulate(
    trace: TraceName,
    policy: Policy = "",
    cache_sizes: CacheSizes = "",
    plot: Plot = None,
    as_json: AsJson = False,
    model: Model = None,
    gpu: GpuName = None,
    tp: Tp = None,
    num_slots: NumSlots = None,
    memory: Memory = None,
    token_bytes: TokenBytes = None,
    block_size: BlockSize = 16,
    host_memory: HostMemory = None,
    max_model_len: MaxModelLen = None,
    max_batch: MaxBatch = 256,
    watermark: Watermark = 0.01,
    preempt: Preempt = "auto",
    samples: Samples = 1,
    beams: Beams = 1,
    beam_switch: BeamSwitch = 0.1,
    rate: Rate = None,
    num_requests: NumRequests = None,
    seed: Seed = 0,
    hash_block_size: HashBlockSize = 512,
    skip_broken: SkipBroken = False,
    parameters: Parameters = None,
    weights: Weights = None,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    efficiency: Efficiency = 0.5,
    copy_bandwidth: CopyBandwidth = None,
    step_ms: StepMs = None,
    prefill_rate: PrefillRate = None,
) -> None:
    """Run a load through policies of KV memory, side by side.

    The defaults are OPT-13B on an A100 with 40 GB; --model and --gpu take another pair's from the
    planner, and other options replace single values. With --cache-sizes, or without a memory on a
    trace that has hash_ids, it is the prefix cache that is studied. docs/simulator.md says what is
    modelled and what runs on the real block manager.
    """
    hardware = _hardware(
        model, gpu, tp, block_size, token_bytes, parameters, weights, bandwidth, tflops,
        efficiency, copy_bandwidth,
    )  # fmt: skip
    slots = _slots(num_slots, memory, hardware, block_size)
    setting = _setting(
        num_slots=slots, block_size=block_size, token_bytes=hardware.token_bytes,
        host_slots=_host_slots(host_memory, hardware.token_bytes), max_model_len=max_model_len,
        max_batch=max_batch, watermark=watermark, samples=samples, beams=beams,
        beam_switch=beam_switch, preempt=preempt, seed=seed,
    )  # fmt: skip
    service = _service(hardware, step_ms, prefill_rate)
    if plot is not None:
        import_module("pagedkv.simulator.plot").check_plot(plot)
    load = _load(trace, rate, num_requests, seed, hash_block_size, skip_broken)
    studied = bool(cache_sizes) or (load.has_hash_ids and slots is None and not policy)
    sizes = _sizes(cache_sizes or CACHE_SIZES) if studied else ()
    compared = bool(policy) or slots is not None or not studied
    report = _run(load, setting, service, _policies(policy) if compared else (), sizes)
    if plot is not None:
        import_module("pagedkv.simulator.plot").draw_report(report, plot)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        import_module("pagedkv.simulator.show").print_report(report)


def _hardware(
    model: str | None, gpu: str | None, tp: int | None, block_size: int, token_bytes: int | None,
    parameters: float | None, weights: str | None, bandwidth: str | None, tflops: float | None,
    efficiency: float, copy_bandwidth: str | None,
) -> Hardware:  # fmt: skip
    from pagedkv.simulator.hardware import Hardware

    if (model is None) != (gpu is None) or (tp is not None and model is None):
        raise InvalidSpec("--model, --gpu and --tp: expected both --model and --gpu, or none")
    hardware = Hardware()
    if model is not None and gpu is not None:
        hardware = Hardware.of(model, gpu, tp=tp, block_size=block_size)
    if parameters is not None and weights is None:
        hardware = replace(hardware, weight_bytes=None)
    return hardware.changed(
        token_bytes=token_bytes,
        num_parameters=parameters,
        weight_bytes=weights and parse_bytes(weights, "--weights"),
        bandwidth=bandwidth and parse_bytes(bandwidth, "--bandwidth"),
        flops=None if tflops is None else tflops * 1e12,
        efficiency=efficiency,
        copy_bandwidth=copy_bandwidth and parse_bytes(copy_bandwidth, "--copy-bandwidth"),
    )


def _slots(
    num_slots: int | None, memory: str | None, hardware: Hardware, block_size: int
) -> int | None:
    """Tokens in the device's memory, if it is given."""
    if memory is None:
        return hardware.num_slots if num_slots is None else num_slots
    if num_slots is not None:
        raise InvalidSpec("--num-slots is given beside --memory: choose one")
    slots = parse_bytes(memory, "--memory") // max(1, hardware.token_bytes)
    if slots < block_size:
        raise InvalidSpec(
            f"--memory is {memory!r}, less than the {block_size * hardware.token_bytes:,} bytes of "
            "a block: is a unit missing, such as GiB?"
        )
    return slots


def _host_slots(host_memory: str | None, token_bytes: int) -> int | None:
    if host_memory is None:
        return None
    return parse_bytes(host_memory, "--host-memory") // max(1, token_bytes)


def _setting(**values: Any) -> SimulationSetting:
    from pagedkv.simulator.setting import SimulationSetting

    if values["num_slots"] is None:
        del values["num_slots"]
    return SimulationSetting(**values)


def _service(hardware: Hardware, step_ms: float | None, prefill_rate: float | None) -> ServiceModel:
    model = hardware.service
    if step_ms is not None:
        model = replace(model, step_seconds=step_ms / 1e3, context_seconds=0.0)
    if prefill_rate is not None:
        if not prefill_rate > 0:
            raise InvalidSpec(f"--prefill-rate is {prefill_rate}, expected a number above 0")
        model = replace(model, token_seconds=1 / prefill_rate)
    return model


def _load(
    trace: str, rate: str | None, num_requests: int | None, seed: int, hash_block_size: int,
    skip_broken: bool,
) -> Trace:  # fmt: skip
    from pagedkv.simulator.lengths import synthetic_trace
    from pagedkv.simulator.trace import read_trace

    if num_requests is not None and num_requests < 1:
        raise InvalidSpec(f"--num-requests is {num_requests}, expected 1 or more")
    if trace.startswith("synthetic:"):
        load = synthetic_trace(trace.removeprefix("synthetic:"), num_requests or 2000, seed)
    else:
        load = read_trace(trace, skip_broken=skip_broken, hash_block_size=hash_block_size)
        load = load.first(num_requests)
    if rate is None:
        return load
    try:
        return load.at_rate(math.inf if rate == "saturated" else float(rate), seed)
    except ValueError:
        raise InvalidSpec(
            f'--rate is {rate!r}, expected requests per second above 0, or "saturated"'
        ) from None


def _policies(policy: str) -> tuple[str, ...] | None:
    """Names; None for those that differ on the trace."""
    from pagedkv.simulator.setting import POLICIES

    if policy == "all":
        return tuple(POLICIES)
    return tuple(name.strip() for name in policy.split(",")) if policy else None


def _sizes(text: str) -> tuple[int | None, ...]:
    """ "16K,1M,unbounded" as tokens: K is 2^10, M is 2^20, G is 2^30."""
    sizes: list[int | None] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,12})([KMG]?)\s*", word)
        if word.strip() == "unbounded":
            sizes.append(None)
        elif match and int(match[1]):
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
        else:
            raise InvalidSpec(f"--cache-sizes has {word!r}, expected such as {CACHE_SIZES}")
    return tuple(sizes)


def _run(
    load: Trace,
    setting: SimulationSetting,
    service: ServiceModel,
    policies: tuple[str, ...] | None,
    sizes: tuple[int | None, ...],
) -> SimulationReport:
    """With a bar on a terminal's stderr, so that stdout has the result alone."""
    from pagedkv.simulator.run import simulate as run

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=1.0)
        return run(
            load, setting, policies=policies, cache_sizes=sizes, service=service,
            progress=lambda what, share: bars.update(task, description=what, completed=share),
        )  # fmt: skip
