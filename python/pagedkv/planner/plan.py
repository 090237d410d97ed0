"""plan_memory: everything about one model, one kind of GPU and one load, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.planner.budget import Component, outside
from pagedkv.planner.catalog import Gpu, find_gpu
from pagedkv.planner.changes import Change, changes
from pagedkv.planner.fit import Fit, Fitter
from pagedkv.planner.groups import LayerGroup
from pagedkv.planner.load import Load, Settings
from pagedkv.planner.model import Model, load_model
from pagedkv.planner.swap import Preemption, preemption
from pagedkv.planner.waste import Policy, policies
from pagedkv.planner.weights import Weights
from pagedkv.spec import KVSpec

__all__ = ["Grid", "KVPlan", "MemoryPlan", "plan_memory"]

SCHEMA = "pagedkv.plan/1"


@dataclass(frozen=True)
class KVPlan:
    """K and V. Bytes are of one GPU, but for those named `model_*`.

    Attributes:
        model_token_bytes: of one token in the whole model, windows not passed.
        model_growing_bytes: what a further token adds once a sequence is longer than every window.
        model_window_bytes: where the windowed layers of a sequence stop.
        model_state_bytes: recurrent state of a sequence.
        token_bytes: of one token on one GPU.
        block_bytes: of one block.
        groups: layer groups; each takes its own block for the same tokens.
        num_blocks: usable blocks; one more is padding.
        pool_bytes: all blocks, as KVCache allocates them.
        num_tokens: tokens of cache.
        sequence_blocks, sequence_bytes: of one sequence of max_model_len tokens.
        max_concurrency: how many such sequences there can be at once.
        needed_blocks, needed_bytes: of the load.
    """

    model_token_bytes: int
    model_growing_bytes: int
    model_window_bytes: int
    model_state_bytes: int
    token_bytes: int
    block_bytes: int
    groups: tuple[LayerGroup, ...]
    num_blocks: int
    pool_bytes: int
    num_tokens: int
    sequence_blocks: int
    sequence_bytes: int
    max_concurrency: float
    needed_blocks: int
    needed_bytes: int


@dataclass(frozen=True)
class Grid:
    """Bytes of K and V by context and concurrency, and what fits.

    Attributes:
        contexts: tokens of a sequence, rows.
        concurrencies: sequences at once, columns.
        needed_bytes: per row and column, on one GPU.
        fits: the same, whether there is so much.
        frontier: per row, most sequences at once, up to load.max_num_seqs.
    """

    contexts: tuple[int, ...]
    concurrencies: tuple[int, ...]
    needed_bytes: tuple[tuple[int, ...], ...]
    fits: tuple[tuple[bool, ...], ...]
    frontier: tuple[int, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """The answer of plan_memory. Printing it gives the tables of `pagedkv plan`.

    Attributes:
        model, source: the model's name, and where its facts are from.
        gpu: one of the GPUs.
        load: what was asked, with everything filled in.
        weights: parameters, and their bytes.
        usable_bytes: the budget of one GPU: utilization * its memory.
        components: weights, kv_cache, activations, non-torch, in this order; they are inside the
            budget. kv_cache is the whole pool, which takes what the others leave.
        needed_bytes: the same, with what the load needs in place of the pool.
        outside: what else the GPU's memory must hold.
        kv: K and V.
        spec: what one GPU keeps; KVCache(plan.spec, num_device_blocks=plan.kv.num_blocks) is
            the pool, where windows are planned "full" or there are none.
        fits, shortfalls, changes: the verdict, why not, and what would make it fit.
        grid, policies, preemption: see there.
        notes, assumptions: what to know, and what was guessed.
    """

    model: str
    source: str
    gpu: Gpu
    load: Load
    weights: Weights
    usable_bytes: int
    components: tuple[Component, ...]
    needed_bytes: int
    outside: tuple[Component, ...]
    kv: KVPlan
    spec: KVSpec
    fits: bool
    shortfalls: tuple[str, ...]
    changes: tuple[Change, ...]
    grid: Grid
    policies: tuple[Policy, ...]
    preemption: Preemption
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def log_lines(self) -> tuple[str, str]:
        """What vLLM would log, word for word, to be laid beside its log."""
        return (
            f"GPU KV cache size: {self.kv.num_tokens:,} tokens",
            f"Maximum concurrency for {self.load.max_model_len:,} tokens per request: "
            f"{self.kv.max_concurrency:.2f}x",
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; docs/planner.md has the schema."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spec"}
        values = asdict(_Values(found))["values"]
        for change, plain in zip(self.changes, values["changes"], strict=True):
            plain["arguments"] = dict(change.arguments)
            plain["flags"] = change.flags
        values["weights"]["bytes_per_parameter"] = self.weights.bytes_per_parameter
        return {"schema": SCHEMA, **values, "log_lines": list(self.log_lines)}

    def plot(self, file: str | Path) -> None:
        """Draw the memory of one GPU, and context against concurrency, as PNG or SVG.

        Raises InvalidSpec if the file's ending is another; ImportError without matplotlib.
        """
        from pagedkv.planner.plot import draw

        draw(self, Path(file))

    def __str__(self) -> str:
        from rich.console import Console

        from pagedkv.planner.show import show

        out = StringIO()
        show(self, Console(file=out, width=100, highlight=False, color_system=None))
        return out.getvalue().rstrip("\n")


@dataclass(frozen=True)
class _Values:
    values: dict[str, Any]


def plan_memory(
    model: Any,
    gpu: str | int,
    *,
    num_gpus: int | None = None,
    tp: int | None = None,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    block_size: int = 16,
    max_model_len: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    concurrency: int = 1,
    beams: int = 1,
    samples: int = 1,
    utilization: float = 0.9,
    max_batched_tokens: int = 2048,
    max_num_seqs: int | None = None,
    host_memory: int | str | None = None,
    weights_memory: int | str | None = None,
    activation_memory: int | str | None = None,
    non_torch_memory: int | str | None = None,
    windows: str = "capped",
    strict: bool = False,
) -> MemoryPlan:
    """How much GPU memory a model needs for a load, how many blocks fit, how many users at once.

    Args:
        model: a known name, the path of a config.json or of a folder that has one, a hub id, the
            dict of a config.json, or a transformers config.
        gpu: a known name such as "A100-80GB", or bytes: 24 * 10**9, "24GB", "23.7GiB".
        num_gpus: GPUs in all; copies of the model share the load where it is more than tp.
        tp: GPUs that each copy is divided among; by default all.
        dtype: storage type of the weights, or "fp8", "int8", "int4", "mxfp4", "nf4".
        kv_dtype: storage type of K and V, or "fp8"; "auto" is the weights'.
        block_size: tokens in a block.
        max_model_len: most tokens of a sequence; by default the load's, else the model's.
        input_len, output_len: tokens of a prompt, and generated ones; by default max_model_len.
        concurrency: requests at once.
        beams, samples: sequences of each request, which share its prompt.
        utilization: share of the GPU's memory to use, as vLLM's gpu_memory_utilization.
        max_batched_tokens: most tokens in a step.
        max_num_seqs: most sequences in a step; by default 256, or the load's if that is more.
        host_memory: bytes for swapped-out sequences, shared by the GPUs of a copy.
        weights_memory, activation_memory, non_torch_memory: bytes on one GPU, as an engine logged
            them, instead of what is computed.
        windows: "capped": windowed layers give up the blocks that their window has passed, as
            engines do; "full": they keep all, as KVCache does.
        strict: refuse what would be assumed.

    Raises:
        InvalidSpec: an argument is out of range, or contradicts another or the model; under
            `strict`, the architecture is not known.
    """
    settings = Settings(
        num_gpus, tp, dtype, kv_dtype, block_size, max_model_len, input_len, output_len,
        concurrency, beams, samples, utilization, max_batched_tokens, max_num_seqs, host_memory,
        weights_memory, activation_memory, non_torch_memory, windows, strict,
    )  # fmt: skip
    return _plan(load_model(model), find_gpu(gpu), settings)


def _plan(model: Model, gpu: Gpu, settings: Settings) -> MemoryPlan:
    if settings.strict and model.assumptions:
        raise InvalidSpec(f"{model.name}: {'; '.join(model.assumptions)}; strict refuses that")
    fitter = Fitter(model, gpu)
    fit = fitter.fit(settings)
    whole = fitter.whole(fit.load)
    return MemoryPlan(
        model=model.name,
        source=model.source,
        gpu=gpu,
        load=fit.load,
        weights=fit.weighed,
        usable_bytes=fit.usable,
        components=_components(fit),
        needed_bytes=fit.usable - fit.available + fit.needed_bytes,
        outside=outside(),
        kv=_kv(fit, whole),
        spec=fit.pool.spec,
        fits=fit.fits,
        shortfalls=fit.shortfalls,
        changes=() if fit.fits else changes(fitter, settings),
        grid=_grid(fit),
        policies=policies(fit),
        preemption=preemption(model, fit),
        notes=_notes(fit, whole) + model.notes,
        assumptions=model.assumptions,
    )


def _components(fit: Fit) -> tuple[Component, ...]:
    """Weights, K and V, activations, the rest. What K and V get is as sure as what others take."""
    others = (fit.weights, fit.activations, fit.non_torch)
    taken = sum(c.num_bytes for c in others)
    slack = sum(c.high for c in others) - taken, taken - sum(c.low for c in others)
    kv = Component(
        name="kv_cache",
        num_bytes=fit.kv_bytes,
        exact=all(c.exact for c in others),
        low=max(0, fit.kv_bytes - slack[0]),
        high=max(0, (fit.kv_bytes or fit.available) + slack[1]),
        source=f"{fit.num_blocks:,} blocks of {fit.pool.block_bytes:,} bytes",
    )
    return (fit.weights, kv, fit.activations, fit.non_torch)


def _kv(fit: Fit, whole: KVSpec) -> KVPlan:
    return KVPlan(
        model_token_bytes=whole.token_bytes,
        model_growing_bytes=whole.growing_bytes,
        model_window_bytes=whole.window_bytes,
        model_state_bytes=whole.state_bytes,
        token_bytes=fit.pool.spec.token_bytes,
        block_bytes=fit.pool.block_bytes,
        groups=fit.pool.groups,
        num_blocks=fit.num_blocks,
        pool_bytes=fit.pool.pool_bytes(fit.num_blocks) if fit.num_blocks else 0,
        num_tokens=fit.pool.num_tokens(fit.num_blocks),
        sequence_blocks=fit.sequence_blocks,
        sequence_bytes=fit.sequence_bytes,
        max_concurrency=fit.max_concurrency(fit.load.max_model_len),
        needed_blocks=fit.needed_blocks,
        needed_bytes=fit.needed_bytes,
    )


def _grid(fit: Fit) -> Grid:
    """Contexts are powers of two up to max_model_len, and that; nothing is shared.

    At once are at most max_num_seqs: the activations were planned for so many.
    """
    longest, steps = fit.load.max_model_len, fit.load.max_batched_tokens
    powers = [1 << n for n in range(4, 31) if 1 << n < longest]
    contexts = (*powers[-6:], longest)
    columns = (1, 4, 16, 64, 256)
    needed = tuple(tuple(fit.pool.bytes_of(n, steps) * c for c in columns) for n in contexts)
    at_once = fit.load.max_num_seqs
    frontier = tuple(min(at_once, int(fit.max_concurrency(n))) for n in contexts)
    return Grid(
        contexts=contexts,
        concurrencies=columns,
        needed_bytes=needed,
        fits=tuple(tuple(c <= most for c in columns) for most in frontier),
        frontier=frontier,
    )


def _notes(fit: Fit, whole: KVSpec) -> tuple[str, ...]:
    notes = []
    others = (fit.weights, fit.activations, fit.non_torch)
    if fit.fits and fit.available - sum(c.high - c.num_bytes for c in others) < max(
        fit.needed_bytes, fit.sequence_bytes
    ):
        notes.append("it is close: at the upper end of the estimates it would not fit")
    if whole.window_bytes and fit.load.capped:
        notes.append("KVCache stores windowed layers in full: plan for it with --windows full")
    if not fit.gpu.has_bfloat16 and "bfloat16" in (fit.load.kv_dtype, fit.weighed.scheme):
        notes.append(f"{fit.gpu.name} has no bfloat16: float16 is as large")
    if fit.weighed.most_bytes > fit.weighed.num_bytes:
        notes.append(
            "the config leaves some matrices unquantised, in layers that are not looked up: the "
            "estimate of the weights has them quantised, its upper end not"
        )
    if any(layer.kind == "state" or layer.state_bytes for layer in whole.layers):
        notes.append("KVCache cannot hold recurrent state yet: this plans for an engine that can")
    if fit.load.replicas > 1:
        notes.append(
            f"{fit.load.replicas} copies of the model share the load: figures are of one of them"
        )
    room = fit.gpu.memory_bytes - fit.usable
    if sum(c.high for c in outside()) > room:
        notes.append(
            f"outside the budget there are {room / 2**30:.2f} GiB, and CUDA's context and graphs "
            f"may take {sum(c.high for c in outside()) / 2**30:.2f}"
        )
    if fit.weighed.num_bytes != fit.weighed.total_bytes and fit.load.tp == 1:
        notes.append(
            f"as stored the weights are {fit.weighed.total_bytes:,} bytes "
            f"({fit.weighed.total_bytes / 2**30:.2f} GiB); kernels pad the experts"
        )
    return tuple(notes)
