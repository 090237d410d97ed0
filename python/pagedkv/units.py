"""Sizes as people write them: "40GiB" is 40 * 2**30 bytes, "40GB" is 40 * 10**9."""

from __future__ import annotations

import re

from pagedkv.errors import InvalidSpec

GiB = 2**30

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")},
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")},
}
_IN_SMALL = {unit.lower(): unit for unit in _UNITS}  # but not "Gb", which may mean bits
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Bytes in `size`: an int, or a number with KB, MB, GB, TB (powers of 1000) or KiB .. TiB.

    Raises:
        InvalidSpec: not a size; the message names the argument `name`.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise InvalidSpec(f"{name} is {size}, expected a number of bytes of 0 or more")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = match[2] if match else ""
    unit = _IN_SMALL.get(unit, unit[:1].upper() + unit[1:])
    if match is None or unit not in _UNITS:
        raise InvalidSpec(f'{name} is {size!r}, expected bytes, or a size such as "2GiB" or "40GB"')
    return int(float(match[1]) * _UNITS[unit])


def format_bytes(size: float) -> str:
    """`size` bytes in the largest binary unit that leaves at least 1, for example "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
