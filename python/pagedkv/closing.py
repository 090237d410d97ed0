"""Caches that are still open when the interpreter exits, or when nobody has them any more."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pagedkv.errors import KVError

if TYPE_CHECKING:
    from pagedkv.cache import KVCache

__all__ = ["KEPT", "OPEN", "close_kept"]

OPEN: weakref.WeakSet[KVCache] = weakref.WeakSet()
KEPT: list[KVCache] = []  # that nobody has any more, and that could not be closed then


def close_kept() -> None:
    """Close those of them that can be closed by now."""
    _close(KEPT)
    KEPT[:] = [cache for cache in KEPT if not cache._closed]


@atexit.register
def _close_all() -> None:
    _close(OPEN)
    _close(KEPT)


def _close(caches: Iterable[KVCache]) -> None:
    for cache in list(caches):
        with contextlib.suppress(KVError):  # in use: by the device, or a thread that ends with us
            cache.close()
