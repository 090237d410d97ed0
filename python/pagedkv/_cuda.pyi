"""The CUDA part. Only in builds that had nvcc; imports, and answers, without a driver.

Versions are as CUDA counts them: 1000 * major + 10 * minor.
"""

from typing import TypedDict

from pagedkv._core import CudaRuntime

class _Device(TypedDict):
    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int

def runtime_version() -> int:
    """The CUDA runtime in this module."""

def driver_version() -> int:
    """The newest CUDA that the driver serves, 0 without a driver."""

def status() -> str:
    """Why there are no devices, in CUDA's words; "ok" where nothing failed."""

def devices() -> list[_Device]:
    """The devices that the driver shows to this process; empty unless status() is "ok"."""

def runtime() -> CudaRuntime:
    """The calls of CUDA, for pagedkv._core.CudaDevice."""
