"""Prints the bytes that a process grows by per block of a pool that is full of cached blocks.

python bench/resident.py 1000000

In a process of its own, since one that has freed memory before would use that first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from pagedkv import BlockManager


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fill(size: int) -> BlockManager:
    """A manager of `size` blocks, all cached but for a remainder of less than 128."""
    m = BlockManager(size, max_model_len=4096)
    for i in range(size // 128):
        prompt = np.arange(i * 2048, (i + 1) * 2048, dtype=np.int32)
        id = np.array([m.create(prompt)])
        m.commit(m.append(id, prompt, counts=np.array([2048])))
        m.release(id)
    return m


def main() -> None:
    size = int(sys.argv[1])
    fill(128)  # imports, and what the first use allocates
    before = resident_bytes()
    m = fill(size)
    grown = resident_bytes() - before
    if m.stats().device.num_cached != size // 128 * 128:
        raise SystemExit("the pool is not full of cached blocks")
    print(grown / size)


if __name__ == "__main__":
    main()
