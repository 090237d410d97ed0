"""examples/speculative.py: whatever is drafted, the tokens are those of greedy decoding."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import pagedkv as pk  # noqa: E402
from pagedkv.demo.model import DemoModel, tiny_llama  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
NEW = 50

sys.path.insert(0, str(EXAMPLES))
import speculative  # noqa: E402
from engine import Engine, prompts  # noqa: E402


@functools.cache
def network() -> Any:
    return tiny_llama()


def generate(prompt: list[int], depth: int, width: int, block_size: int = 8) -> Any:
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=block_size)
    with pk.KVCache(spec, num_device_blocks=640 // block_size) as kv:
        run = speculative.generate(Engine(network(), kv), prompt, NEW, depth, width)
        kv.manager.verify()
        assert kv.stats().num_sequences == 0
        assert kv.stats().device.num_active == 0
    return run


def greedy(prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found: list[int] = network().generate(ids, **options)[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("depth", "width"), [(0, 1), (1, 1), (5, 1), (3, 2), (6, 4)])
def test_the_tokens_are_those_of_greedy_decoding(depth: int, width: int, block_size: int) -> None:
    for prompt in [*prompts(DemoModel("tiny", network()), 3), [7]]:
        run = generate(prompt, depth, width, block_size)
        assert run.tokens == greedy(prompt)
        assert run.num_steps == NEW - run.num_accepted


def test_drafts_that_are_right_save_steps_and_a_tree_saves_more() -> None:
    num_steps, wrong = {}, {}
    for way in ((0, 1), (6, 1), (6, 3)):
        runs = [generate(p, *way) for p in prompts(DemoModel("tiny", network()), 6)]
        num_steps[way] = sum(run.num_steps for run in runs)
        wrong[way] = sum(run.num_drafted - run.num_accepted for run in runs)
    assert num_steps[6, 3] < num_steps[6, 1] < num_steps[0, 1] == 6 * NEW
    assert wrong[6, 3] > wrong[6, 1] > wrong[0, 1] == 0


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("right", range(5))
def test_of_a_tree_the_branch_that_came_furthest_is_kept(right: int, place: int) -> None:
    """Three wrong branches, and among them one whose first `right` tokens are right."""
    prompt = prompts(DemoModel("tiny", network()), 1)[0]
    expected = greedy(prompt)
    good = expected[:right] + [(token + 1) % 300 for token in expected[right:4]]
    branches = [[(expected[0] + 2 + i) % 300] * i for i in range(3)]
    branches.insert(place, good)
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=4)
    with pk.KVCache(spec, num_device_blocks=80) as kv:
        engine, id = Engine(network(), kv), kv.create()
        with kv.step([id], prompt[:-1], [len(prompt) - 1]) as step:
            engine.forward(step, torch.arange(0))
        kept, gained = speculative.verify(engine, id, prompt, branches)
        assert gained == expected[: right + 1]
        assert kv.length(kept) == len(prompt) + right  # all but the last, which no step has had
        assert kv.stats().num_sequences == 1
        tokens = prompt + gained
        while len(tokens) < len(prompt) + 12:
            kept, gained = speculative.verify(engine, kept, tokens, [[]])
            tokens += gained
        assert tokens == prompt + expected[:12]
        kv.manager.verify()


def test_branches_that_find_no_blocks_leave_none_behind() -> None:
    prompt = prompts(DemoModel("tiny", network()), 1)[0]
    num_blocks = -(-len(prompt) // 4) + 2  # for one branch
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=4)
    with pk.KVCache(spec, num_device_blocks=num_blocks) as kv:
        engine, id = Engine(network(), kv), kv.create()
        with kv.step([id], prompt[:-1], [len(prompt) - 1]) as step:
            engine.forward(step, torch.arange(0))
        with pytest.raises(pk.OutOfBlocks):
            speculative.verify(engine, id, prompt, [[1] * 4, [2] * 4, [3] * 4, [4] * 4])
        assert (kv.stats().num_sequences, kv.length(id)) == (1, len(prompt) - 1)
        assert speculative.verify(engine, id, prompt, [[]])[1] == greedy(prompt)[:1]
        with pytest.raises(pk.OutOfBlocks):
            speculative.generate(engine, prompt, NEW, 6, 4)
        assert kv.stats().num_sequences == 1
        kv.manager.verify()


def test_drafts_are_what_followed_before() -> None:
    draft = speculative.draft
    assert draft([1, 2, 3, 4, 5, 1, 2, 3], 3, 1) == [[4, 5, 1]]
    assert draft([1, 2, 9, 8, 1, 2, 7, 6, 1, 2], 2, 2) == [[7, 6], [9, 8]]
    assert draft([5, 6, 5, 6], 5, 1) == [[5, 6, 5, 6, 5]]
    assert draft([1, 2, 3], 4, 2) == []


def test_it_runs_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "speculative.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[-3:]
    assert [row.split()[-1] for row in rows] == ["equal"] * 3
