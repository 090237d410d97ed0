"""pagedkv and its peers, side by side in one run.

    python bench/compare.py                       # minutes; writes bench/results/compare.*
    python bench/compare.py --quick --out build   # small sizes, one round, no model
    python bench/compare.py --only "vLLM 0.6.2" --work decode beam --out build

Every peer comes from PyPI, at a pinned version, into a folder of its own under build/peers, without
the packages that it depends on but does not need here; torch and the like are those of the
environment that runs this. Every figure is measured in a process of its own. In each round all
systems take turns at each piece of work; a figure is the median over rounds, and a ratio that of
the ratios within a round. What cannot be installed, fails or is not offered has a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from compare_report import draw, markdown
from report import ROOT, commit, cpu_name
from workloads import WORKLOADS

BENCH = Path(__file__).resolve().parent
OURS = "pagedkv"
SCALES = {"s": 1.0, "us": 1e6, "ns": 1e9, "B": 1.0}
SMALL = ("msgspec==0.22.0", "pyzmq==27.3.0", "cloudpickle==3.1.3", "cachetools==8.0.2")
TRANSFORMERS = ("transformers==5.23.0",)


@dataclass(frozen=True)
class System:
    """One side of the comparison: a driver in peers/, and the packages that it runs on."""

    name: str
    driver: str
    packages: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    is_floor: bool = False

    @property
    def folder(self) -> Path:
        """Where its packages are; systems with the same ones share it."""
        return ROOT / "build" / "peers" / self.packages[0].replace("==", "-")


MANAGERS = (
    System(OURS, "drive_pagedkv.py"),
    System(
        "vLLM 0.33.0",
        "drive_vllm_v1.py",
        ("vllm==0.33.0", *SMALL, "cbor2==6.3.0", "pybase64==1.5.1"),
    ),
    System("vLLM 0.6.2", "drive_vllm_v0.py", ("vllm==0.6.2", *SMALL)),
    System(
        "SGLang 0.5.23",
        "drive_sglang.py",
        ("sglang==0.5.23", *SMALL, "orjson==3.13.0", "pybase64==1.5.1"),
    ),
    System("memcpy, or a list", "drive_floor.py", is_floor=True),
)
CACHES = (
    System(OURS, "drive_transformers.py", TRANSFORMERS, ("--cache", "paged")),
    System("transformers, dense", "drive_transformers.py", TRANSFORMERS, ("--cache", "dense")),
    System(
        "transformers, continuous", "drive_transformers.py", TRANSFORMERS, ("--cache", "continuous")
    ),
)
END_TO_END = {
    "greedy": ("generate, greedy", "256 + 16 tokens of SmolLM2-135M"),
    "greedy_1k": ("generate, greedy 1k", "1024 + 32 tokens of SmolLM2-135M"),
    "beams": ("generate, 8 beams", "256 + 16 tokens of SmolLM2-135M"),
}


class NotInstalled(Exception):
    """What pip said."""


def install(system: System, index: str | None = None) -> None:
    """Put the system's packages into its folder, if they are not there yet."""
    if not system.packages:
        return
    folder, wanted = system.folder, "\n".join(system.packages)
    complete = folder / "packages.txt"
    if complete.is_file() and complete.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary", ":all:", "--target", str(folder)]
    command += ["--index-url", index] if index else []
    run = subprocess.run([*command, *system.packages], capture_output=True, text=True)
    if run.returncode:
        raise NotInstalled(last_line(run.stderr))
    complete.write_text(wanted)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def measure(system: System, workload: str, size: str, timeout: float = 900) -> dict[str, Any]:
    """What the driver printed, or {"failed": why}."""
    command = [sys.executable, str(BENCH / "peers" / system.driver), workload, "--size", size]
    paths = [str(system.folder)] if system.packages else []
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        run = subprocess.run(
            [*command, *system.arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {timeout:.0f} s"}
    if run.returncode:
        return {"failed": last_line(run.stderr)}
    try:
        found: dict[str, Any] = json.loads(run.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        return {"failed": f"printed {last_line(run.stdout)!r}"}
    return found


def summary(
    systems: Iterable[System], rounds: Sequence[Mapping[str, Mapping[str, Any]]], scale: float
) -> list[dict[str, Any]]:
    """Per system its figure and how many times ours it is, or why there is none.

    `rounds[r][name]` is what measure() gave in round r.
    """
    found = []
    for system in systems:
        entry: dict[str, Any] = {"system": system.name, "floor": system.is_floor}
        results = [r[system.name] for r in rounds]
        without = next((r for r in results if "values" not in r), None)
        if without is None:
            entry["value"] = scale * statistics.median(median(r) for r in results)
            pairs = [(r[system.name], r[OURS]) for r in rounds if "values" in r[OURS]]
            if pairs:
                entry["ratio"] = statistics.median(median(r) / median(o) for r, o in pairs)
                entry["same_tokens"] = all(r.get("tokens") == o.get("tokens") for r, o in pairs)
        elif "cannot" in without:
            entry["why"] = f"cannot: {without['cannot']}"
        else:
            entry["why"] = f"not run: {without['failed']}"
        found.append(entry)
    return found


def median(result: Mapping[str, Any]) -> float:
    return max(statistics.median(result["values"]), 1e-12)


def take_turns(
    systems: Sequence[System], workload: str, options: argparse.Namespace, absent: dict[str, str]
) -> list[dict[str, dict[str, Any]]]:
    """All rounds of one workload; a system that gave no figure is not asked again."""
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(options.rounds):
        results: dict[str, dict[str, Any]] = {}
        for system in systems:
            if system.name in absent:
                results[system.name] = {"failed": absent[system.name]}
            elif rounds and "values" not in rounds[0][system.name]:
                results[system.name] = rounds[0][system.name]
            else:
                results[system.name] = measure(system, workload, options.size)
        rounds.append(results)
    return rounds


def installed(systems: Iterable[System], index: str | None = None) -> dict[str, str]:
    """Install what is missing; of what could not be, the name and why."""
    absent = {}
    for system in systems:
        try:
            install(system, index)
        except NotInstalled as error:
            absent[system.name] = f"{', '.join(system.packages)}: {error}"
    return absent


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run everything; the record that table and plot are made from, after each row."""
    chosen = set(options.only)
    caches = [] if options.quick else with_model(options.model)
    managers = [s for s in MANAGERS if not chosen or s.name in {OURS, *chosen} or s.is_floor]
    absent = {id(group): installed(group) for group in (managers, caches)}
    record = {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
        },
        "size": options.size,
        "rounds": options.rounds,
        "systems": [
            {"name": s.name, "packages": list(s.packages)}
            for s in (*managers, *caches)
            if s.packages
        ],
        "rows": [],
    }
    work = [(managers, key, w.name, w.unit, w.what) for key, w in WORKLOADS.items()]
    work += [(caches, key, name, "s", what) for key, (name, what) in END_TO_END.items() if caches]
    for systems, key, name, unit, what in work:
        if not options.work or key in options.work:
            rounds = take_turns(systems, key, options, absent[id(systems)])
            record["rows"].append(row(name, unit, what, summary(systems, rounds, SCALES[unit])))
            yield record


def row(name: str, unit: str, what: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the record; also told as it is measured."""
    shown = ", ".join(
        f"{f['system']} {f['value']:.4g} {unit}" if "value" in f else f"{f['system']} ({f['why']})"
        for f in figures
    )
    print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return {"work": name, "unit": unit, "what": what, "figures": figures}


def with_model(model: str | None) -> list[System]:
    """The caches, each told which model to run: by default that of `pagedkv demo`."""
    if model is None:
        from rich.console import Console

        from pagedkv.demo.model import smollm2_folder

        model = str(smollm2_folder(Console(stderr=True)))
    return [replace(s, arguments=(*s.arguments, "--model", model)) for s in CACHES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, one round, without a model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], metavar="PEER", help="these managers")
    parser.add_argument("--work", nargs="*", default=[], metavar="WORKLOAD", help="these rows")
    parser.add_argument("--model", help="a local model directory; default: that of pagedkv demo")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder of the results")
    parser.add_argument("--plot", type=Path, help="write the plot here as well")
    parser.add_argument("--redraw", action="store_true", help="table and plot of the last record")
    options = parser.parse_args(arguments)
    options.size = "small" if options.quick else "full"
    options.rounds = 1 if options.quick else options.rounds
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "compare.json"
    if not options.redraw:
        for record in compare(options):
            file.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(file.read_text())
    text = markdown(record)
    print(text, end="")
    (options.out / "compare.md").write_text(text)
    for target in [options.out / "compare.png", *([options.plot] if options.plot else [])]:
        draw(record, target)


if __name__ == "__main__":
    main()
