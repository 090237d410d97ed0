"""What this installation is: versions, compiler, CUDA. For `pagedkv info` and for bug reports.

Looks packages up without importing them, so that it answers at once and where one is broken.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pagedkv import _core

__all__ = ["CudaInfo", "Info", "collect"]

PACKAGES = ("numpy", "torch", "transformers")


@dataclass(frozen=True)
class CudaInfo:
    """The `_cuda` module and what it sees.

    Attributes:
        built: whether this installation has the module; without it nothing below is known.
        runtime: CUDA version that the module was built with, such as "13.0".
        driver: newest CUDA version that the driver serves, or None without a driver.
        status: "ok", or why there are no devices, in CUDA's words.
        devices: per device its index, name, compute_capability (major, minor) and total_bytes.
    """

    built: bool
    runtime: str | None = None
    driver: str | None = None
    status: str = "the _cuda module is not built"
    devices: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Info:
    """Versions as strings; None for a package that is not installed."""

    pagedkv: str
    compiler: str
    platform: str
    python: str
    packages: dict[str, str | None]
    cuda: CudaInfo

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect() -> Info:
    """Look everything up. Imports neither numpy nor torch."""
    return Info(
        pagedkv=_core.__version__,
        compiler=_compiler(_core.__compiler__),
        platform=platform.platform(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        cuda=_cuda(),
    )


def _compiler(name: str) -> str:
    """A compiler says its name and version; gcc says its version only."""
    return f"gcc {name}" if name[:1].isdigit() else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> CudaInfo:
    try:
        cuda: Any = import_module("pagedkv._cuda")
    except ModuleNotFoundError:
        return CudaInfo(built=False)
    return CudaInfo(
        built=True,
        runtime=_cuda_version(cuda.runtime_version()),
        driver=_cuda_version(cuda.driver_version()),
        status=cuda.status(),
        devices=tuple(cuda.devices()),
    )


def _cuda_version(number: int) -> str | None:
    """CUDA counts its versions 1000 * major + 10 * minor; 0 is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
