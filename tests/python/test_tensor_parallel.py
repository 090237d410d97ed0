"""A scheduler and two worker processes against one process: tables, content and tokens."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

import pagedkv as pk  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


sys.path.append(str(EXAMPLE.parent))  # the workers, which unpickle what is there, have it, too
import tensor_parallel as tp  # noqa: E402


class Checked(tp.Worker):  # type: ignore[misc]
    """A worker that also tells what it holds, and what it refuses."""

    def carry_out(self, plan: Any) -> Any:
        if isinstance(plan, np.ndarray):  # the K and V behind a block table, [2, L, tokens, H, D]
            table = torch.from_numpy(plan).long()
            pools = (self.kv.k, self.kv.v)
            parts = [[p(i)[table].flatten(0, 1) for i in range(tp.LAYERS)] for p in pools]
            return torch.stack([torch.stack(part) for part in parts])
        try:
            return super().carry_out(plan)
        except pk.KVError as error:
            return f"{type(error).__name__}: {error}"


class Recorded(tp.Scheduler):  # type: ignore[misc]
    """A scheduler that notes its plans' tables, and what the workers have in them."""

    def __init__(self, carry_out: Any) -> None:
        super().__init__(carry_out)
        self.tables: list[list[list[int]]] = []
        self.contents: list[Any] = []
        self.scores: list[Any] = []

    def step(self, ids: Any, tokens: Any, counts: Any = None) -> Any:
        found = super().step(ids, tokens, counts)
        self.scores.append(found)
        self.tables.append([self.manager.block_table(int(i)).tolist() for i in ids])
        for i in ids:
            length = self.manager.length(int(i))
            parts = self.carry_out(self.manager.block_table(int(i)))
            self.contents.append(torch.cat(parts, 3)[:, :, :length])  # all ranks' heads
        return found


def program(scheduler: Recorded) -> list[Any]:
    """Sharing of every kind. Returns the tokens of all that was searched and sampled."""
    manager, tokens = scheduler.manager, []
    prompt = np.arange(3, 43)
    a, scores = scheduler.prefill(prompt)
    ids = manager.fork(a, 4)
    last = scores[0].topk(4).indices
    parents = np.array([0, 0, 2, 1])
    for n in range(20):  # greedy from four beginnings, of which some replace others
        tokens.append(last.tolist())
        scores = scheduler.step(ids, last.numpy())
        last = scores.argmax(-1)
        if n % 5 == 4:
            manager.reorder(ids, parents)
            last = scores[parents].topk(2).indices[:, n % 2].contiguous()
        if n == 11:
            manager.truncate(ids, np.array([45, 30, 50, 41]))
        if n == 13:
            manager.rollback(manager.append(ids, last.numpy()))  # of which no worker hears
    tokens += scheduler.beam_search(prompt, 4, 16)
    scheduler.move(manager.swap_out(ids))
    tokens += scheduler.beam_search(prompt[:33], 3, 10)
    scheduler.move(manager.swap_in(ids))
    tokens.append(scheduler.step(ids, last.numpy()).argmax(-1).tolist())
    manager.verify()
    return tokens


def test_two_workers_do_what_one_process_does() -> None:
    alone = Checked(0, 1)
    one = Recorded(lambda plan: [alone.carry_out(plan)])
    expected = program(one)
    with tp.processes(2, Checked) as carry_out:
        two = Recorded(carry_out)
        assert program(two) == expected
        assert two.tables == one.tables
        stats = two.manager.stats()
        assert min(stats.num_copies, stats.num_hit_tokens, stats.num_swapped_in_blocks) > 0
        for found, right in zip(two.contents, one.contents, strict=True):
            torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
        for found, right in zip(two.scores, one.scores, strict=True):
            torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-3)
        seq = two.manager.create()
        plans = []
        for token in (5, 6):
            plan = two.manager.append([seq], [token])
            plans.append(pickle.loads(pickle.dumps(plan)))
            two.manager.commit(plan)
        early = carry_out(plans[1])
        assert [e.split(",")[0] for e in early] == [
            f"InvalidState: step {plans[1].step} comes after step {plans[0].step}"
        ] * 2
        assert [a.shape for a in carry_out(plans[0])] == [(1, tp.VOCAB)] * 2
        for twice in carry_out(plans[0]):
            assert f"expected step {plans[1].step} or a later one" in twice
        assert [a.shape for a in carry_out(plans[1])] == [(1, tp.VOCAB)] * 2


def dense_scores(worker: Any, tokens: Any) -> Any:
    """Log-probabilities after a text, without any cache, [VOCAB]."""
    positions = torch.arange(len(tokens))
    x = worker.embedding[torch.as_tensor(tokens)]
    for wq, wk, wv, wo in worker.layers:
        normal = F.rms_norm(x, (tp.HIDDEN,))
        q, k, v = ((normal @ w).unflatten(-1, (-1, tp.DIM)) for w in (wq, wk, wv))
        q, k = tp.rotate(q, positions), tp.rotate(k, positions)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + found.transpose(0, 1).flatten(1) @ wo
    return (F.rms_norm(x[-1], (tp.HIDDEN,)) @ worker.head).log_softmax(-1)


def test_the_model_of_one_process_is_right() -> None:
    """Beam search with forks, reorders and swaps, against one that computes every text anew."""
    worker = tp.Worker(0, 1)
    scheduler = tp.Scheduler(lambda plan: [worker.carry_out(plan)])
    prompt = list(range(3, 43))
    totals, texts = torch.zeros(1), [prompt]
    for _ in range(16):
        scores = torch.stack([dense_scores(worker, text) for text in texts])
        totals, best = (totals[:, None] + scores).flatten().topk(4)
        texts = [[*texts[int(b) // tp.VOCAB], int(b) % tp.VOCAB] for b in best]
    found = scheduler.beam_search(np.array(prompt), 4, 16)
    assert [[*prompt, *text] for text in found] == texts


def test_a_transfer_that_a_worker_fails_counts_for_nothing() -> None:
    worker = tp.Worker(0, 1)
    fails = True

    def carry_out(plan: Any) -> list[Any]:
        found = [worker.carry_out(plan)]
        if fails and not isinstance(plan, pk.StepPlan):
            raise EOFError("another worker has died")
        return found

    scheduler = tp.Scheduler(carry_out)
    manager, prompt = scheduler.manager, np.arange(40)
    sequence, expected = scheduler.prefill(prompt)
    with pytest.raises(EOFError):
        scheduler.move(manager.swap_out([sequence]))
    assert manager.waits_for(sequence) is None
    assert manager.stats().host.num_active == 0
    manager.verify()
    fails = False
    manager.restore([sequence])
    rest = prompt[manager.num_cached(sequence) :]
    torch.testing.assert_close(scheduler.step([sequence], rest, [len(rest)]), expected)
    scheduler.move(manager.swap_out([sequence]))
    assert manager.tier(sequence) == "host"


def test_the_example_runs() -> None:
    found = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("the same\n")
    two, one = found.stdout.splitlines()[-3:-1]
    assert two.split()[2:] == one.split()[2:]
    assert len(set(one.split()[2:])) > 5
