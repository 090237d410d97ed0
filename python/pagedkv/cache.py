"""KVCache: the block manager, the tensors that it manages, and the copies between them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

try:
    import torch
except ImportError as error:  # the control plane works without; this does not
    raise ImportError("KVCache needs torch: pip install 'pagedkv[torch]'") from error

from pagedkv import attention, closing
from pagedkv._core import BlockManager, CudaDevice, Device, HostPool, LayerWriter, TransferEngine
from pagedkv.adopt import Adopted, adopt, require_unmoved
from pagedkv.checks import check_source, check_tables
from pagedkv.errors import ConcurrentUse, InvalidSpec, InvalidState, KVError
from pagedkv.fp8 import check_scales
from pagedkv.layout import DevicePool, Layout, num_usable_blocks
from pagedkv.machine import Machine, machine_for
from pagedkv.plan_order import PlanOrder
from pagedkv.preemption import CostModel, swap_or_recompute
from pagedkv.rows import gather_into
from pagedkv.spec import KVSpec
from pagedkv.step import Step
from pagedkv.steps import Steps
from pagedkv.transfers import GONE, Transfers
from pagedkv.tryout import try_copies

__all__ = ["KVCache"]

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class KVCache(Steps):
    """A paged KV cache: `BlockManager` and the tensors that its blocks stand for.

    Args:
        spec: what the model keeps per token.
        device: "cpu", "cuda:0", or a simulated device: see `pagedkv.testing`.
        tensors: an engine's own memory as the device tier: per layer, keys and values as views
            [N, P, H, D] of it, N - 1 usable blocks and block 0 for padding, so no device_memory,
            num_device_blocks or layout. Which strides can be, see `pagedkv.adopt`; copies and
            swaps act on all of them, write, gather and attention where [P, H, D] is contiguous.
            Tried out on two blocks, whose content is then put back: nobody may use them meanwhile.
        device_memory: bytes for the pool, as an int or a size such as "2GiB", or on a GPU a float,
            the fraction of its free memory, but for 96 MiB and the arrays of steps; or give
        num_device_blocks: usable blocks instead.
        host_memory: bytes for the host tier, which sequences are swapped out to; or give
        num_host_blocks: usable blocks instead. By default there is no host tier.
        max_batch: most sequences in one step.
        max_model_len: most tokens in one sequence; by default what the pool holds.
        watermark: blocks that a sequence's first append must leave available.
        copy_method: how blocks in pieces are copied on a GPU: "loop", "batch", "kernel" or
            "staged"; "auto" measures when the cache is made, if it has a host tier. See
            `kv.copy_methods()`.
        scales: per layer (k_scale, v_scale), for layers stored as float8: a stored value is the
            real one / scale, and attention() multiplies by it. By default 1.0.
        layout: "block_major" [N, L, 2, P, H, D], where one block is one contiguous run, or
            "layer_major" [L, 2, N, P, H, D], where one layer is. N counts padding block 0.
        prefill_rate: tokens per second that the model prefills: what preempt() in mode "auto"
            weighs against the bandwidth that it measures. See `pagedkv.preemption`.
        cost_model: what decides instead.

    A context manager; leaving it closes the cache. Commands that it shares with `BlockManager`
    mean what they mean there.

    Raises:
        InvalidSpec: an argument is out of range, a layer is of a kind that it cannot hold, the
            memory holds no block, or `tensors` are others than `spec` and `device` say, overlap, or
            have strides that cannot be.
        DeviceError: the device, or the memory of the host tier, cannot be had.
    """

    _closed = True  # before it is begun
    _process: int | None = None  # whose it is, once it is made

    @torch.inference_mode(False)  # whatever is on now, what is kept may be used without
    def __init__(
        self,
        spec: KVSpec,
        *,
        device: str | torch.device | Device = "cpu",
        tensors: Adopted | None = None,
        device_memory: int | str | float | None = None,
        num_device_blocks: int | None = None,
        host_memory: int | str | None = None,
        num_host_blocks: int | None = None,
        max_batch: int = 256,
        max_model_len: int | None = None,
        watermark: int = 0,
        copy_method: str = "auto",
        scales: Sequence[tuple[float, float]] | None = None,
        layout: Layout = "block_major",
        prefill_rate: float | None = None,
        cost_model: CostModel = swap_or_recompute,
    ) -> None:
        closing.close_kept()
        spec.require_kv()
        self.scales = check_scales(scales, spec)
        machine = self.machine = machine_for(device, copy_method)
        self.device = machine.device
        if isinstance(device_memory, float):
            device_memory = machine.share_of_memory(device_memory, spec, max_batch, max_model_len)
        num_device_blocks = num_usable_blocks(spec, "device", device_memory, num_device_blocks)
        num_host_blocks = num_usable_blocks(spec, "host", host_memory, num_host_blocks) or 0
        if (tensors is None) == (num_device_blocks is None):
            found = "none" if tensors is None else "tensors and another"
            raise InvalidSpec(
                f"expected one of device_memory, num_device_blocks and tensors, found {found}"
            )
        adopted = None if tensors is None else adopt(spec, tensors, machine.device)
        if adopted is not None:
            num_device_blocks = adopted.num_blocks - 1
        assert num_device_blocks is not None
        manager = BlockManager(
            num_device_blocks,
            num_host_blocks,
            block_size=spec.block_size,
            max_batch=max_batch,
            max_model_len=max_model_len,
            watermark=watermark,
        )
        super().__init__(spec, manager, prefill_rate, cost_model)
        self._order = PlanOrder()
        memory = adopted or DevicePool.allocate(spec, num_device_blocks + 1, layout, machine.device)
        self._adopted = adopted
        self._layers = memory.layers
        self._in_rows = memory.in_rows
        self._pool = machine.make_pool(memory, manager)
        kept = memory.layers if memory.in_rows else ()
        self._writers = {i: LayerWriter(self._pool, i, k, v) for i, (k, v) in enumerate(kept)}
        engine = None
        if num_host_blocks or machine.needs_order:
            copier = machine.transfer_device(num_host_blocks > 0)
            engine = TransferEngine(
                copier, memory.block_runs, num_device_blocks, num_host_blocks, owner=memory
            )
            self._transfers = Transfers(
                manager, engine, copier, spec.block_bytes, machine, self._order
            )
        if adopted is not None:
            try_copies(adopted, self._pool, engine, num_host_blocks, machine)
        self._process = os.getpid()
        self._workspaces: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.backend_memory: dict[Any, Any] = {}  # what attention backends keep from step to step
        closing.OPEN.add(self)

    # ---- a step's work ---------------------------------------------------------------------

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Scatter the new tokens' keys [T, H, k_dim] and values [T, H, v_dim] into step.slots.

        In a latent layer they are the vectors [T, 1, k_dim], as the model would make keys and
        values of them (normalized), and the part of the keys beside them, already turned.

        Other float types than the layer's are converted; into float8 as value / scale, where what
        is too large becomes the largest. What is float8 already is stored as it is.

        Raises InvalidSpec for a wrong shape or device, InvalidState if `step` is not this cache's
        open one.
        """
        # K and V mostly are of the layer's own type, which the writer checks quicker than Python.
        is_open = step is self._step is not None
        writer = self._writers.get(layer) if is_open and type(layer) is int else None
        if writer is not None:
            if self._transfers is not None:
                self._transfers.follow()
            if writer.write(step.slots_at, step.num_tokens, k, v):
                if self.machine.holds:
                    self.machine.hold(step.slots, k, v)
                return
        self._require(step)
        pools, num_tokens = self._rows(layer), step.num_tokens
        check_source(k, "k", pools[0], num_tokens)
        check_source(v, "v", pools[1], num_tokens)
        self._follow()
        self.machine.write(layer, step.slots, k, v, pools[0].dtype, self.scales[layer])

    def gather(self, layer: int, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole sequences, [B, H, max(seq_lens), dim], zeros past each length.

        As they are stored: the real ones are `scales[layer]` times that. Views of a workspace that
        the next gather overwrites, whatever its layer.
        """
        lens = step.plan.seq_lens
        width = int(lens.max()) if len(lens) else 0
        return self.gather_blocks(layer, step.block_tables, 0, step.seq_lens, width)

    def gather_blocks(
        self,
        layer: int,
        block_tables: torch.Tensor,
        first_block: int,
        num_tokens: torch.Tensor,
        width: int,
        part: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `num_tokens[b]` tokens from block `first_block` of row b on.

        Args:
            block_tables: int32 [B, W] on the cache's device, each row contiguous.
            num_tokens: int32 [B] on the cache's device, none above `width`.
            width: of the result.
            part: which workspace to use, so that two gathers can be read side by side.

        Returns views [B, H, width, dim], zeros past each row's number. On a GPU nobody can check
        what the arrays say: a block outside the pool is an illegal access.

        Raises InvalidSpec for arrays of another shape, type or device.
        """
        check_tables(block_tables, num_tokens, "num_tokens", self.device)
        self._follow()
        found = []
        for i, pool in enumerate(self._rows(layer)):
            shape = len(num_tokens), pool.shape[2], width, pool.shape[3]
            space = self._workspace(2 * part + i, shape, pool.dtype)
            gather_into(space, self._pool, 2 * layer + i, block_tables, num_tokens, first_block)
            found.append(space)
        self.machine.land()
        return found[0], found[1]

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        step: Step,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        attn_mask: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Attention of the new tokens to their sequences; see `pagedkv.attention.attend`."""
        self._require(step)
        self._pools(layer)
        return attention.attend(
            self, layer, q, step, scale=scale, softcap=softcap, window=window,
            attn_mask=attn_mask, backend=backend,
        )  # fmt: skip

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k(layer) and v(layer), for work that comes after all that was queued."""
        self._follow()
        if self.device.type == "cpu":  # where nothing is queued, unless it is a simulated device
            self._pool.synchronize()
        return self._pools(layer)

    def _follow(self) -> None:
        if self._transfers is not None:
            self._transfers.follow()

    # ---- tensors ---------------------------------------------------------------------------

    def k(self, layer: int) -> torch.Tensor:
        """The layer's keys, a view [N, P, H, k_dim]; block 0 is padding."""
        return self._pools(layer)[0]

    def v(self, layer: int) -> torch.Tensor:
        """The layer's values, a view [N, P, H, v_dim]."""
        return self._pools(layer)[1]

    @property
    def host_pool(self) -> HostPool | None:
        """The pool, where blocks are [P, H, D] in host memory and work on them is done at once."""
        return self._pool if self._in_rows and isinstance(self._pool, HostPool) else None

    def pools(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """k(layer) and v(layer) of all layers."""
        return self._layers

    def _pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._closed:
            raise InvalidState("this cache is closed")
        if isinstance(layer, bool) or not 0 <= layer < len(self._layers):
            raise InvalidSpec(f"layer is {layer}, expected 0 to {len(self._layers) - 1}")
        return self._layers[layer]

    def _rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._in_rows:
            raise InvalidSpec(
                "the adopted tensors' blocks are not contiguous [P, H, D]: copies and swaps act on "
                "them, but write, gather and attention are the engine's own"
            )
        return self._pools(layer)

    def verify(self) -> None:
        """Recompute every count from scratch; raises BrokenInvariant on a difference.

        Raises InvalidState if adopted tensors are not in the memory any more that they were in.
        """
        super().verify()
        if self._adopted is not None:
            require_unmoved(self._adopted, self.spec, self.device)

    def copy_methods(self) -> str:
        """How blocks in pieces are copied, as a table: what was measured, and what is used."""
        device = self._transfers.device if self._transfers is not None else None
        return device.copy_methods() if isinstance(device, CudaDevice) else "memcpy\n"

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, the padding block among them."""
        return self.spec.pool_bytes(self.manager.num_device_blocks)

    def _workspace(self, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory to gather into, kept; the layers of a step mostly ask for the same view."""
        if self.machine.is_capturing():  # into a graph, which would use it after it was replaced
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory, view = self._workspaces.get(i, (_NOTHING, _NOTHING))
        if view.shape != shape or view.dtype != dtype:
            num_bytes = math.prod(shape) * dtype.itemsize
            if memory.nbytes < num_bytes:
                if memory.is_cuda:  # what was queued on another stream still reads it
                    memory.record_stream(torch.cuda.current_stream(memory.device))
                with torch.inference_mode(False):
                    memory = torch.empty(
                        num_bytes + num_bytes // 4, dtype=torch.uint8, device=self.device
                    )
            view = memory[:num_bytes].view(dtype).view(shape)
            self._workspaces[i] = memory, view
        return view

    # ---- closing ---------------------------------------------------------------------------

    def close(self) -> None:
        """Give the memory back, after what is under way has ended.

        The cache refuses further commands; a second close is nothing. Interpreter exit closes what
        is open. An open step is rolled back. In a forked child it only forgets: the copies are its
        parent's.

        Raises InvalidState while a graph is captured, ConcurrentUse while another thread or a
        callback is inside: nothing has changed then. Raises DeviceError if the device refuses to
        wait for what is under way: the cache then keeps its memory, and may be closed again.
        """
        if self._closed:
            return
        if self._process != os.getpid():
            self._forget()
            return
        if self.machine.is_capturing():
            raise InvalidState("a CUDA graph is being captured: close the cache outside of that")
        with nullcontext() if self._transfers is None else self._transfers.alone():
            self._close_alone()

    def _close_alone(self) -> None:
        try:
            self.rollback()
        except ConcurrentUse:  # whoever is inside goes on: the cache stays open
            raise
        except BaseException:  # the manager refuses further use: the memory goes all the same
            self._end()
            raise
        self._end()

    def _end(self) -> None:
        if self._transfers is not None:
            self._transfers.end()
        self._pool.synchronize()
        self._forget()

    def _forget(self) -> None:
        """Let all of it go. An interrupt on the way leaves a cache to be closed again."""
        if self._transfers is not None:
            self._transfers.forget()
        self._step = self._adopted = None
        self._layers = ()
        self._workspaces, self.backend_memory, self._writers = {}, {}, {}
        self.machine = Machine()  # which holds nothing
        self._pool, self._transfers, self._closed = GONE, None, True

    def __del__(self) -> None:
        # The last reference may go, or the collector come, while a graph is captured, say.
        try:
            self.close()
        except KVError:
            pass
        finally:  # of an interrupt, too
            if not self._closed:
                closing.KEPT.append(self)

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
