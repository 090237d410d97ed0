"""Turns the JSON of pytest-benchmark into the table of figures, bars, floors and peers.

    pytest bench --full --benchmark-enable --benchmark-json=bench.json
    python bench/report.py bench.json                      # Markdown on the screen
    python bench/report.py bench.json --peers bench/results/peers.json \\
        --out bench/results/control_plane.md --json bench/results/control_plane.json

Each benchmark ran three times: its figure is the least of the three medians, less the two readings
of the clock where the timed region held one call, over the operations in the region.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bars import BARS, SCALES, Bar

Peers = Mapping[str, Mapping[str, float]]  # row -> peer -> figure in the row's unit
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """A measured figure in the unit of its bar. `ok` is None where there is no bar."""

    bar: Bar
    value: float

    @property
    def ok(self) -> bool | None:
        return None if self.bar.bar is None else self.value <= self.bar.bar


def read_rows(record: Mapping[str, Any]) -> dict[str, float]:
    """Row name -> seconds per operation, or the row's own value, from pytest-benchmark's JSON."""
    medians: dict[str, list[float]] = {}
    info: dict[str, dict[str, Any]] = {}
    for benchmark in record["benchmarks"]:
        extra = benchmark["extra_info"]
        medians.setdefault(extra["row"], []).append(benchmark["stats"]["median"])
        info[extra["row"]] = extra
    clock = min(medians["clock"])
    rows = {}
    for row, values in medians.items():
        extra = info[row]
        off = clock if extra["clock"] and row != "clock" else 0.0
        rows[row] = extra["value"] if "value" in extra else (min(values) - off) / extra["per"]
    return rows


def figures(rows: Mapping[str, float]) -> list[Figure]:
    """The figures of all bars whose rows were measured, in the order of bars.py."""
    found = []
    for bar in BARS:
        if bar.row not in rows or (bar.over is not None and bar.over not in rows):
            continue
        value = rows[bar.row] / (rows[bar.over] if bar.over else 1.0)
        found.append(Figure(bar, value * SCALES[bar.unit]))
    return found


def machine(record: Mapping[str, Any]) -> dict[str, Any]:
    """Where and on what the figures were measured."""
    info = record["machine_info"]
    return {
        "cpu": info["cpu"].get("brand_raw", "unknown CPU"),
        "cores": info["cpu"].get("count"),
        "python": info["python_version"],
        "date": record["datetime"][:10],
        "commit": commit(),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit of the sources, with a + if tracked files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    sources = ("csrc", "python", "bench/*.py")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def heading(where: Mapping[str, Any]) -> str:
    return (
        f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, {where['date']}, "
        f"commit {where['commit']}"
    )


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def compare(figure: Figure, peers: Mapping[str, float]) -> str:
    """Peers' figures, each with how many times ours it is."""
    return ", ".join(
        f"{peer} {number(value)} ({number(value / figure.value)}x)" for peer, value in peers.items()
    )


def markdown(found: list[Figure], where: Mapping[str, Any], peers: Peers) -> str:
    lines = [heading(where), ""]
    lines += ["| figure | value | bar | | floor | peers |", "|---|--:|--:|---|---|---|"]
    for figure in found:
        bar = figure.bar
        verdict = {True: "met", False: "**missed**", None: ""}[figure.ok]
        limit = "" if bar.bar is None else f"{bar.bar:g}"
        value = f"{number(figure.value)} {bar.unit}"
        others = compare(figure, peers.get(bar.name, {}))
        lines.append(f"| {bar.name} | {value} | {limit} | {verdict} | {bar.floor} | {others} |")
    return "\n".join(lines) + "\n"


def as_json(found: list[Figure], where: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "figure": f.bar.name,
            "value": float(number(f.value)),
            "unit": f.bar.unit,
            "bar": f.bar.bar,
        }
        for f in found
    ]
    return {"machine": dict(where), "figures": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--peers", type=Path, help="JSON of row -> peer -> figure")
    parser.add_argument("--out", type=Path, help="write the Markdown here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    record = json.loads(options.measured.read_text())
    peers = json.loads(options.peers.read_text())["rows"] if options.peers else {}
    found, where = figures(read_rows(record)), machine(record)
    text = markdown(found, where, peers)
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(as_json(found, where), indent=1) + "\n")


if __name__ == "__main__":
    main()
