"""Leaves out one call site at a time, and expects random programs to notice within 2,000 seeds.

    python tests/cpp/run_mutants.py BUILD/tests/cpp/kv_mutants

The sites are read from the source: every call in core/ and transfer/ that holds, drops or publishes
a node, makes somebody wait for a transfer, or waits itself; and every fence. So a new one that no
program misses fails here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "csrc"
SEEDS = 2000
CALL = re.compile(
    r"tree_\.(?:ref|unref|publish)\("
    r"|transfers_\.(?:wait_for|claim|read|write|land)\("
    r"|(?:TransferTable::|\b)add\((?:transfer\.|transfers,)"
    r"|\b(?:land|wait_for|await)\((?:tier|transfer|transfers)(?:[.,]|->)"
)
DEFINITION = re.compile(r"^(?:void|Status) \w+::")


def sites() -> list[str]:
    """file:line of every call."""
    found = []
    for path in sorted([*SOURCE.glob("core/*.cpp"), *SOURCE.glob("transfer/*.cpp")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if CALL.search(line) and not DEFINITION.match(line):
                found.append(f"{path.relative_to(SOURCE)}:{number}")
    return found


def fences() -> dict[str, int]:
    """Every site that asks a device for a fence, and its number."""
    header = (SOURCE / "transfer" / "device.h").read_text()
    body = re.search(r"enum class FenceSite[^{]*\{(.*?)\}", header, re.DOTALL)
    assert body is not None
    names = re.findall(r"^\s*(\w+),", body[1], re.MULTILINE)
    engine = (SOURCE / "transfer" / "transfer_engine.cpp").read_text()
    used = set(re.findall(r"FenceSite::(\w+)", engine))
    assert used == set(names), f"fences {used}, sites {names}"
    return {name: number for number, name in enumerate(names)}


def main() -> int:
    binary = sys.argv[1]
    options = {site: ["--mutant", site] for site in sites()}
    options |= {f"fence {name}": ["--skip-fence", str(n)] for name, n in fences().items()}
    assert subprocess.run([binary, "--seeds", "200"], stdout=subprocess.DEVNULL).returncode == 0
    survivors = []
    for name, arguments in options.items():
        run = subprocess.run(
            [binary, "--seeds", str(SEEDS), *arguments], capture_output=True, text=True, timeout=120
        )
        caught = run.returncode != 0
        print(f"{'caught ' if caught else 'MISSED '} {name}: {run.stdout.splitlines()[:1]}")
        if not caught:
            survivors.append(name)
    print(f"{len(options) - len(survivors)} passed, {len(survivors)} failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
