"""Attention on a CPU: "blockwise" beside "gather", by time and by the memory that they gather into.

Both in one process, in turns; the time that a call takes, the least of several.

    python bench/bench_attention.py [--threads N] [--small]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch

import pagedkv as pk

BACKENDS = ("gather", "blockwise")


class Case(NamedTuple):
    """`beams` rows that share `context` tokens, or `batch` that do not, and `new` tokens each.

    `padded`: a mask hides what would be padding on the left, of row i the part i / batch. `beside`:
    what is kept are latents of `dim`, and that beside them.
    """

    context: int
    new: int = 1
    batch: int = 1
    beams: int = 1
    heads: tuple[int, int] = (32, 8)
    dim: int = 128
    dtype: str = "bfloat16"
    options: tuple[tuple[str, Any], ...] = ()
    padded: bool = False
    beside: int = 0

    @property
    def layer(self) -> pk.LayerSpec:
        kind: Any = "latent" if self.beside else "full"
        return pk.LayerSpec(kind, self.heads[1], self.dim, self.beside or self.dim, self.dtype)

    def __str__(self) -> str:
        rows = f"{self.beams} beams" if self.beams > 1 else f"{self.batch} x"
        options = ", padded" if self.padded else ""
        options += "".join(f", {name} {value}" for name, value in self.options)
        of = f"latents of {self.dim} + {self.beside}" if self.beside else f"heads of {self.dim}"
        shape = f"{self.heads[0]}/{self.heads[1]} {of}, {self.dtype}{options}"
        return f"{rows} {self.new} to {self.context}, {shape}"


CASES = [Case(n, dtype=t) for t in ("float32", "bfloat16") for n in (256, 1024, 8192, 32768)]
CASES += [Case(n, batch=16, heads=(9, 3), dim=64, dtype="float32") for n in (128, 1024, 8192)]
CASES += [
    Case(n, batch=16, heads=(9, 3), dim=64, dtype=t, padded=True)
    for n in (128, 1024)
    for t in ("float32", "bfloat16")
]
CASES += [Case(n, beams=8, dtype="float32") for n in (256, 1024)]
CASES += [
    Case(8192, beams=8, dtype="float32"),
    Case(0, 1024, dtype="float32"),
    Case(8192, 256, dtype="float32"),
    Case(8192, 256),
    Case(8192, options=(("window", 1024),)),
    Case(4096, 256, options=(("window", 1024),)),
    Case(8192, dtype="float32", options=(("softcap", 30.0),)),
]
LATENT: dict[str, Any] = {"heads": (128, 1), "dim": 512, "beside": 64}  # DeepSeek-V3's
LATENT["options"] = (("scale", 192**-0.5),)
CASES += [Case(n, dtype=t, **LATENT) for t in ("float32", "bfloat16") for n in (1024, 8192)]
CASES += [
    Case(1024, batch=8, dtype="float32", **{**LATENT, "heads": (16, 1)}),
    Case(0, 512, dtype="float32", **LATENT),
]
SMALL = [
    Case(40, 3, batch=2, heads=(4, 2), dim=16),
    Case(40, beams=2, heads=(4, 2), dim=16),
    Case(40, batch=2, heads=(4, 2), dim=16, padded=True),
    Case(40, batch=2, heads=(4, 1), dim=16, beside=8, options=(("scale", 0.3),)),
]


def run(case: Case, rounds: int = 4) -> dict[str, tuple[float, int]]:
    """Per backend the seconds of a call, and the bytes that it holds to gather into."""
    layer, dtype = case.layer, getattr(torch, case.dtype)
    spec = pk.KVSpec(layers=[layer], block_size=16)
    rows = case.batch * case.beams
    num_blocks = (case.context // 16 + 2) * case.batch + (case.new // 16 + 2) * rows
    with pk.KVCache(spec, num_device_blocks=num_blocks, max_batch=rows) as kv:

        def step(ids: Any, count: int) -> pk.Step:
            opened = kv.step(ids, counts=np.full(len(ids), count))
            k, v = (
                torch.randn(count * len(ids), layer.num_kv_heads, dim).to(dtype)
                for dim in (layer.k_dim, layer.v_dim)
            )
            kv.write(0, k, v, opened)
            return opened

        ids = np.array([kv.create() for _ in range(case.batch)])
        if case.context:
            step(ids, case.context).commit()
        if case.beams > 1:
            ids = kv.fork(int(ids[0]), case.beams)
        q = torch.randn(rows * case.new, case.heads[0], layer.query_dim).to(dtype)
        options = dict(case.options)
        if case.padded:
            width = case.context + case.new
            firsts = torch.arange(rows) * case.context // rows
            options["attn_mask"] = (torch.arange(width) >= firsts[:, None])[:, None, None]
        with step(ids, case.new) as opened:
            found = {}
            for backend in BACKENDS * rounds:
                kv._workspaces.clear()
                best, _ = found.get(backend, (float("inf"), 0))
                for _ in range(3):
                    begin = time.perf_counter()
                    kv.attention(0, q, opened, backend=backend, **options)
                    best = min(best, time.perf_counter() - begin)
                found[backend] = best, sum(m.nbytes for m, _ in kv._workspaces.values())
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="that torch may use")
    parser.add_argument("--small", action="store_true", help="two small cases")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| case | gather ms | blockwise ms | times as fast | gather MiB | blockwise MiB |")
    print("|---|---|---|---|---|---|")
    for case in SMALL if options.small else CASES:
        (slow, much), (fast, little) = run(case).values()
        columns = f"{slow * 1e3:.2f} | {fast * 1e3:.2f} | {slow / fast:.2f}"
        print(f"| {case} | {columns} | {much / 2**20:.1f} | {little / 2**20:.1f} |", flush=True)


if __name__ == "__main__":
    main()
