"""Where a cache's tensors are, what copies its blocks, and what its steps run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedkv._core import Device, HostDevice, HostPool, Pool, SimulatedDevice, SimulatedPool
from pagedkv.errors import InvalidSpec

if TYPE_CHECKING:
    from pagedkv.layout import DevicePool

__all__ = ["Machine", "machine_for"]


class Machine:
    """This process: tensors are in host memory, steps run as they are called.

    Attributes:
        device: of the tensors.
        needs_order: whether steps need the transfer engine even without a host tier, since work is
            queued on streams, which may change.
    """

    device = torch.device("cpu")
    needs_order = False

    def transfer_device(self) -> Device:
        """What copies between the tiers."""
        return HostDevice()

    def make_pool(self, memory: DevicePool, num_blocks: int, block_size: int) -> Pool:
        """What carries out the copies of steps."""
        return HostPool(memory.regions, num_blocks, block_size)


class SimulatedMachine(Machine):
    """A machine for tests, whose steps are queued on its compute streams."""

    needs_order = True

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def transfer_device(self) -> Device:
        return self._device

    def make_pool(self, memory: DevicePool, num_blocks: int, block_size: int) -> Pool:
        return SimulatedPool(self._device, memory.regions, num_blocks, block_size, owner=memory)


class CustomMachine(Machine):
    """Host memory, and a device that the caller has made."""

    needs_order = True

    def __init__(self, device: Device) -> None:
        self._device = device

    def transfer_device(self) -> Device:
        return self._device


def machine_for(device: str | torch.device | Device) -> Machine:
    """The machine that a `device` argument means. Raises InvalidSpec if there is none."""
    if not isinstance(device, (str, torch.device)):
        if isinstance(device, SimulatedDevice):
            return SimulatedMachine(device)
        if isinstance(device, Device):
            return CustomMachine(device)
        raise InvalidSpec(f"device is {device!r}, expected a torch device")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidSpec(f"device is {device!r}, expected a torch device") from error
    if found.type != "cpu":
        raise InvalidSpec(f'device is "{found}", expected "cpu": this version has no other device')
    return Machine()
