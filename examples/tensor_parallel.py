"""One scheduler, two workers: a model whose heads are split over processes.

    python examples/tensor_parallel.py

The scheduler has the block manager and no tensors. Each step it appends, and sends the plan to the
workers; each worker has the K and V of its heads, and carries the plan out. Sequences, forks,
reorders and swaps are the scheduler's: what of them concerns a worker is in the plans.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import pagedkv as pk

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, VOCAB = 2, 64, 4, 2, 16, 256
BLOCK_SIZE, DEVICE_BLOCKS, HOST_BLOCKS = 16, 100, 50

CarryOut = Callable[[Any], Any]


class Worker:
    """One rank: its heads' weights, and their K and V."""

    def __init__(self, rank: int, world: int) -> None:
        self.world = world
        spec = pk.KVSpec(LAYERS, KV_HEADS // world, DIM, "float32", BLOCK_SIZE)
        self.kv = pk.KVCache(spec, num_device_blocks=DEVICE_BLOCKS, num_host_blocks=HOST_BLOCKS)
        random = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=random) / math.sqrt(rows)

        def of_rank(heads: int) -> torch.Tensor:  # the columns of this rank's heads
            return weight(HIDDEN, heads * DIM).chunk(world, 1)[rank]

        self.embedding, self.head = weight(VOCAB, HIDDEN), weight(HIDDEN, VOCAB) * 4
        self.layers = [
            (of_rank(HEADS), of_rank(KV_HEADS), of_rank(KV_HEADS), of_rank(HEADS).T)
            for _ in range(LAYERS)
        ]

    def carry_out(self, plan: Any) -> Any:
        """The log-probabilities after each row's last token, [B, VOCAB]; nothing of a transfer."""
        if isinstance(plan, pk.StepPlan):
            with self.kv.apply(plan) as step:
                return self.forward(step)
        self.kv.apply(plan).wait()
        return None

    def forward(self, step: pk.Step) -> torch.Tensor:
        x = self.embedding[step.input_ids]
        for i, (wq, wk, wv, wo) in enumerate(self.layers):
            normal = F.rms_norm(x, (HIDDEN,))
            q, k, v = ((normal @ w).unflatten(-1, (-1, DIM)) for w in (wq, wk, wv))
            self.kv.write(i, rotate(k, step.positions), v, step)
            found = self.kv.attention(i, rotate(q, step.positions), step).flatten(1) @ wo
            if self.world > 1:
                dist.all_reduce(found)
            x = x + found
        last = F.rms_norm(x[step.query_starts[1:].long() - 1], (HIDDEN,))
        return (last @ self.head).log_softmax(-1)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, DIM]."""
    angles = positions[:, None, None] * 10_000.0 ** -torch.linspace(0, 1, DIM // 2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def serve(
    rank: int,
    world: int,
    rendezvous: str,
    pipe: Connection,
    make: Callable[[int, int], Worker],
) -> None:
    """A worker process: plans come in, what the scheduler has to know goes out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    worker = make(rank, world)
    while message := pipe.recv_bytes():
        pipe.send(worker.carry_out(pickle.loads(message)))
    worker.kv.close()
    dist.destroy_process_group()


@contextmanager
def processes(world: int, make: Callable[[int, int], Worker] = Worker) -> Iterator[CarryOut]:
    """`world` workers. What they all have carried out is the answers of each."""
    context = mp.get_context("spawn")
    here: list[Connection] = []
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            pipe, there = context.Pipe()
            arguments = rank, world, f"{folder}/rendezvous", there, make
            workers.append(context.Process(target=serve, args=arguments))
            workers[-1].start()
            there.close()  # so that a worker that dies is an EOFError here
            here.append(pipe)

        def carry_out(plan: Any) -> list[Any]:
            message = pickle.dumps(plan)
            for pipe in here:
                pipe.send_bytes(message)
            return [pipe.recv() for pipe in here]

        try:
            yield carry_out
            for pipe in here:
                pipe.send_bytes(b"")
            for process in workers:
                process.join()
        finally:
            for process in workers:
                process.kill()


class Scheduler:
    """Decides, and has others carry it out."""

    def __init__(self, carry_out: CarryOut) -> None:
        self.carry_out = carry_out
        self.manager = pk.BlockManager(DEVICE_BLOCKS, HOST_BLOCKS, BLOCK_SIZE)

    def step(self, ids: Any, tokens: Any, counts: Any = None) -> torch.Tensor:
        """Log-probabilities after the new tokens of each of `ids`, [B, VOCAB]."""
        plan = self.manager.append(ids, tokens, counts=counts)
        try:
            scores: torch.Tensor = self.carry_out(plan)[0]
        except BaseException:
            self.manager.rollback(plan)
            raise
        self.manager.commit(plan)
        return scores

    def move(self, plan: Any) -> None:
        """Carry a transfer out everywhere; it is complete when the last worker has ended it.

        Where one fails, it counts for nothing anywhere: its sequences are to be restored.
        """
        try:
            self.carry_out(plan)
        except BaseException:
            self.manager.abort(plan)
            raise
        self.manager.complete(plan)

    def prefill(self, prompt: Any) -> tuple[int, torch.Tensor]:
        sequence = self.manager.create(prompt)
        rest = prompt[self.manager.num_cached(sequence) :]
        return sequence, self.step([sequence], rest, [len(rest)])

    def beam_search(self, prompt: Any, num_beams: int, num_new: int) -> list[list[int]]:
        """The best continuations, the best one first. Halfway all beams go to the host and back."""
        sequence, scores = self.prefill(prompt)
        totals, tokens = scores[0].topk(num_beams)
        beams = self.manager.fork(sequence, num_beams)
        texts = [[int(t)] for t in tokens]
        for n in range(num_new - 1):
            if n == num_new // 2:
                self.move(self.manager.swap_out(beams))
                self.move(self.manager.swap_in(beams))
            scores = totals[:, None] + self.step(beams, tokens.numpy())
            totals, best = scores.flatten().topk(num_beams)
            parents, tokens = best // VOCAB, best % VOCAB
            self.manager.reorder(beams, parents.numpy())
            texts = [[*texts[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
        self.manager.release(beams)
        return texts


def main() -> None:
    prompt = np.arange(40) % VOCAB
    worker = Worker(0, 1)
    alone = Scheduler(lambda plan: [worker.carry_out(plan)]).beam_search(prompt, 4, 24)
    with processes(2) as carry_out:
        scheduler = Scheduler(carry_out)
        split = scheduler.beam_search(prompt, 4, 24)
        print(scheduler.manager.stats())
    print("two workers ", *split[0])
    print("one process ", *alone[0])
    print("the same" if split == alone else "different")


if __name__ == "__main__":
    main()
