"""Whether a load fits: the budget of one GPU, its pool, and what the load needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pagedkv.planner.budget import (
    Component,
    activation_bytes,
    activations,
    exactly,
    non_torch,
    roughly,
)
from pagedkv.planner.catalog import Gpu
from pagedkv.planner.groups import Pool
from pagedkv.planner.load import Load, Settings
from pagedkv.planner.model import Model
from pagedkv.planner.weights import Weights, weigh, weights_dtype
from pagedkv.spec import DTYPE_BYTES, KVSpec
from pagedkv.units import format_bytes

__all__ = ["Fit", "Fitter"]


@dataclass(frozen=True)
class Fit:
    """One GPU, one replica.

    Attributes:
        usable: utilization * the GPU's memory, what everything below shares.
        weights, activations, non_torch: what is there before K and V.
        available: what is left for K and V; below 0 where nothing is.
        num_blocks: usable blocks of the pool.
        sequence_blocks, sequence_bytes: of one sequence of max_model_len tokens.
        needed_blocks, needed_bytes: of the load, its prompts shared among beams and samples.
        shortfalls: why it does not fit, in words; none where it does.
    """

    load: Load
    gpu: Gpu
    pool: Pool
    weighed: Weights
    usable: int
    weights: Component
    activations: Component
    non_torch: Component
    available: int
    num_blocks: int
    sequence_blocks: int
    sequence_bytes: int
    needed_blocks: int
    needed_bytes: int
    shortfalls: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def state_bytes(self) -> int:
        """Recurrent state of the load's sequences, beside the pool."""
        return self.load.concurrency * self.load.sequences * self.pool.spec.state_bytes

    @property
    def kv_bytes(self) -> int:
        """The pool as KVCache allocates it, its padding block among them, and the state."""
        pool = self.pool.pool_bytes(self.num_blocks) if self.num_blocks else 0
        return pool + self.state_bytes

    def max_concurrency(self, length: int) -> float:
        """Sequences of so many tokens that the memory holds at once, as a fraction."""
        blocks = self.pool.blocks(length, self.load.max_batched_tokens)
        state = self.pool.spec.state_bytes
        if state:
            memory = max(0, self.available - self.pool.block_bytes)
            return memory / (blocks * self.pool.block_bytes + state)
        return self.num_blocks / blocks


@dataclass(frozen=True)
class Fitter:
    """Fits one model on one GPU, again and again with other settings."""

    model: Model
    gpu: Gpu
    _weighed: dict[tuple[str, int], Weights] = field(default_factory=dict, compare=False)

    def fit(self, settings: Settings) -> Fit:
        """Raises InvalidSpec if the settings are no load for this model."""
        load = Load.of(settings, self.model)
        weighed = self._weigh(settings.dtype, load.tp)
        weights = _weights(weighed, load)
        peak = self._activations(settings, load)
        others = non_torch(load.tp)
        if load.non_torch_memory is not None:
            others = exactly("non-torch", load.non_torch_memory, "given")
        usable = int(load.utilization * self.gpu.memory_bytes)
        available = usable - weights.num_bytes - peak.num_bytes - others.num_bytes
        pool = self._pool(load)
        steps = load.max_batched_tokens
        sequences = load.concurrency * load.sequences
        state = sequences * pool.spec.state_bytes
        needed = load.concurrency * pool.request_blocks(
            load.length, steps, load.sequences, load.input_len
        )
        found = Fit(
            load=load,
            gpu=self.gpu,
            pool=pool,
            weighed=weighed,
            usable=usable,
            weights=weights,
            activations=peak,
            non_torch=others,
            available=available,
            num_blocks=pool.num_blocks(available - state),
            sequence_blocks=pool.blocks(load.max_model_len, steps),
            sequence_bytes=pool.bytes_of(load.max_model_len, steps),
            needed_blocks=needed,
            needed_bytes=needed * pool.block_bytes + state,
            shortfalls=(),
        )
        return replace(found, shortfalls=tuple(_shortfalls(found)))

    def _weigh(self, dtype: str, tp: int) -> Weights:
        key = (dtype, tp)
        if key not in self._weighed:
            self._weighed[key] = weigh(self.model, dtype, tp)
        return self._weighed[key]

    def _activations(self, settings: Settings, load: Load) -> Component:
        if load.activation_memory is not None:
            return exactly("activations", load.activation_memory, "given")
        element = DTYPE_BYTES[weights_dtype(self.model, settings.dtype)]
        return activations(
            activation_bytes(
                self.model.config,
                max_num_seqs=load.max_num_seqs,
                max_batched_tokens=load.max_batched_tokens,
                element=element,
                tp=load.tp,
            )
        )

    def _pool(self, load: Load) -> Pool:
        return Pool.of(self.whole(load).shard(load.tp), capped=load.capped)

    def whole(self, load: Load) -> KVSpec:
        """What all GPUs of a copy keep together."""
        return KVSpec.from_config(
            self.model.config,
            dtype=load.kv_dtype,
            state_dtype=load.state_dtype,
            block_size=load.block_size,
        )


def _weights(weighed: Weights, load: Load) -> Component:
    if load.weights_memory is not None:
        return exactly("weights", load.weights_memory, "given")
    if weighed.exact:
        return exactly("weights", weighed.num_bytes, weighed.source)
    band = weighed.num_bytes // 50
    low, high = weighed.num_bytes - band, max(weighed.most_bytes, weighed.num_bytes) + band
    return roughly("weights", weighed.num_bytes, low, high, weighed.source)


def _shortfalls(fit: Fit) -> list[str]:
    load, size = fit.load, format_bytes
    if fit.available <= 0:
        taken = fit.usable - fit.available
        return [
            f"weights, activations and non-torch memory take {size(taken)} of a budget of "
            f"{size(fit.usable)}"
        ]
    found = []
    if fit.sequence_bytes > fit.available - fit.pool.block_bytes:
        found.append(
            f"one sequence of {load.max_model_len:,} tokens needs {size(fit.sequence_bytes)} of K "
            f"and V, there are {size(fit.available)}"
        )
    if fit.needed_blocks > fit.num_blocks or fit.needed_bytes > fit.available:
        found.append(
            f"{load.concurrency:,} requests of {load.length:,} tokens need "
            f"{size(fit.needed_bytes)} of K and V, there are {size(fit.available)}"
        )
    return found
