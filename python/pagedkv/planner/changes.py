"""What would make a load fit: each change is found by planning again with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.planner.catalog import gpus
from pagedkv.planner.fit import Fitter
from pagedkv.planner.load import Load, Settings, divides
from pagedkv.spec import DTYPE_BYTES

__all__ = ["Change", "changes"]


@dataclass(frozen=True)
class Change:
    """Arguments of plan_memory that, put in place of those given, make the load fit.

    Attributes:
        arguments: (name, value) of each.
        effect: what that costs, or means.
    """

    arguments: tuple[tuple[str, Any], ...]
    effect: str

    @property
    def flags(self) -> str:
        """The same as options of the command."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.arguments)


def changes(fitter: Fitter, settings: Settings) -> tuple[Change, ...]:
    """Single changes that suffice; pairs of them where none does."""
    load = Load.of(settings, fitter.model)
    single = [c for c in _single(fitter, settings, load) if c is not None]
    if single:
        return tuple(single)
    return tuple(c for c in _pairs(fitter, settings, load) if c is not None)


def _single(fitter: Fitter, settings: Settings, load: Load) -> Iterator[Change | None]:
    def fits(**changed: Any) -> bool:
        return _fits(fitter, settings, changed)

    yield _shorter(fits, settings, load)
    if DTYPE_BYTES[load.kv_dtype] > 1 and fits(kv_dtype="fp8"):
        yield Change((("kv_dtype", "fp8"),), "K and V in 8 bits: check the model's answers")
    yield _fewer(fits, settings, load)
    yield _more_gpus(fits, fitter, settings, load)
    yield _smaller_steps(fits, settings, load)
    for dtype in ("fp8", "int4"):
        if settings.dtype == "auto" and settings.weights_memory is None and fits(dtype=dtype):
            yield Change((("dtype", dtype),), "quantised weights: check the model's answers")
            break
    if load.utilization < 0.95 and fits(utilization=0.95):
        yield Change((("utilization", 0.95),), "less room for CUDA graphs and other processes")
    yield _other_gpu(fitter, settings)


def _fits(fitter: Fitter, settings: Settings, changed: dict[str, Any]) -> bool:
    try:
        return fitter.fit(replace(settings, **changed)).fits
    except InvalidSpec:  # this change contradicts what was asked for
        return False


_Fits = Callable[..., bool]


def _shorter(fits: _Fits, settings: Settings, load: Load) -> Change | None:
    """The longest max_model_len that fits; of fixed lengths, the longest prompt."""
    size = load.block_size
    if settings.input_len is None and settings.output_len is None:
        best = _most(lambda n: fits(max_model_len=n * size), load.max_model_len // size)
        if best and best * size < load.max_model_len:
            return Change((("max_model_len", best * size),), "shorter sequences")
        return None
    if load.length < load.max_model_len:
        low = load.length
        best = _most(lambda n: fits(max_model_len=low + n - 1), load.max_model_len - low)
        if best:
            return Change((("max_model_len", low + best - 1),), "no longer sequence is accepted")
    best = _most(
        lambda n: fits(input_len=n * size, output_len=load.output_len), load.input_len // size
    )
    if best and settings.max_model_len is None:
        return Change((("input_len", best * size), ("output_len", load.output_len)),
                      "shorter prompts")  # fmt: skip
    return None


def _fewer(fits: _Fits, settings: Settings, load: Load) -> Change | None:
    best = _most(lambda n: fits(concurrency=n), settings.concurrency - 1)
    return Change((("concurrency", best),), "the others queue") if best else None


def _more_gpus(fits: _Fits, fitter: Fitter, settings: Settings, load: Load) -> Change | None:
    if settings.weights_memory is not None or settings.activation_memory is not None:
        return None  # what was logged on one GPU says nothing of several
    total = load.tp * load.replicas
    for tp in range(load.tp + 1, total + 1):  # of those that are there
        if total % tp == 0 and divides(fitter.model, tp) and fits(tp=tp, num_gpus=total):
            return Change((("tp", tp), ("num_gpus", total)), "fewer copies of the model")
    for tp in range(load.tp + 1, 65):
        if divides(fitter.model, tp) and fits(tp=tp, num_gpus=tp * load.replicas):
            return Change(
                (("tp", tp), ("num_gpus", tp * load.replicas)),
                f"{tp} divides {fitter.model.config.get('num_attention_heads', tp)} heads",
            )
    return None


def _smaller_steps(fits: _Fits, settings: Settings, load: Load) -> Change | None:
    """Fewer tokens per step, or fewer sequences: what the activations depend on."""
    if settings.activation_memory is not None:
        return None
    least = max(1, load.concurrency * load.sequences)
    for tokens in _halves(load.max_batched_tokens, 256):
        if fits(max_batched_tokens=tokens):
            return Change((("max_batched_tokens", tokens),), "prompts take more steps")
    for sequences in _halves(load.max_num_seqs, least):
        if fits(max_num_seqs=sequences):
            return Change((("max_num_seqs", sequences),), "a smaller sampler")
    return None


def _other_gpu(fitter: Fitter, settings: Settings) -> Change | None:
    if settings.weights_memory is not None or settings.activation_memory is not None:
        return None
    for gpu in sorted(gpus().values(), key=lambda g: g.memory_bytes):
        if gpu.memory_bytes > fitter.gpu.memory_bytes and _fits(
            replace(fitter, gpu=gpu), settings, {}
        ):
            return Change((("gpu", gpu.name),), f"{gpu.memory_bytes / 2**30:.2f} GiB visible")
    return None


def _pairs(fitter: Fitter, settings: Settings, load: Load) -> Iterator[Change | None]:
    """Quantised weights or another GPU, with a change that did not suffice alone."""
    found = 0
    for name, value, effect in _first_halves(fitter, settings, load):
        changed = {name: value}
        if name == "gpu":
            other, base = replace(fitter, gpu=gpus()[value]), settings
        else:
            other, base = fitter, replace(settings, **changed)
        for second in _single(other, base, Load.of(base, fitter.model)):
            if second is not None and second.arguments[0][0] not in ("gpu", *changed):
                yield Change((*changed.items(), *second.arguments), f"{effect}; {second.effect}")
                found += 1
                break
        if found == 3:
            return


def _first_halves(fitter: Fitter, settings: Settings, load: Load) -> Iterable[tuple[str, Any, str]]:
    if settings.weights_memory is None and settings.activation_memory is None:
        if settings.dtype == "auto":
            yield "dtype", "fp8", "quantised weights"
            yield "dtype", "int4", "quantised weights"
        if DTYPE_BYTES[load.kv_dtype] > 1:
            yield "kv_dtype", "fp8", "K and V in 8 bits"
        for gpu in ("A100-80GB", "H200-141GB", "B200-180GB"):
            if gpus()[gpu].memory_bytes > fitter.gpu.memory_bytes:
                yield "gpu", gpu, "a larger GPU"
    elif DTYPE_BYTES[load.kv_dtype] > 1:
        yield "kv_dtype", "fp8", "K and V in 8 bits"


def _halves(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start


def _most(fits: Callable[[int], bool], highest: int) -> int:
    """The largest n of 1 to `highest` that fits, 0 if none does: what is less fits too."""
    if highest < 1 or not fits(1):
        return 0
    low, high = 1, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
