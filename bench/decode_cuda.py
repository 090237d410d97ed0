"""What a decode step of a Llama-3-8B-shaped model spends on its cache: for bench_cuda.py.

The model is its matrix products alone, without attention, so that a share of them is more than it
is of a real step. One layer's weights, 436 MB, serve as all 32: they are past what a GPU caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import pagedkv as pk
from pagedkv.graphs import DecodeGraph, Padded


@dataclass(frozen=True)
class Shape:
    """Of the model, and of a batch of `batch` sequences of `length` tokens."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    vocab: int = 128256
    batch: int = 256
    length: int = 1024


SMALL = Shape(2, 64, 4, 2, 16, 128, 256, 8, 32)


class Model:
    """The products of a step; `write` is given each layer's new K and V."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / rows**0.5

        self.shape = shape
        self.x = torch.randn(shape.batch, shape.hidden, device=device, dtype=torch.bfloat16)
        self.kv_dim = shape.kv_heads * shape.head_dim
        self.qkv = weight(shape.hidden, shape.heads * shape.head_dim + 2 * self.kv_dim)
        self.out = weight(shape.heads * shape.head_dim, shape.hidden)
        self.gate_up = weight(shape.hidden, 2 * shape.inner)
        self.down = weight(shape.inner, shape.hidden)
        self.head = weight(shape.hidden, shape.vocab)

    def __call__(self, write: Callable[[int, torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        shape, x = self.shape, self.x
        for layer in range(shape.layers):
            q, k, v = (x @ self.qkv).split([shape.hidden, self.kv_dim, self.kv_dim], 1)
            heads = (shape.batch, shape.kv_heads, shape.head_dim)
            write(layer, k.reshape(heads), v.reshape(heads))
            x = x + q @ self.out
            gate, up = (x @ self.gate_up).chunk(2, 1)
            x = x + (torch.nn.functional.silu(gate) * up) @ self.down
        return x @ self.head


class DecodeBench:
    """Steps of `shape` on a cache of `layers` layers, with `rounds` of each measurement."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.shape = device, SMALL if quick else Shape()
        self.rounds = 3 if quick else 30
        self.model = Model(self.shape, device)
        shape = self.shape
        spec = pk.KVSpec(shape.layers, shape.kv_heads, shape.head_dim, "bfloat16", 16)
        beyond = self.rounds // 16 + 2  # blocks of each row's own; the others are shared
        self.kv = pk.KVCache(
            spec,
            device=device,
            num_device_blocks=shape.length // 16 + shape.batch * beyond,
            max_batch=shape.batch,
            max_model_len=shape.length + 16 * beyond,
        )
        first = self.kv.create()
        with self.kv.step([first], np.zeros(shape.length, np.int64), counts=[shape.length]):
            pass
        self.ids = np.array(self.kv.fork(first, shape.batch))
        self.tokens = np.arange(shape.batch)  # other ones for each row, so that none are merged

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _seconds(self, call: Callable[[], Any], *, to_the_end: bool) -> float:
        """Median, until the device has ended, or until the host may go on."""
        times = []
        for _ in range(2 + self.rounds):
            self._synchronize()
            begin = time.perf_counter()
            call()
            if to_the_end:
                self._synchronize()
            times.append(time.perf_counter() - begin)
        self._synchronize()
        self.kv.truncate(self.ids, np.full(len(self.ids), self.shape.length))
        return statistics.median(times[2:])

    def run(self) -> list[tuple[str, float, float]]:
        """Figures (name, value, bar), and `text` of what is behind them."""
        model, kv, shape = self.model, self.kv, self.shape
        keys = torch.zeros(
            shape.batch, shape.kv_heads, shape.head_dim, device=self.device, dtype=torch.bfloat16
        )

        def nothing(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
            """In the place of a cache."""

        def alone() -> None:
            with kv.step(self.ids, self.tokens) as step:
                for read in (step.slots, step.positions, step.input_ids, step.block_tables):
                    assert len(read) == len(step.seq_lens)
                for layer in range(shape.layers):
                    kv.write(layer, keys, keys, step)

        def together() -> None:
            with kv.step(self.ids, self.tokens) as step:
                model(lambda layer, k, v: kv.write(layer, k, v, step))

        def padded(step: Padded) -> torch.Tensor:
            return model(step.write)

        graph = DecodeGraph(kv, padded, num_rows=shape.batch, width=kv.manager.max_model_len)

        def captured() -> None:
            with kv.step(self.ids, self.tokens) as step:
                graph(step)

        with torch.no_grad(), kv:
            products = self._seconds(lambda: model(nothing), to_the_end=True)
            seconds = {
                "step and writes, host": self._seconds(alone, to_the_end=False),
                "products with the cache less those without": self._seconds(
                    together, to_the_end=True
                )
                - products,
                "step and replay, host": self._seconds(captured, to_the_end=False),
            }
        self.text = f"A decode step's products at batch {shape.batch}: {products * 1e3:.2f} ms; "
        self.text += ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in seconds.items()) + "."
        return [(f"{name}, over a decode step", s / products, 0.05) for name, s in seconds.items()]
