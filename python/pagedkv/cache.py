"""KVCache: the block manager, the tensors that it manages, and the copies between them."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal

try:
    import torch
except ImportError as error:  # the control plane works without; this does not
    raise ImportError("KVCache needs torch: pip install 'pagedkv[torch]'") from error

from pagedkv import attention
from pagedkv._core import BlockManager, HostPool, PrefixHit, Stats, StepPlan
from pagedkv.errors import InvalidSpec, InvalidState
from pagedkv.spec import KVSpec, LayerSpec
from pagedkv.step import Step
from pagedkv.units import parse_bytes

__all__ = ["KVCache"]

_NOTHING = torch.empty(0, dtype=torch.uint8)

Layout = Literal["block_major", "layer_major"]


class KVCache:
    """A paged KV cache: `BlockManager` and the tensors that its blocks stand for.

    Args:
        spec: what the model keeps per token.
        device: "cpu". (CUDA devices are not supported yet.)
        device_memory: bytes for the pool, as an int or a size such as "2GiB"; or give
        num_device_blocks: usable blocks instead.
        max_batch: most sequences in one step.
        max_model_len: most tokens in one sequence; by default what the pool holds.
        watermark: blocks that a sequence's first append must leave available.
        layout: "block_major" [N, L, 2, P, H, D], where one block is one contiguous run, or
            "layer_major" [L, 2, N, P, H, D], where one layer is. N counts padding block 0.

    A context manager; leaving it closes the cache. Commands that it shares with `BlockManager`
    mean what they mean there.

    Raises:
        InvalidSpec: an argument is out of range, or the memory holds no block.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        device: str | torch.device = "cpu",
        device_memory: int | str | None = None,
        num_device_blocks: int | None = None,
        max_batch: int = 256,
        max_model_len: int | None = None,
        watermark: int = 0,
        layout: Layout = "block_major",
    ) -> None:
        self.spec = spec
        self.device = _device(device)
        self.layout = layout
        if (device_memory is None) == (num_device_blocks is None):
            raise InvalidSpec("expected one of device_memory and num_device_blocks")
        if num_device_blocks is None:
            assert device_memory is not None
            num_device_blocks = spec.num_blocks(parse_bytes(device_memory, "device_memory"))
            if num_device_blocks < 1:
                raise InvalidSpec(
                    f"device_memory is {device_memory!r}, expected at least {spec.pool_bytes(1)} "
                    "bytes: one block, and one for padding"
                )
        self.manager = BlockManager(
            num_device_blocks,
            block_size=spec.block_size,
            max_batch=max_batch,
            max_model_len=max_model_len,
            watermark=watermark,
        )
        self._layers = _allocate(spec, num_device_blocks + 1, layout)
        self._pool = HostPool(
            [
                (t.data_ptr(), t.stride(0) * t.element_size(), t.stride(1) * t.element_size())
                for layer in self._layers
                for t in layer
            ],
            num_device_blocks + 1,
            spec.block_size,
        )
        self._step: Step | None = None
        self._workspaces: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._closed = False

    # ---- sequences -------------------------------------------------------------------------

    def create(self, tokens: Any = None, *, salt: bytes | str | None = None) -> int:
        """A new sequence that holds the longest published prefix of `tokens` but the last one."""
        return self._open_manager().create(tokens, salt=salt)

    def num_cached(self, id: int) -> int:
        """Tokens that create() found."""
        return self.manager.num_cached(id)

    def length(self, id: int) -> int:
        """Tokens in the sequence."""
        return self.manager.length(id)

    def lookup(self, tokens: Any, *, salt: bytes | str | None = None) -> PrefixHit:
        """What create() would take. Changes nothing."""
        return self.manager.lookup(tokens, salt=salt)

    def fork(self, id: int, n: int) -> Any:
        """n ids, int64 [n], that share all of `id`; the first is `id` itself."""
        return self._open_manager().fork(id, n)

    def reorder(self, ids: Any, parents: Any) -> None:
        """ids[i] becomes what ids[parents[i]] was, for all i at once."""
        self._open_manager().reorder(ids, parents)

    def truncate(self, ids: Any, lengths: Any) -> None:
        """Keep only the first lengths[i] tokens of ids[i]."""
        self._open_manager().truncate(ids, lengths)

    def record(self, ids: Any, tokens: Any, *, counts: Any = None) -> None:
        """Tell tokens that were appended without: counts[b] (default 1) per sequence, in order."""
        self._open_manager().record(ids, tokens, counts=counts)

    def release(self, ids: Any) -> None:
        """Forget sequences. Their published blocks stay, as prefix hits, until evicted."""
        self._open_manager().release(ids)

    def clear(self, salt: bytes | str | None = None) -> None:
        """No cached block of this salt (default: of any) is a hit any more."""
        self._open_manager().clear(salt)

    def num_needed(self, ids: Any, counts: Any = None) -> int:
        """Blocks that a step would take."""
        return self.manager.num_needed(ids, counts)

    def num_freed(self, ids: Any) -> int:
        """Blocks that these sequences alone hold."""
        return self.manager.num_freed(ids)

    def stats(self) -> Stats:
        """Counts now, and totals since the start."""
        return self.manager.stats()

    # ---- steps -----------------------------------------------------------------------------

    def step(self, ids: Any, tokens: Any = None, counts: Any = None) -> Step:
        """Open a step of `counts[b]` (default 1) new tokens for each of `ids`, all or nothing.

        The copies of copy-on-write are done when it returns. Use it as a context manager, or
        close it with its commit() or rollback(). See BlockManager.append for the arguments.
        """
        plan = self._open_manager().append(ids, tokens, counts=counts)
        try:
            self.apply(plan)
        except BaseException:
            self.manager.rollback(plan)
            raise
        self._step = Step(self, plan, self._step_closed)
        return self._step

    def _step_closed(self) -> None:
        self._step = None

    def apply(self, plan: StepPlan) -> None:
        """Carry out the copies of a plan, which may be another process's manager's."""
        if plan.num_copies:
            self._pool.copy_blocks(plan.copies)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Scatter the new tokens' keys [T, H, k_dim] and values [T, H, v_dim] into step.slots.

        Other float types than the layer's are converted. Raises InvalidSpec for a wrong shape or
        device, InvalidState if `step` is not this cache's open one.
        """
        self._require(step)
        slots, pools = step.plan.slots, self._pools(layer)
        for i, source in enumerate((k, v)):
            pool = pools[i]
            if source.shape != (len(slots), *pool.shape[2:]) or source.device != pool.device:
                raise InvalidSpec(
                    f"{'kv'[i]} is {list(source.shape)} on {source.device}, expected "
                    f"{[len(slots), *pool.shape[2:]]} on {pool.device}"
                )
            rows = source.detach()
            if rows.dtype != pool.dtype:
                rows = rows.to(pool.dtype)
            if rows.stride(2) != 1 or rows.stride(1) != rows.shape[2]:
                rows = rows.contiguous()
            stride = rows.stride(0) * rows.element_size()
            self._pool.scatter(2 * layer + i, slots, rows.data_ptr(), stride)

    def gather(self, layer: int, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole sequences, [B, H, max(seq_lens), dim], zeros past each length.

        Views of a workspace that the next gather overwrites, whatever its layer.
        """
        plan = step.plan
        return self.gather_blocks(layer, plan.block_tables, 0, plan.seq_lens)

    def gather_blocks(
        self, layer: int, block_tables: Any, first_block: int, num_tokens: Any, part: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `num_tokens[b]` tokens from block `first_block` of row b on.

        Args:
            block_tables: int32 [B, W].
            num_tokens: int32 [B].
            part: which workspace to use, so that two gathers can be read side by side.

        Returns views [B, H, max(num_tokens), dim], zeros past each row's number.
        """
        width = int(num_tokens.max()) if len(num_tokens) else 0
        found = []
        for i, pool in enumerate(self._pools(layer)):
            shape = (len(num_tokens), pool.shape[2], width, pool.shape[3])
            space = self._workspace(2 * part + i, shape, pool.dtype)
            self._pool.gather(
                2 * layer + i,
                block_tables,
                first_block,
                num_tokens,
                pool.shape[2],
                width,
                space.data_ptr(),
            )
            found.append(space)
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
        if backend not in ("auto", "gather"):
            raise InvalidSpec(f'backend is {backend!r}, expected "auto" or "gather"')
        self._pools(layer)
        if window is None:
            window = self.spec.layers[layer].window
        return attention.attend(
            self, layer, q, step, scale=scale, softcap=softcap, window=window, attn_mask=attn_mask
        )

    # ---- tensors ---------------------------------------------------------------------------

    def k(self, layer: int) -> torch.Tensor:
        """The layer's keys, a view [N, P, H, k_dim]; block 0 is padding."""
        return self._pools(layer)[0]

    def v(self, layer: int) -> torch.Tensor:
        """The layer's values, a view [N, P, H, v_dim]."""
        return self._pools(layer)[1]

    def _pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._closed:
            raise InvalidState("this cache is closed")
        if isinstance(layer, bool) or not 0 <= layer < len(self._layers):
            raise InvalidSpec(f"layer is {layer}, expected 0 to {len(self._layers) - 1}")
        return self._layers[layer]

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, the padding block among them."""
        return self.spec.pool_bytes(self.manager.num_device_blocks)

    def _workspace(self, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory to gather into, kept; the layers of a step mostly ask for the same view."""
        memory, view = self._workspaces.get(i, (_NOTHING, _NOTHING))
        if view.shape != shape or view.dtype != dtype:
            num_bytes = math.prod(shape) * dtype.itemsize
            if memory.nbytes < num_bytes:
                memory = torch.empty(num_bytes + num_bytes // 4, dtype=torch.uint8)
            view = memory[:num_bytes].view(dtype).view(shape)
            self._workspaces[i] = memory, view
        return view

    # ---- closing ---------------------------------------------------------------------------

    def _open_manager(self) -> BlockManager:
        if self._closed:
            raise InvalidState("this cache is closed")
        return self.manager

    def _require(self, step: Step) -> None:
        if step is not self._step:
            raise InvalidState("this step is not open here: it was closed, or is another cache's")

    def close(self) -> None:
        """Give the memory back. The cache refuses further commands; a second close is nothing."""
        if self._closed:
            return
        if self._step is not None:
            self._step.rollback()
        self._closed = True
        self._layers = []
        self._workspaces = {}

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidSpec(f"device is {device!r}, expected a torch device") from error
    if found.type != "cpu":
        raise InvalidSpec(f'device is "{found}", expected "cpu": this version has no other device')
    return found


def _allocate(
    spec: KVSpec, num_blocks: int, layout: Layout
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, keys and values as views [num_blocks, block_size, heads, dim] of one tensor."""
    if layout not in ("block_major", "layer_major"):
        raise InvalidSpec(f'layout is {layout!r}, expected "block_major" or "layer_major"')
    try:
        memory = torch.empty(num_blocks * spec.block_bytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        raise InvalidSpec(
            f"the pool of {num_blocks * spec.block_bytes} bytes does not fit in memory"
        ) from error
    layers, offset = [], 0

    def view(layer: LayerSpec, token_bytes: int, dim: int) -> torch.Tensor:
        nonlocal offset
        part = spec.block_size * token_bytes
        if layout == "block_major":
            rows = memory.view(num_blocks, spec.block_bytes)[:, offset : offset + part]
            offset += part
        else:
            rows = memory[offset : offset + num_blocks * part].view(num_blocks, part)
            offset += num_blocks * part
        typed = rows.view(getattr(torch, layer.dtype))
        shape = (spec.block_size, layer.num_kv_heads, dim)
        found: torch.Tensor = typed.unflatten(1, shape)
        return found

    for layer in spec.layers:
        k = view(layer, layer.k_bytes, layer.k_dim)
        layers.append((k, view(layer, layer.v_bytes, layer.v_dim)))
    return layers
