"""The errors of pagedkv.

After any of them but `TransferError`, which costs sequences their blocks, and `BrokenInvariant` the
manager is exactly as it was before the call.
"""

from __future__ import annotations

__all__ = [
    "BrokenInvariant",
    "ConcurrentUse",
    "DeviceError",
    "InvalidSpec",
    "InvalidState",
    "KVError",
    "NotResident",
    "OutOfBlocks",
    "TransferError",
    "UnknownSequence",
]


class KVError(Exception):
    """Base class of every error that pagedkv raises itself."""


class OutOfBlocks(KVError):
    """A tier cannot supply the blocks that an append needs.

    Attributes:
        tier: "device" or "host".
        needed: blocks that the call would have taken.
        available: free and evictable blocks in that tier.
    """

    def __init__(self, tier: str, needed: int, available: int) -> None:
        super().__init__(tier, needed, available)
        self.tier = tier
        self.needed = needed
        self.available = available

    def __str__(self) -> str:
        return (
            f"the {self.tier} tier has {self.available} blocks available and this needs "
            f"{self.needed}: release or preempt sequences, or build a larger pool"
        )


class UnknownSequence(KVError, KeyError):
    """An id that names no live sequence: never issued, or released since."""

    __str__ = Exception.__str__


class NotResident(KVError):
    """The sequence is not in the device tier.

    Attributes:
        transfer: the transfer that will bring it there, or None when none is under way.
    """

    def __init__(self, message: str, transfer: int | None = None) -> None:
        super().__init__(message, transfer)
        self.message = message
        self.transfer = transfer

    def __str__(self) -> str:
        return self.message


class InvalidSpec(KVError, ValueError):
    """An argument is out of range, or of the wrong type, shape, device or layout."""


class InvalidState(KVError, RuntimeError):
    """The call is right but not now: a step is open, a plan is stale, the cache is closed."""


class ConcurrentUse(KVError, RuntimeError):
    """Two threads, or a callback, entered one manager at the same time."""


class TransferError(KVError):
    """A copy between tiers failed; its source is intact and its target is not published."""


class DeviceError(KVError, RuntimeError):
    """The device, its driver or its runtime refused a call."""


class BrokenInvariant(KVError, RuntimeError):
    """A defect of pagedkv itself. The manager refuses further use; please report it."""
