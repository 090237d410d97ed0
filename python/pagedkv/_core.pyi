"""The extension module. `pagedkv` re-exports what users need; see there for the words."""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn, final

import numpy as np
from numpy.typing import NDArray

# Anything with the buffer protocol (numpy, torch CPU tensors, array.array); lists work, slowly.
_Buffer = Any
_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]
_Rows = tuple[int, int, float]
__version__: str
__compiler__: str

class _Type(type): ...  # what pybind11 puts under its classes

class _Object(metaclass=_Type):
    # Comes out of calls; a class that users make has an __init__ of its own.
    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn: ...

@final
class PrefixHit(_Object):
    """What a lookup found.

    `num_tokens` are on the device, in full blocks and a part of one more: create() takes them.
    `num_host_tokens`, in full blocks, follow those in the host tier: fetch() brings them.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_full_blocks(self) -> int: ...
    @property
    def num_partial_tokens(self) -> int: ...
    @property
    def num_host_tokens(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

@final
class TierStats(_Object):
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_active(self) -> int: ...
    @property
    def num_cached(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Stats(_Object):
    @property
    def device(self) -> TierStats: ...
    @property
    def host(self) -> TierStats: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_logical_blocks(self) -> int: ...
    @property
    def num_peak_blocks(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_appended_tokens(self) -> int: ...
    @property
    def num_hit_tokens(self) -> int: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def num_merged_blocks(self) -> int: ...
    @property
    def num_evicted_blocks(self) -> int: ...
    @property
    def num_swapped_out_blocks(self) -> int: ...
    @property
    def num_swapped_in_blocks(self) -> int: ...
    @property
    def num_transfers(self) -> int: ...
    @property
    def metadata_bytes(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Snapshot(_Object):
    """The block tree at one moment, as arrays with one entry per node.

    `parents` are positions in these arrays (-1 for a child of a root), parents before children.
    """

    @property
    def parents(self) -> _Int32: ...
    @property
    def blocks(self) -> _Int32: ...
    @property
    def num_tokens(self) -> _Int32: ...
    @property
    def counts(self) -> _Int32: ...
    @property
    def published(self) -> NDArray[np.bool_]: ...
    @property
    def host_blocks(self) -> _Int32: ...
    @property
    def host_counts(self) -> _Int32: ...
    @property
    def sequence_ids(self) -> _Int64: ...
    @property
    def sequence_nodes(self) -> _Int32: ...
    @property
    def sequence_lengths(self) -> _Int64: ...
    @property
    def sequence_tiers(self) -> NDArray[np.uint8]: ...
    def __eq__(self, other: object) -> bool: ...
    __hash__: None  # type: ignore[assignment]

@final
class StepPlan(_Object):
    """Read-only views of the manager's persistent buffers, valid until the next append.

    What one step does: where each new token goes, what each sequence may read, and which blocks
    to copy first. Reading a plan after the next append raises InvalidState; `copy()` and pickling
    make a value that stays. T is the number of new tokens, B the batch:
        input_ids int64 [T], or None when the append carried no tokens
        slots int64 [T]: block * block_size + offset, where token t's K and V go
        positions int64 [T]: index of the token in its sequence
        query_starts int32 [B + 1]: row b's new tokens are [query_starts[b], query_starts[b + 1])
        seq_lens int32 [B]: length of each sequence after the step
        block_tables int32 [B, W]: W is the widest row, padded with block 0; rows are strided
        copies int32 [n, 3]: source block, target block, tokens; all precede the step's writes
        table_updates int32 [m, 3]: row, first and one-past-last column rewritten by this step
        wait_for int64 [k]: transfers that must end before this step touches its blocks
        step, after: its number, from 1, and that of the last step committed before it, or 0
    """

    @property
    def step(self) -> int: ...
    @property
    def after(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def input_ids(self) -> _Int64 | None: ...
    @property
    def slots(self) -> _Int64: ...
    @property
    def positions(self) -> _Int64: ...
    @property
    def query_starts(self) -> _Int32: ...
    @property
    def seq_lens(self) -> _Int32: ...
    @property
    def block_tables(self) -> _Int32: ...
    @property
    def copies(self) -> _Int32: ...
    @property
    def table_updates(self) -> _Int32: ...
    @property
    def wait_for(self) -> _Int64: ...
    def copy(self) -> StepPlan: ...
    def __eq__(self, other: object) -> bool: ...

@final
class TransferPlan(_Object):
    """Copies of blocks between the tiers, to be carried out in any order. A value; it pickles.

    Not before the steps that were committed earlier, nor before the transfers in `wait_for` have
    ended. The manager learns of the end by complete() or abort().

        copies int32 [n, 3]: source block of one tier, target block of the other, tokens in it
        wait_for int64 [k]: transfers that must end before this one begins
        id, after: its number, from 1, and that of the last step committed before it, or 0
    """

    @property
    def id(self) -> int: ...
    @property
    def after(self) -> int: ...
    @property
    def direction(self) -> Literal["out", "in"]: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def copies(self) -> _Int32: ...
    @property
    def wait_for(self) -> _Int64: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Aborted(_Object):
    """What abort() took along, int64 ids each.

    `transfers` needed the aborted one and are void: nothing comes of them, but each still has to
    end by complete() or abort(). `sequences` lost their path: restore() or release() them; each
    waited for the transfer in `waited_for`.
    """

    @property
    def transfers(self) -> _Int64: ...
    @property
    def sequences(self) -> _Int64: ...
    @property
    def waited_for(self) -> _Int64: ...

@final
class BlockManager(_Object):
    """The control plane: which block holds which tokens of which sequence. No tensors, no torch.

    Args:
        num_device_blocks: blocks in the device tier, block 0 (padding) not counted.
        num_host_blocks: blocks in the host tier.
        block_size: tokens per block, 1 to 4096.
        max_batch: most sequences in one step.
        max_model_len: most tokens in one sequence; by default what the device tier holds.
        watermark: blocks that a sequence's first append must leave available.

    Ids are int64, lengths and counts int64 or int32, tokens int64 or int32. Batch arguments are
    one-dimensional contiguous host buffers; a list works and is the slow way.
    """

    def __init__(
        self, num_device_blocks: int, num_host_blocks: int = 0, block_size: int = 16, *,
        max_batch: int = 256, max_model_len: int | None = None, watermark: int = 0,
    ) -> None: ...  # fmt: skip
    @property
    def num_device_blocks(self) -> int: ...
    @property
    def num_host_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def watermark(self) -> int: ...
    @property
    def open_step(self) -> int:
        """Number of the open step, 0 if none is. For any thread, as stats() and snapshot() are."""
    def create(self, tokens: _Buffer | None = None, *, salt: bytes | str | None = None) -> int:
        """A new sequence that holds the longest published prefix of `tokens` but the last token.

        Takes no block. Without tokens the sequence is anonymous: it shares by fork only and is
        never a prefix hit.
        """
    def num_cached(self, id: int) -> int:
        """Tokens that create() found: append from tokens[num_cached:]."""
    def length(self, id: int) -> int: ...
    def lookup(self, tokens: _Buffer, *, salt: bytes | str | None = None) -> PrefixHit:
        """What create() would take. Changes nothing."""
    def append(
        self, ids: _Buffer, tokens: _Buffer | None = None, counts: _Buffer | None = None
    ) -> StepPlan:
        """Open a step: `counts[b]` new tokens (default 1) for each of `ids`, all or nothing.

        `tokens` are the new ids of all rows, one after the other. Leave them out when they are
        not known on the host yet, and record() them later.
        """
    def commit(self, plan: StepPlan, lengths: _Buffer | None = None) -> None:
        """Close the step: its work is queued. Publishes full blocks as prefix hits.

        `lengths[b]` keeps only that much of row b, for rejected speculative tokens.
        """
    def rollback(self, plan: StepPlan | None = None) -> None:
        """Close the step, or the open one if any: paths, lengths and counts are as before it."""
    def record(self, ids: _Buffer, tokens: _Buffer, counts: _Buffer | None = None) -> None:
        """Tell tokens that were appended without: `counts[b]` (default 1) each, in order.

        Looks at all blocks of a sequence from its first unknown token on: tell many at once.
        """
    def fork(self, id: int, n: int) -> _Int64:
        """n ids that share all of `id`; the first is `id` itself."""
    def reorder(self, ids: _Buffer, parents: _Buffer) -> None:
        """ids[i] becomes what ids[parents[i]] was, for all i at once."""
    def truncate(self, ids: _Buffer, lengths: _Buffer) -> None:
        """Keep only the first lengths[i] tokens of ids[i]."""
    def release(self, ids: _Buffer) -> None:
        """Forget sequences. Their published blocks stay, as prefix hits, until evicted."""
    def clear(self, salt: bytes | str | None = None) -> None:
        """No cached block of this salt (default: of any) is a hit any more."""
    def num_needed(self, ids: _Buffer, counts: _Buffer | None = None) -> int:
        """Blocks that append(ids, counts=counts) would take."""
    def swap_out(self, ids: _Buffer) -> TransferPlan:
        """Move whole sequences to the host tier.

        A block that several share moves once, one that the host still has is not copied. A full
        block stays cached on the device; all others there are free, and whoever takes one waits
        for the transfer (`StepPlan.wait_for`).

        Raises OutOfBlocks, NotResident (dropped), InvalidState (on the host already, or no host
        tier, or a step is open).
        """
    def swap_in(self, ids: _Buffer) -> TransferPlan:
        """Move whole sequences back. Until complete(), a step with one of them raises NotResident.

        Raises OutOfBlocks, NotResident (dropped), InvalidState (on the device already).
        """
    def fetch(self, id: int) -> TransferPlan:
        """Bring what the host tier has of the prompt of create() or restore(), beyond the device.

        The sequence is that much longer at once, and resident after complete(). Without copies if
        there is nothing to bring. Raises OutOfBlocks; then the sequence is as it was.
        """
    def complete(self, transfer: int | TransferPlan) -> None:
        """All copies of a transfer have ended. Raises InvalidState before those it waits for."""
    def abort(self, transfer: int | TransferPlan) -> Aborted:
        """The copies of a transfer have ended, or will never begin, and count for nothing.

        Sources are untouched. Sequences that wait for it lose their path, as after drop().
        """
    def transfers(self) -> _Int64:
        """Those planned that have not ended, by ascending id."""
    def drop(self, ids: _Buffer) -> None:
        """Give up the paths of sequences, which remember their tokens: to be recomputed."""
    def restore(self, ids: _Buffer) -> None:
        """Dropped sequences hold again what is still a prefix hit of their tokens."""
    def tier(self, id: int) -> Literal["device", "host"]:
        """Where the sequence lives."""
    def is_dropped(self, id: int) -> bool:
        """Whether the sequence waits for restore()."""
    def is_resident(self, id: int) -> bool:
        """Whether the sequence can be in a step now."""
    def waits_for(self, id: int) -> int | None:
        """The transfer in flight that the sequence waits for."""
    def num_freed(self, ids: _Buffer) -> int:
        """Device blocks that these sequences alone hold."""
    def block_table(self, id: int) -> _Int32: ...
    def stats(self) -> Stats: ...
    def snapshot(self) -> Snapshot: ...
    def verify(self) -> None:
        """Recompute every count from scratch; raises BrokenInvariant on a difference."""

class Device(_Object):
    """A machine: streams, copies and events. One thread at a time."""

    @property
    def num_host_waits(self) -> int: ...
    def close(self) -> None:
        """Wait for all that is under way; nothing more is accepted."""

@final
class HostDevice(Device):
    """This process: copies run on worker threads, at most as many as the machine has."""

    def __init__(self) -> None: ...

@final
class SimulatedDevice(Device):
    """A machine whose copies run late, torn and out of order, as far as their order allows.

    Args:
        seed: decides everything: the same calls give the same run.
        schedule: "random", "lazy" (nothing runs that nobody waits for) or "eager".
        num_compute_streams: streams that steps can be queued on; see use_compute_stream().
        max_events: events that there are at a time; it refuses more.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        schedule: Literal["eager", "lazy", "random"] = "random",
        num_compute_streams: int = 1,
        max_events: int = 1 << 20,
    ) -> None: ...
    def use_compute_stream(self, index: int) -> None:
        """Steps are queued on this stream from now on."""
    def hold_next(self) -> None:
        """The next piece of work runs only when somebody waits for it."""
    def fail_copy(self, k: int = 1) -> None:
        """The k-th copy from now fails half way."""
    def fail_allocate(self, k: int = 1) -> None:
        """The k-th allocation of host memory from now fails."""
    def lose(self) -> None:
        """The machine is gone: what is pending never runs, new work is refused."""
    def skip(self, site: str) -> None:
        """Leave out the fences of a site of the transfer engine, to see that a test notices."""
    @property
    def violations(self) -> list[str]:
        """Pairs of accesses, one of them a write, that nothing orders."""
    @property
    def num_events(self) -> int: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...

@final
class TransferEngine(_Object):
    """Carries out transfer plans on a device.

    Args:
        block_runs: what a block consists of: (address in block 0, bytes between blocks, bytes).
        owner: of the memory in `block_runs`; kept alive.

    Raises DeviceError if the host tier's memory cannot be had.
    """

    def __init__(
        self, device: Device, block_runs: Sequence[tuple[int, int, int]], num_device_blocks: int,
        num_host_blocks: int, *, owner: object = None,
    ) -> None: ...  # fmt: skip
    def submit(self, plan: TransferPlan) -> None:
        """Queue a plan behind all that the caller's stream was given."""
    def step(self, plan: StepPlan) -> None:
        """Make the caller's stream wait for what a step has to wait for. Raises DeviceError."""
    def follow(self) -> None:
        """Make the caller's stream continue the one that he was on before. Raises DeviceError."""
    def has_moved(self) -> bool:
        """False if follow() has nothing to do."""
    def poll(self, told: list[tuple[int, str | None, float]]) -> None:
        """Append what has ended since: (id, why it failed or None, seconds that its copies took).

        Never blocks. 0 seconds: nobody measured. An interrupt loses none.
        """
    def wait(self, transfer: int) -> None:
        """Block until a transfer has ended, which poll() tells."""
    def cancel(self, transfer: int) -> bool:
        """False: its copies have begun, or ended."""
    def close(self) -> None:
        """Cancel what has not begun, wait for the rest, give the host tier back, or DeviceError."""
    def in_flight(self, transfer: int) -> bool:
        """Whether poll() has still to tell its end."""
    @property
    def num_in_flight(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def num_runs(self) -> int: ...

class Pool(_Object):
    """What a step does with tensors and arrays, by address. The caller keeps them alive.

    Args of its classes:
        regions: (address, bytes from block to block, bytes of a token), one per tensor.
        num_blocks: blocks in each region, block 0 among them.

    A HostPool raises InvalidSpec, before it touches memory, for a block or slot outside of it.
    """

    def begin_step(self, plan: StepPlan) -> None:
        """Bring the plan's arrays to where the tensors are, and carry out its copies."""
    def copy_blocks(self, copies: int, num_copies: int) -> None:
        """Rows of int32: source block, target block, tokens."""
    def write(
        self, layer: int, slots: int, num_tokens: int, k: int, k_stride: int, v: int, v_stride: int
    ) -> None:
        """Token t, at address k + t * k_stride and v + t * v_stride, goes to slots[t]."""
    def gather(
        self, region: int, block_tables: int, table_stride: int, num_rows: int, table_width: int,
        first_block: int, num_tokens: int, num_heads: int, width: int, target: int,
    ) -> None:  # fmt: skip
        """num_tokens[b] tokens from block first_block of row b on, into [B, heads, width, dim]."""
    def synchronize(self) -> None:
        """Block until all that was queued has ended."""

@final
class HostPool(Pool):
    """In host memory, at once. Keeps `owner` alive."""

    def __init__(
        self, regions: Sequence[tuple[int, int, int]], num_blocks: int, block_size: int,
        owner: object = None,
    ) -> None: ...  # fmt: skip
    def attend(
        self, layer: int, dtype: str, latent: bool, block_tables: int, table_stride: int,
        num_rows: int, table_width: int, seq_lens: int, num_kv_heads: int, group: int,
        scale: float, softcap: float, window: int, firsts: int, queries: int, outputs: int,
        sums: int, num_threads: int,
    ) -> None:  # fmt: skip
        """Attention of one new token per row, on up to num_threads; K, V "float32" or "bfloat16".

        Row b from token `firsts[b]` on, int32. Queries and outputs are float32 [rows, num_kv_heads
        * group, dim], dims multiples of 8, `sums` [rows, num_kv_heads * group]. 0 is none."""

@final
class SimulatedPool(Pool):
    """On the compute stream of a simulated device; gather() waits for it. Keeps `owner` alive."""

    def __init__(
        self, device: SimulatedDevice, regions: Sequence[tuple[int, int, int]], num_blocks: int,
        block_size: int, owner: object = None,
    ) -> None: ...  # fmt: skip

@final
class LayerWriter(_Object):
    """Writes to a pool's layer k, v [N, P, H, D], by what the tensors' type exports for DLPack."""

    def __init__(self, pool: Pool, layer: int, k: object, v: object) -> None: ...
    def write(self, slots: int, num_tokens: int, k: object, v: object) -> bool:
        """If they are dense [num_tokens, H, D], of the pool's type and device; False: nothing."""
    def write_into(self, k_pool: object, v_pool: object, *rest: object) -> bool:
        """The same of k, v, slots, if the pools are those given, and slots dense int64 [T]."""

class CudaRuntime(_Object):
    """The calls of CUDA that the package makes. `pagedkv._cuda.runtime()` gives CUDA's own."""

@final
class CudaDevice(Device):
    """The GPU of this index: copies run on its own streams, steps on the caller's.

    Args:
        copy_method: how pieces are copied between the tiers: "loop", "batch", "kernel" or
            "staged"; "auto" is what was measured.
    Raises DeviceError, which names the call of CUDA that failed and what to do.
    """

    def __init__(
        self, runtime: CudaRuntime, index: int = 0, *, copy_method: str = "auto"
    ) -> None: ...
    def use_stream(self, stream: int) -> None:
        """CUDA's handle of the stream that the caller's work is queued on from now on."""
    def is_capturing(self, stream: int | None = None) -> bool:
        """Whether this stream, or the one in use, is being captured into a graph."""
    def calibrate(self) -> None:
        """Measure the methods of copying, which takes a fraction of a second."""
    def copy_methods(self) -> str:
        """What was measured, by direction, size and number of pieces, and what is used."""
    @property
    def index(self) -> int: ...
    @property
    def is_simulated(self) -> bool: ...
    @property
    def num_ready_bytes(self) -> int:
        """Of the host tier, pinned by now, or refused by the system."""
    @property
    def num_pageable_bytes(self) -> int:
        """Of the host tier, that the system refused to pin: their copies are slower."""

@final
class CudaPool(Pool):
    """On the caller's stream of a GPU. Tensors and arrays are in memory that the device can read.

    Args:
        max_batch, max_tokens: of a step whose arrays are brought to `step_memory`; the token arrays
            of a larger one stay on the host.
        table_stride: cells in a row of the block tables.
        step_memory: address of step_bytes() bytes on the device.
        owner: of `regions` and `step_memory`; kept alive.
    """

    def __init__(
        self, device: CudaDevice, regions: Sequence[tuple[int, int, int]], num_blocks: int,
        block_size: int, max_batch: int, max_tokens: int, table_stride: int, step_memory: int,
        owner: object = None,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def step_bytes(max_batch: int, max_tokens: int, table_stride: int) -> int: ...
    def write_fp8(
        self, layer: int, slots: int, num_tokens: int, dtype: str, format: str, k: _Rows, v: _Rows
    ) -> None:
        """write() of wider floats into a pool of 8-bit ones. Rows: address, stride, scale."""
    def address(self, array: str) -> int | None:
        """Where an array of the last step is on the device; None if it stayed on the host."""

@final
class SimulatedCuda(CudaRuntime):
    """CUDA on a machine without a GPU, as late and out of order as was declared.

    Device memory is host memory. See SimulatedDevice for `seed` and `schedule`."""

    def __init__(
        self, seed: int = 0, *, schedule: Literal["eager", "lazy", "random"] = "random",
        num_devices: int = 1, has_batch: bool = True,
    ) -> None: ...  # fmt: skip
    def fail(self, function: str, code: int, k: int = 1) -> None:
        """The k-th call of this function of CUDA from now on returns this error code."""
    def limit_pinned(self, num_bytes: int) -> None:
        """More host memory than that cannot be pinned."""
    def make_stream(self) -> int:
        """A stream of the caller's, for CudaDevice.use_stream(); 0 and 2 are CUDA's own."""
    def capture(self, stream: int, capturing: bool) -> None:
        """Whether that stream is being captured into a graph from now on."""
    def num_calls(self, function: str) -> int: ...
    def hold_next(self) -> None:
        """The next piece of work runs only when somebody waits for it."""
    def fail_copy(self, k: int = 1) -> None:
        """The k-th copy from now fails half way, and the device is lost."""
    @property
    def violations(self) -> list[str]:
        """Pairs of accesses by copies, one of them a write, that nothing orders. Not of kernels."""
    @property
    def num_pending(self) -> int: ...
    @property
    def num_live(self) -> int:
        """Streams, events and allocations that were not given back."""
