"""Requests, and the files that they are read from."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.errors import InvalidSpec

__all__ = ["Request", "Trace", "read_trace"]

MAX_LENGTH = 2**31 - 1
MAX_SECONDS = 1e12

# The names that public traces, and people, give to these fields; compared without case.
INPUT = ("input_length", "contexttokens", "request tokens", "prompt_tokens", "input")
OUTPUT = ("output_length", "generatedtokens", "response tokens", "completion_tokens", "output")
ARRIVAL = ("arrival", "arrival_time", "time", "seconds")
TIMESTAMP = "timestamp"  # milliseconds in JSONL, seconds or a date in CSV

_DATE = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    Attributes:
        arrival: seconds after the trace began.
        input_length: tokens of the prompt, 1 or more.
        output_length: tokens that are generated, 0 or more.
        hash_ids: what the prompt says, one number for each hash block of it: prompts that begin
            with the same numbers begin with the same tokens. None if the trace does not tell.
    """

    arrival: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.input_length <= MAX_LENGTH:
            raise InvalidSpec(f"input_length is {self.input_length}, expected 1 or more")
        if not 0 <= self.output_length <= MAX_LENGTH:
            raise InvalidSpec(f"output_length is {self.output_length}, expected 0 or more")
        if not abs(self.arrival) <= MAX_SECONDS:
            raise InvalidSpec(f"arrival is {self.arrival}, expected seconds")

    @property
    def num_tokens(self) -> int:
        return self.input_length + self.output_length


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        name: the file, or the synthetic load.
        hash_block_size: tokens of the prompt that one of `hash_ids` stands for.
        max_model_len: most tokens of a sequence, prompt and output, if the source says so.
        num_skipped: broken lines that were left out.
    """

    name: str
    requests: tuple[Request, ...]
    hash_block_size: int = 512
    max_model_len: int | None = None
    num_skipped: int = 0

    def __post_init__(self) -> None:
        times = [request.arrival for request in self.requests]
        if times != sorted(times):
            raise InvalidSpec(f"requests of {self.name} are not in the order of their arrival")
        for request in self.requests:
            _check_hash_ids(request.hash_ids, request.input_length, self.hash_block_size)

    @property
    def has_hash_ids(self) -> bool:
        return any(request.hash_ids is not None for request in self.requests)

    def at_rate(self, rate: float, seed: int) -> Trace:
        """The same requests in the same order, arriving at random at `rate` per second (a Poisson
        process); at `math.inf` all at once."""
        if not rate > 0:
            raise InvalidSpec(f"rate is {rate}, expected requests per second above 0")
        gaps = np.random.default_rng(seed).exponential(1.0 / rate, len(self.requests))
        times = np.zeros(len(gaps)) if math.isinf(rate) else np.cumsum(gaps)
        moved = (
            replace(request, arrival=float(t))
            for request, t in zip(self.requests, times, strict=True)
        )
        return replace(self, requests=tuple(moved))

    def first(self, num_requests: int | None) -> Trace:
        """Only so many of the requests; all if it is None."""
        return replace(self, requests=self.requests[:num_requests])


def read_trace(path: str | Path, *, skip_broken: bool = False, hash_block_size: int = 512) -> Trace:
    """Read a trace: JSONL or CSV, plain or gzip; told apart by their content.

    Fields are found by name, see docs/simulator.md: Mooncake's JSONL with hash_ids, Azure's and
    BurstGPT's CSV, or any file with input_length, output_length and, if it has times, arrival in
    seconds. Without times all requests arrive at once.

    Raises:
        InvalidSpec: no such file, not text, no requests; or a broken line, by its number, unless
            `skip_broken`, which leaves such lines out and counts them.
    """
    path = Path(path)
    if hash_block_size < 1:
        raise InvalidSpec(f"hash_block_size is {hash_block_size}, expected 1 or more")
    requests: list[Request] = []
    num_skipped = 0
    for line, row in _rows(path):
        try:
            requests.append(_request(row, hash_block_size))
        except ValueError as error:
            if not skip_broken:
                raise InvalidSpec(
                    f"{path}, line {line}: {error} (--skip-broken leaves such lines out)"
                ) from None
            num_skipped += 1
    if not requests:
        raise InvalidSpec(f"{path} has no request in it ({num_skipped} broken lines)")
    start = min(request.arrival for request in requests)
    requests.sort(key=lambda request: request.arrival)
    requests = [replace(request, arrival=request.arrival - start) for request in requests]
    return Trace(path.name, tuple(requests), hash_block_size, num_skipped=num_skipped)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, its fields by name in lower case, or ValueError's text) of every line."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise InvalidSpec(f"trace {path}: {getattr(error, 'strerror', error)}") from None
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        lines = data.decode("utf-8-sig").splitlines()
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError):
        raise InvalidSpec(f"trace {path} is neither text in UTF-8 nor gzip of it") from None
    first = next((line for line in lines if line.strip()), "")
    return _json_rows(lines) if first.lstrip()[:1] in "{[" else _csv_rows(lines, path)


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                row = {str(name).lower(): value for name, value in row.items()}
                if TIMESTAMP in row:
                    row.setdefault("milliseconds", row.pop(TIMESTAMP))
            yield number, row


def _csv_rows(lines: list[str], path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(lines)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if not set(header) & set(INPUT) or not set(header) & set(OUTPUT):
            raise InvalidSpec(
                f"{path}, line 1: expected JSON, or a CSV header with a column of {INPUT[0]} and "
                f"one of {OUTPUT[0]}, found {', '.join(header)[:200] or 'nothing'}"
            )
        for cells in reader:
            if cells:
                same = len(cells) == len(header)
                yield reader.line_num, dict(zip(header, cells, strict=True)) if same else None
    except csv.Error as error:
        raise InvalidSpec(f"{path}, line {reader.line_num}: {error}") from None


def _request(row: Any, hash_block_size: int) -> Request:
    """Raises ValueError that says what is wrong with the line."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object, or as many cells as the header has")
    input_length = _length(row, INPUT, least=1)
    output_length = _length(row, OUTPUT, least=0)
    hash_ids = row.get("hash_ids")
    if hash_ids is not None:
        if not isinstance(hash_ids, list) or not all(type(h) is int for h in hash_ids):
            raise ValueError("hash_ids is not a list of integers")
        hash_ids = tuple(hash_ids)
        _check_hash_ids(hash_ids, input_length, hash_block_size)
    return Request(_arrival(row), input_length, output_length, hash_ids)


def _check_hash_ids(hash_ids: tuple[int, ...] | None, length: int, block_size: int) -> None:
    if hash_ids is not None and len(hash_ids) != -(-length // block_size):
        raise InvalidSpec(
            f"{len(hash_ids)} hash_ids for {length} tokens, expected one for every {block_size}"
        )


def _length(row: dict[str, Any], names: tuple[str, ...], least: int) -> int:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise ValueError(f"no {names[0]}")
    value = row[name]
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,10}\s*", value):
        value = int(value)
    if type(value) is not int or not least <= value <= MAX_LENGTH:
        raise ValueError(f"{name} is {value!r}, expected an integer of {least} or more")
    return value


def _arrival(row: dict[str, Any]) -> float:
    """Seconds; 0 in a trace without times."""
    for name, unit in (("milliseconds", 1e-3), (TIMESTAMP, 1.0), *((n, 1.0) for n in ARRIVAL)):
        if name in row:
            seconds = _seconds(row[name]) * unit
            if not abs(seconds) <= MAX_SECONDS:
                raise ValueError(f"the time is {row[name]!r}, expected a number or a date")
            return seconds
    return 0.0


def _seconds(value: Any) -> float:
    """Of a number, or of a date such as 2023-11-16 18:15:46.6805900; NaN if it is neither."""
    if isinstance(value, str):
        date = _DATE.fullmatch(value.strip())
        try:
            if date is None:
                return float(value)
            zone = "+00:00" if date[4] in (None, "Z") else date[4]
            whole = datetime.fromisoformat(f"{date[1]} {date[2]}{zone}").timestamp()
        except ValueError:
            return math.nan
        return whole + float(date[3] or 0)
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan
