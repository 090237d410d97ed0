"""Where a cache's tensors are, what copies its blocks, and what its steps run on."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pagedkv._core import (
    BlockManager,
    CudaDevice,
    CudaPool,
    Device,
    HostDevice,
    HostPool,
    Pool,
    SimulatedDevice,
    SimulatedPool,
    StepPlan,
)
from pagedkv.config import check_int
from pagedkv.errors import DeviceError, InvalidSpec
from pagedkv.fp8 import is_fp8
from pagedkv.rows import as_stored, rows, rows_at
from pagedkv.units import format_bytes

if TYPE_CHECKING:
    from pagedkv.layout import DevicePool
    from pagedkv.spec import KVSpec

__all__ = ["Machine", "host_tensor", "machine_for"]

_TO_FP8 = (torch.bfloat16, torch.float16, torch.float32)  # what the kernel converts

# Of a GPU's free memory, left for what copies and kernels need besides the pool.
RESERVED_BYTES = 96 << 20

# Steps of more new tokens than that have their slots, positions and ids uploaded with each use.
MAX_STEP_TOKENS = 8192


class Machine:
    """This process: tensors are in host memory, steps run as they are called.

    Attributes:
        device: of the tensors.
        needs_order: whether work is queued on streams, of which each has to continue the one
            before: so steps need the transfer engine even without a host tier.
        holds: whether hold() does anything.
    """

    device = torch.device("cpu")
    needs_order = False
    holds = False
    _pool: Pool
    _table_stride: int  # cells of the widest block table there can be

    def __init__(self) -> None:
        self._padded: dict[tuple[str, int], tuple[torch.Tensor, tuple[slice, ...]]] = {}

    def transfer_device(self, has_host_tier: bool) -> Device:
        """What copies between the tiers."""
        return HostDevice()

    def make_pool(self, memory: DevicePool, manager: BlockManager) -> Pool:
        """What carries out the copies of steps, and write()."""
        self._table_stride = -(-manager.max_model_len // manager.block_size)
        self._pool = self._new_pool(memory, manager)
        return self._pool

    def _new_pool(self, memory: DevicePool, manager: BlockManager) -> Pool:
        size = manager.num_device_blocks + 1, manager.block_size
        return HostPool(memory.regions, *size, owner=memory)

    def follow(self) -> None:
        """Queue on the stream that the caller is on now. To be called before anything is queued."""

    def is_capturing(self) -> bool:
        """Whether the caller's stream is being captured into a graph: nothing runs on it now."""
        return False

    def write(
        self,
        layer: int,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dtype: torch.dtype,
        scales: tuple[float, float],
    ) -> None:
        """Scatter a layer's new keys and values into the pool, where they are `dtype`."""
        k, v = (rows(as_stored(t, dtype, s)) for t, s in zip((k, v), scales, strict=True))
        self._pool.write(layer, slots.data_ptr(), len(slots), *rows_at(k), *rows_at(v))
        self.hold(slots, k, v)

    def hold(self, *tensors: torch.Tensor) -> None:
        """Keep tensors alive until queued work has read them, where nothing else does so."""

    def land(self) -> None:
        """Wait for queued work, where the caller's next work would not come after it by itself."""

    def warn(self) -> None:
        """Warn, once, of anything that makes copies slower than they could be."""

    def step_tensor(self, plan: StepPlan, name: str) -> torch.Tensor:
        """An array of the open step's plan, on `device`. To be read only: it may be the plan's."""
        return host_tensor(getattr(plan, name))

    def padded_tensor(self, plan: StepPlan, name: str, num_rows: int) -> torch.Tensor:
        """An array of the open step's plan, one token each, with rows of zeros up to `num_rows`.

        At the same address for all steps. Block tables are as wide as they can get.
        """
        host = getattr(plan, name)
        shape = (num_rows, self._table_stride) if name == "block_tables" else (num_rows,)
        dtype = torch.int32 if name in ("block_tables", "seq_lens") else torch.int64
        key, nothing = (name, num_rows), (slice(0),)
        if key not in self._padded:
            with torch.inference_mode(False):  # which the next step may be without
                self._padded[key] = torch.zeros(shape, dtype=dtype, device="cpu"), nothing
        found, filled = self._padded[key]
        found[filled] = 0  # alone: tables are mostly padding
        filled = nothing if host is None else tuple(slice(n) for n in host.shape)
        if host is not None:
            found[filled] = host_tensor(host)
        self._padded[key] = found, filled
        return found

    def share_of_memory(
        self, fraction: float, spec: KVSpec, max_batch: int, max_model_len: int | None
    ) -> int:
        """Bytes: this fraction of the device memory that is free beside the arrays of steps.

        Raises InvalidSpec if it is no fraction, if those leave no room for a block, or on a machine
        that cannot say how much is free.
        """
        raise InvalidSpec(
            "device_memory is a fraction, which is of a GPU's free memory: expected bytes or a size"
        )


class SimulatedMachine(Machine):
    """A machine for tests, whose steps are queued on its compute streams."""

    needs_order = True

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def transfer_device(self, has_host_tier: bool) -> Device:
        return self._device

    def _new_pool(self, memory: DevicePool, manager: BlockManager) -> Pool:
        size = manager.num_device_blocks + 1, manager.block_size
        return SimulatedPool(self._device, memory.regions, *size, owner=memory)


class CudaMachine(Machine):
    """A GPU: steps are launched on torch's current stream, and nobody waits for them."""

    needs_order = True
    _pool: CudaPool

    def __init__(self, gpu: CudaDevice, device: torch.device, measures: bool = False) -> None:
        super().__init__()
        self.device = device
        self._measures = measures  # how to copy, if there is a tier to copy to
        self._gpu = gpu
        self._warned = False

    def transfer_device(self, has_host_tier: bool) -> Device:
        if has_host_tier and self._measures:
            self._gpu.calibrate()
        return self._gpu

    def _new_pool(self, memory: DevicePool, manager: BlockManager) -> CudaPool:
        self.follow()
        shape = _step_shape(manager.max_batch, self._table_stride)
        num_bytes = CudaPool.step_bytes(*shape)
        try:
            self._step_memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        except (RuntimeError, MemoryError) as error:
            raise InvalidSpec(
                f"the arrays of steps, {format_bytes(num_bytes)} for max_batch and max_model_len, "
                f"do not fit in the memory of {self.device} beside the pool"
            ) from error
        return CudaPool(
            self._gpu,
            memory.regions,
            manager.num_device_blocks + 1,
            manager.block_size,
            *shape,
            self._step_memory.data_ptr(),
            owner=(memory, self._step_memory),
        )

    def follow(self) -> None:
        # torch.cuda.current_stream() makes an object, and takes ten times as long.
        self._gpu.use_stream(torch._C._cuda_getCurrentRawStream(self._gpu.index))

    def is_capturing(self) -> bool:
        return self._gpu.is_capturing(torch._C._cuda_getCurrentRawStream(self._gpu.index))

    def write(
        self,
        layer: int,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dtype: torch.dtype,
        scales: tuple[float, float],
    ) -> None:
        if not is_fp8(dtype) or k.dtype != v.dtype or k.dtype not in _TO_FP8:
            return super().write(layer, slots, k, v, dtype, scales)
        k, v = rows(k), rows(v)
        types = str(k.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
        at = (*rows_at(k), scales[0]), (*rows_at(v), scales[1])
        self._pool.write_fp8(layer, slots.data_ptr(), len(slots), *types, *at)
        return self.hold(slots, k, v)

    def warn(self) -> None:
        num_bytes = self._gpu.num_pageable_bytes
        if num_bytes and not self._warned:
            self._warned = True
            warnings.warn(
                f"{format_bytes(num_bytes)} of the host tier could not be pinned: copies of it are "
                "slower, and block the caller. Raise the limit of locked memory (ulimit -l)",
                RuntimeWarning,
                stacklevel=5,
            )

    def step_tensor(self, plan: StepPlan, name: str) -> torch.Tensor:
        host = getattr(plan, name)
        address = self._pool.address(name)
        if address is None:
            return self._upload(host)
        offset = address - self._step_memory.data_ptr()
        memory = self._step_memory[offset:]
        dtype = host_tensor(host).dtype
        stride = (self._table_stride, 1) if host.ndim == 2 else (1,)
        span = sum((n - 1) * s for n, s in zip(host.shape, stride, strict=True)) + 1
        if host.size == 0:
            return torch.empty(host.shape, dtype=dtype, device=self.device)
        return memory[: span * dtype.itemsize].view(dtype).as_strided(host.shape, stride)

    def padded_tensor(self, plan: StepPlan, name: str, num_rows: int) -> torch.Tensor:
        address = self._pool.address(name)
        assert address is not None, "there is room for a token of each sequence"
        memory = self._step_memory[address - self._step_memory.data_ptr() :]
        if name == "block_tables":
            cells = memory[: 4 * num_rows * self._table_stride].view(torch.int32)
            return cells.view(num_rows, self._table_stride)
        dtype = torch.int32 if name == "seq_lens" else torch.int64
        return memory[: num_rows * dtype.itemsize].view(dtype)

    def _upload(self, host: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = host_tensor(host)
        if self.device.type == "cuda":  # from pinned memory, since other copies wait for the stream
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def share_of_memory(
        self, fraction: float, spec: KVSpec, max_batch: int, max_model_len: int | None
    ) -> int:
        if not 0 < fraction <= 1:
            raise InvalidSpec(
                f"device_memory is {fraction}, expected bytes, or a fraction up to 1.0"
            )
        free = torch.cuda.mem_get_info(self.device)[0] - RESERVED_BYTES
        check_int("max_batch", max_batch, 1, 2**31 - 1)
        if max_model_len is not None:
            check_int("max_model_len", max_model_len, 1, 2**31 - 1)

        def is_too_much(num_blocks: int) -> bool:
            longest = max_model_len or num_blocks * spec.block_size
            stride = -(-longest // spec.block_size)
            steps = CudaPool.step_bytes(*_step_shape(max_batch, stride))
            # Twice: where kernels read them, and on their way up.
            return spec.pool_bytes(num_blocks) + 2 * steps > free

        sizes = range(1, spec.num_blocks(free) + 1)
        num_blocks = bisect_left(sizes, True, key=is_too_much)
        if not num_blocks:
            raise InvalidSpec(
                f"{format_bytes(max(free, 0))} of {self.device} are free, and the arrays of steps, "
                "for max_batch and max_model_len, leave no room for a block beside them"
            )
        return int(fraction * spec.pool_bytes(num_blocks))


class SimulatedCudaMachine(CudaMachine):
    """CUDA's whole path on a machine without a GPU.

    The caller's own work runs at once. So queued work has to end before the caller reads its
    results, and the tensors that the caller gives are kept until queued work has read them.
    """

    holds = True

    def __init__(self, gpu: CudaDevice) -> None:
        super().__init__(gpu, torch.device("cpu"))
        self._held: list[torch.Tensor] = []

    def follow(self) -> None:
        """Nothing: the caller says gpu.use_stream() himself."""

    def is_capturing(self) -> bool:
        return self._gpu.is_capturing()

    def hold(self, *tensors: torch.Tensor) -> None:
        self._held += tensors

    def land(self) -> None:
        self._pool.synchronize()
        self._held.clear()

    def step_tensor(self, plan: StepPlan, name: str) -> torch.Tensor:
        self.land()
        return super().step_tensor(plan, name)

    def padded_tensor(self, plan: StepPlan, name: str, num_rows: int) -> torch.Tensor:
        self.land()
        return super().padded_tensor(plan, name, num_rows)


def host_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array of a StepPlan, where it is. A manager's are read-only views of what torch takes."""
    return torch.from_numpy(array if array.flags.writeable else array.base)


def _step_shape(max_batch: int, table_stride: int) -> tuple[int, int, int]:
    """Sequences, tokens, and blocks of a sequence that the arrays of steps have room for."""
    return max_batch, max(MAX_STEP_TOKENS, max_batch), table_stride


def machine_for(device: str | torch.device | Device, copy_method: str = "auto") -> Machine:
    """The machine that a `device` argument means.

    Raises InvalidSpec if there is no such kind of device, DeviceError if there is none here.
    """
    if copy_method != "auto" and not str(device).startswith("cuda"):
        raise InvalidSpec(
            f'copy_method is {copy_method!r}, which is for a device "cuda:0": expected "auto"'
        )
    if not isinstance(device, (str, torch.device)):
        if isinstance(device, SimulatedDevice):
            return SimulatedMachine(device)
        if isinstance(device, CudaDevice):
            if device.is_simulated:
                return SimulatedCudaMachine(device)
            return CudaMachine(device, torch.device("cuda", device.index))
        raise InvalidSpec(
            f"device is {device!r}, expected a torch device, a SimulatedDevice, or a CudaDevice, "
            "which can be one on a SimulatedCuda"
        )
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidSpec(f"device is {device!r}, expected a torch device") from error
    if found.type == "cpu":
        return Machine()
    if found.type == "cuda":
        return _cuda_machine(found, copy_method)
    raise InvalidSpec(f'device is "{found}", expected "cpu" or a CUDA device')


def _cuda_machine(device: torch.device, copy_method: str) -> Machine:
    try:
        cuda: Any = import_module("pagedkv._cuda")
    except ImportError as error:
        raise DeviceError(
            "this build has no CUDA part: install a wheel that has, or build where nvcc is "
            "(`pagedkv info` tells)"
        ) from error
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch finds no CUDA device: {cuda.status()}. Install a driver, and a torch with CUDA"
        )
    torch.cuda.empty_cache()  # memory that torch keeps and does not use is free for others, too
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu = CudaDevice(cuda.runtime(), index, copy_method=copy_method)
    return CudaMachine(gpu, torch.device("cuda", index), measures=copy_method == "auto")
