"""Stands in for modules that a peer imports on its way and does not use where it is measured.

A peer's block manager sits deep in a package that also serves HTTP and launches kernels. Installing
all of that would take gigabytes and a GPU; so each driver names what it leaves out. The classes in
their place can be named, called and subclassed, and do nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Nothing:
    """Whatever a module that was left out would have defined."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (Nothing,), {})
        setattr(self, name, found)
        return found


class LeftOut(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == out or name.startswith(out + ".") for out in self.names):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def leave_out(*names: str) -> None:
    """Import nothing of these modules, nor of those in them."""
    sys.meta_path.insert(0, LeftOut(names))


def bare_package(name: str, folder: str) -> None:
    """The package `name` from `folder`, without what its own __init__ would import."""
    package = Empty(name)
    package.__path__ = [folder]
    sys.modules[name] = package
