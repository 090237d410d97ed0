"""How near the CUDA code comes to plain copies on this GPU: ratios within one run.

    python bench/bench_cuda.py --out build/gpu              # cuda.json and cuda.md
    python bench/bench_cuda.py --baseline bench/results/cuda.json

With a baseline, a ratio more than 10 % worse than there fails, with exit code 1. `--device cpu
--quick` runs the same on any machine, where the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pagedkv as pk
from decode_cuda import DecodeBench
from pagedkv.info import collect

TOLERANCE = 0.10
MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """`value` over the reference of the same run; `bar` is the most that is accepted."""

    name: str
    value: float
    bar: float | None = None


class Clock:
    """Seconds of work on a device, until all of it has ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, call: Callable[[], Any], rounds: int) -> float:
        call()
        self.synchronize()
        found = []
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            self.synchronize()
            found.append(time.perf_counter() - begin)
        return statistics.median(found)

    def per_call(self, call: Callable[[], Any], calls: int = 50, rounds: int = 5) -> float:
        """With many in a row, so that the launches of some hide behind the work of others."""

        def many() -> None:
            for _ in range(calls):
                call()

        return self.median(many, rounds) / calls


class Bench:
    """Sections, each of which adds its figures and says in `notes` what is behind them."""

    def __init__(self, device: str, quick: bool, host_gib: int) -> None:
        self.host_gib = host_gib
        self.device = torch.device(device)
        self.clock = Clock(self.device)
        self.quick = quick
        self.rounds = 3 if quick else 15
        self.num_bytes = (4 if quick else 512) * MIB
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.plain: dict[str, float] = {}

    def add(self, name: str, value: float, bar: float) -> None:
        self.figures.append(Figure(name, value, bar))

    def cache(
        self, layers: int, layout: Any, block_size: int = 16, **options: Any
    ) -> tuple[pk.KVCache, Any, int]:
        """A cache with two long sequences. A layer has 2 KiB of K for each token, and 2 of V."""
        spec = pk.KVSpec(layers, 8, 128, "bfloat16", block_size)
        num_blocks = max(self.num_bytes // spec.block_bytes, 256 if layers == 1 else 4)
        kv = pk.KVCache(
            spec,
            device=self.device,
            num_device_blocks=2 * num_blocks,
            num_host_blocks=2 * num_blocks,
            max_model_len=num_blocks * spec.block_size,
            max_batch=256,
            layout=layout,
            **options,
        )
        copier = kv._transfers.device if kv._transfers is not None else None
        wait_until_pinned(copier, 2 * num_blocks * spec.block_bytes)  # which slows all that runs
        ids = np.array([kv.create(), kv.create()])
        for _ in range(num_blocks):  # in turn, so that no two blocks of one are neighbours
            with kv.step(ids, counts=[block_size, block_size]):
                pass
        return kv, ids, num_blocks

    def plain_copies(self) -> None:
        """Seconds of one large copy of the same bytes, out and in, and of both at once."""
        pin = self.device.type == "cuda"
        host = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pin)
        other = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pin)
        there = torch.ones(self.num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.ones_like(there)
        found = {
            "out": self.clock.median(lambda: host.copy_(there, non_blocking=True), self.rounds),
            "in": self.clock.median(lambda: there.copy_(host, non_blocking=True), self.rounds),
            "on the device": self.clock.median(lambda: target.copy_(there), self.rounds),
        }
        if pin:
            streams = [torch.cuda.Stream(self.device) for _ in range(2)]

            def both() -> None:
                with torch.cuda.stream(streams[0]):
                    host.copy_(there, non_blocking=True)
                with torch.cuda.stream(streams[1]):
                    target.copy_(other, non_blocking=True)

            found["both"] = self.clock.median(both, self.rounds)
        rates = ", ".join(
            f"{name} {self.num_bytes / seconds / 1e9:.1f} GB/s" for name, seconds in found.items()
        )
        self.notes.append(f"Plain copies: {rates}.")
        self.plain = found

    def swaps(self, layout: Any, bar: float) -> None:
        plain, in_blocks = self.plain, layout == "block_major"
        kv, ids, num_blocks = self.cache(32, layout, 16 if in_blocks else 32)
        size = "2 MiB blocks" if in_blocks else "64 KiB pieces"
        with kv:
            scale = num_blocks * kv.spec.block_bytes / self.num_bytes
            one, other = ids[:1], ids[1:]
            for _ in range(2):  # the first touch of host memory is another matter
                kv.swap_out(one).wait()
                kv.swap_in(one).wait()
            times: dict[str, list[float]] = {"out": [], "in": [], "submit": []}
            assert kv._transfers is not None
            before = kv._transfers.engine.num_runs
            for _ in range(self.rounds):
                for name, move in (("out", kv.swap_out), ("in", kv.swap_in)):
                    begin = time.perf_counter()
                    transfer = move(one)
                    times["submit"].append(time.perf_counter() - begin)
                    transfer.wait()
                    times[name].append(transfer.seconds or time.perf_counter() - begin)
            for name in ("out", "in"):
                ratio = statistics.median(times[name]) / (plain[name] * scale)
                self.add(f"swap {name}, {size}, over one copy", ratio, bar)
            runs = (kv._transfers.engine.num_runs - before) / (2 * self.rounds)
            submit = statistics.median(times["submit"]) / runs * 1e6
            self.add(f"submission, {size}, us per piece at most", submit, 1.0)
            if "both" in plain:
                kv.swap_out(other).wait()
                both = []
                for n in range(self.rounds):
                    out, back = (one, other) if n % 2 == 0 else (other, one)
                    begin = time.perf_counter()
                    transfers = kv.swap_out(out), kv.swap_in(back)
                    for transfer in transfers:
                        transfer.wait()
                    both.append(time.perf_counter() - begin)
                ratio = statistics.median(both) / (plain["both"] * scale)
                self.add(f"both ways, {size}, over two copies", ratio, 1 / 0.85)

    def kernels(self) -> None:
        """Over more than a GPU's L2 cache holds, as the plain copy is."""
        kv, ids, num_blocks = self.cache(1, "block_major")
        per_byte = self.plain["on the device"] / self.num_bytes
        with kv:
            tokens = min(num_blocks * kv.spec.block_size, 65536)
            k = torch.ones(tokens, 8, 128, dtype=torch.bfloat16, device=self.device)
            some = np.array([kv.create()])
            kv.release(ids[1:])
            with kv.step(some, counts=[tokens]) as step:
                seconds = self.clock.per_call(lambda: kv.write(0, k, k, step), calls=10)
                moved = 2 * k.nbytes
                self.add("write over a device copy, per byte", seconds / moved / per_byte, 1 / 0.8)
                seconds = self.clock.per_call(lambda: kv.gather(0, step), calls=10)
                self.add("gather over a device copy, per byte", seconds / moved / per_byte, 1 / 0.8)
            pairs = num_blocks // 2
            rows = np.stack([np.arange(pairs) + 1, np.arange(pairs) + 1 + pairs], axis=1)
            copies = np.concatenate([rows, np.full((pairs, 1), kv.spec.block_size)], axis=1)
            there = torch.from_numpy(np.ascontiguousarray(copies, np.int32)).to(self.device)
            at = there.data_ptr(), pairs
            seconds = self.clock.per_call(lambda: kv._pool.copy_blocks(*at), calls=10)
            moved = pairs * kv.spec.block_bytes
            ratio = seconds / moved / per_byte
            self.add("copy_blocks over a device copy, per byte", ratio, 1 / 0.85)

    def small(self) -> None:
        """Decode size: 256 tokens, against the smallest thing that torch launches."""
        kv, ids, _ = self.cache(1, "block_major")
        with kv:
            kv.release(ids)
            many = np.array([kv.create() for _ in range(256)])
            k = torch.ones(256, 8, 128, dtype=torch.bfloat16, device=self.device)
            nothing = torch.zeros(1, device=self.device)
            with kv.step(many) as step:
                write = self.clock.per_call(lambda: kv.write(0, k, k, step), calls=200)
            empty = self.clock.per_call(lambda: nothing.zero_(), calls=200)
            self.add("decode-size write less torch's smallest kernel, us", (write - empty) * 1e6, 3)

    def beside(self, layout: Any) -> None:
        """A compute-bound loop, alone and beside swaps both ways."""
        kv, ids, _ = self.cache(32, layout)
        a = torch.randn(2048 if not self.quick else 64, 2048 if not self.quick else 64)
        a = a.to(self.device, torch.bfloat16)

        def loop() -> None:
            for _ in range(20):
                torch.mm(a, a)

        with kv:
            kv.swap_out(ids[1:]).wait()
            alone = self.clock.median(loop, self.rounds)
            times = []
            for n in range(self.rounds):
                out, back = (ids[:1], ids[1:]) if n % 2 == 0 else (ids[1:], ids[:1])
                transfers = kv.swap_out(out), kv.swap_in(back)
                begin = time.perf_counter()
                loop()
                stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
                if stream is not None:
                    stream.synchronize()
                times.append(time.perf_counter() - begin)
                for transfer in transfers:
                    transfer.wait()
            ratio = statistics.median(times) / alone
            self.add(f"compute beside swaps, {layout}, over alone", ratio, 1.05)

    def host_memory(self) -> None:
        """Until a host tier is pinned, against cudaHostAlloc of the same bytes, by torch."""
        on_gpu = self.device.type == "cuda"
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
        num_bytes = 64 * MIB if self.quick else min(self.host_gib << 30, most)
        # torch pins a power of two, whatever it is asked.
        num_bytes = 1 << (num_bytes.bit_length() - 1)
        begin = time.perf_counter()
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        if not on_gpu:
            memory.fill_(1)
        plain = time.perf_counter() - begin
        del memory
        if on_gpu:
            torch._C._host_emptyCache()
        spec = pk.KVSpec(32, 8, 128, "bfloat16", 16)
        options: dict[str, Any] = {"copy_method": "loop"} if on_gpu else {}
        begin = time.perf_counter()
        with pk.KVCache(
            spec, device=self.device, num_device_blocks=4, host_memory=num_bytes, **options
        ) as kv:
            made = time.perf_counter() - begin
            copier = kv._transfers.device if kv._transfers is not None else None
            wait_until_pinned(copier, num_bytes - spec.block_bytes)
            ready = time.perf_counter() - begin
        self.notes.append(f"Host memory: {num_bytes >> 20} MiB, cudaHostAlloc {plain:.2f} s.")
        self.add("host tier pinned, over cudaHostAlloc", ready / plain, 0.5)
        self.add("cache with that host tier made, over cudaHostAlloc", made / plain, 0.1)

    def decode(self) -> None:
        bench = DecodeBench(self.device, self.quick)
        for figure in bench.run():
            self.add(*figure)
        self.notes.append(bench.text)

    def methods(self) -> None:
        kv, _, _ = self.cache(1, "block_major")
        with kv:
            self.notes.append(f"```\n{kv.copy_methods()}```")

    def sections(self) -> list[Callable[[], None]]:
        """What others need first, then what matters most; many small copies at the end."""
        return [
            self.plain_copies,
            self.decode,
            partial(self.swaps, "block_major", 1 / 0.95),
            self.kernels,
            self.small,
            partial(self.beside, "block_major"),
            self.host_memory,
            self.methods,
            partial(self.swaps, "layer_major", 1 / 0.85),
            partial(self.beside, "layer_major"),
        ]


def wait_until_pinned(copier: Any, num_bytes: int) -> None:
    """Of a GPU's host tier: a helper thread pins it meanwhile."""
    while getattr(copier, "num_ready_bytes", num_bytes) < num_bytes:
        time.sleep(0.001)


def commit() -> str:
    """PAGEDKV_COMMIT says it where there is a copy of the files alone."""
    if "PAGEDKV_COMMIT" in os.environ:
        return os.environ["PAGEDKV_COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def machine(device: torch.device) -> dict[str, str]:
    found = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = str(collect().cuda.driver)
        found["cuda"] = str(torch.version.cuda)
    return found


def table(figures: list[Figure], where: dict[str, str], notes: list[str]) -> str:
    lines = ["# CUDA", "", ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["| figure | value | bar | |", "|---|---|---|---|"]
    for figure in figures:
        ok = "" if figure.bar is None else "ok" if figure.value <= figure.bar else "MISSED"
        bar = "" if figure.bar is None else f"{figure.bar:.2f}"
        lines.append(f"| {figure.name} | {figure.value:.2f} | {bar} | {ok} |")
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def write_report(folder: Path, bench: Bench, where: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "figures": [asdict(f) for f in bench.figures]}
    (folder / "cuda.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "cuda.md").write_text(table(bench.figures, where, bench.notes))


def worse(figures: list[Figure], baseline: Path) -> list[str]:
    before = {f["name"]: f["value"] for f in json.loads(baseline.read_text())["figures"]}
    return [
        f"{f.name}: {f.value:.3f}, and {before[f.name]:.3f} in {baseline}"
        for f in figures
        if f.name in before and f.value > before[f.name] + TOLERANCE * abs(before[f.name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--host-gib", type=int, default=64, help="of the host tier that is pinned")
    parser.add_argument("--out", type=Path, help="folder for cuda.json and cuda.md")
    parser.add_argument("--baseline", type=Path, help="cuda.json of an earlier run")
    args = parser.parse_args()
    bench = Bench(args.device, args.quick, args.host_gib)
    where, failed = machine(bench.device), 0
    for section in bench.sections():
        try:
            section()
        except Exception:  # the others are worth having
            failed += 1
            traceback.print_exc()
            bench.notes.append(f"FAILED: {traceback.format_exc(limit=-1).splitlines()[-1]}")
        if args.out is not None:  # at once: whatever comes next may end the process
            write_report(args.out, bench, where)
    print(table(bench.figures, where, bench.notes))
    missed = sum(f.bar is not None and f.value > f.bar for f in bench.figures)
    print(f"{missed} of {len(bench.figures)} bars missed, {failed} sections failed")
    found = worse(bench.figures, args.baseline) if args.baseline else []
    for line in found:
        print("worse:", line, file=sys.stderr)
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
