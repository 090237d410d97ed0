"""Random programs of all commands, on the real manager and on the naive one (see twin.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pagedkv.errors import UnknownSequence
from twin import Config, Twin

SALTS = (b"", b"a", b"tenant 2")


class Choose(Protocol):
    """Where a program's decisions come from: a seed, or hypothesis."""

    def integer(self, least: int, most: int) -> int: ...


class Seeded:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, least: int, most: int) -> int:
        return self.random.randint(least, most)


class Drawn:
    def __init__(self, data: Any) -> None:
        self.data = data

    def integer(self, least: int, most: int) -> int:
        return int(self.data.draw(st.integers(least, most)))


class Commands:
    """One random command at a time. Small alphabets and pools make everything meet everything."""

    def __init__(self, config: Config, alphabet: int) -> None:
        self.config = config
        self.alphabet = alphabet
        self.twin = Twin(config)
        self.rest: dict[int, list[int]] = {}  # what is left of a sequence's prompt
        self.texts: list[list[int]] = [[]]  # earlier ones, to begin later ones with
        self.released: list[int] = []

    @property
    def live(self) -> list[int]:
        return list(self.twin.told)

    @property
    def open(self) -> bool:
        return self.twin.plan is not None

    def some(self, choose: Choose, ids: Sequence[int], most: int) -> list[int]:
        """A few different ones, in any order."""
        left, taken = list(ids), []
        for _ in range(choose.integer(min(1, len(left)), min(most, len(left)))):
            taken.append(left.pop(choose.integer(0, len(left) - 1)))
        return taken

    def tokens(self, choose: Choose, n: int) -> list[int]:
        return [choose.integer(0, self.alphabet - 1) for _ in range(n)]

    def text(self, choose: Choose) -> list[int]:
        """The beginning of an earlier one, and something new."""
        before = self.texts[choose.integer(0, len(self.texts) - 1)]
        new = self.tokens(choose, choose.integer(0, 2 * self.config.block_size + 1))
        whole = before[: choose.integer(0, len(before))] + new
        return whole[: self.config.max_model_len]

    def remember(self, tokens: Sequence[int]) -> None:
        self.texts = [*self.texts[-20:], list(tokens)]

    # ------------------------------------------------------------------ commands

    def create(self, choose: Choose) -> None:
        salt = SALTS[max(0, choose.integer(-3, 2))]
        prompt = None if choose.integer(0, 6) == 0 else self.text(choose)
        i = self.twin.create(prompt, salt)
        if i is not None and prompt is not None:
            self.rest[i] = prompt[len(self.twin.told[i].tokens) :]
            self.remember(prompt)

    def lookup(self, choose: Choose) -> None:
        self.twin.lookup(self.text(choose), SALTS[choose.integer(0, 2)])

    def admit(self, choose: Choose) -> None:
        """A prompt into a pool that has to make room for it."""
        self.create(choose)
        ids = self.live[-1:]
        rest = self.rest.get(ids[0], []) if ids else []
        if rest and not self.open and self.twin.append(ids, rest, [len(rest)], known=True):
            self.close(choose)

    def append(self, choose: Choose) -> None:
        """A prompt's next part, or tokens that a model might have made of it."""
        rows = self.twin.naive.rows
        ids = self.some(choose, self.live, self.config.max_batch)
        single = choose.integer(0, 1) == 0
        late = any(rows[i].known < rows[i].length for i in ids)
        known = choose.integer(0, 9) == 0 if late else choose.integer(0, 3) > 0
        tokens: list[int] = []
        counts: list[int] = []
        for i in ids:
            rest = self.rest.get(i, [])
            most = self.config.max_model_len - rows[i].length + (choose.integer(0, 15) == 0)
            most = max(1, min(most, max(len(rest), self.config.block_size + 1)))
            count = 1 if single else choose.integer(1, most)
            counts.append(count)
            tokens += rest[:count] + self.tokens(choose, max(0, count - len(rest)))
        run = choose.integer(0, 5) > 0
        given = None if single else counts
        done = self.twin.append(ids, tokens, given, known=known, run=run)
        if not done and not self.open:  # perhaps one of them fits
            for i in ids:
                token = [*self.rest.get(i, []), 0][:1]
                if done := self.twin.append([i], token, None, known=known, run=run):
                    break
        if done and not run:
            self.twin.rollback()

    def close(self, choose: Choose) -> None:
        rows = self.twin.before
        how = choose.integer(0, 5)
        if how == 0:
            self.twin.rollback()
            return
        lengths = None
        if how == 1:
            pairs = [(len(told.tokens), len(self.twin.told[i].tokens)) for i, told in rows.items()]
            lengths = [choose.integer(least, most) for least, most in pairs]
        self.twin.commit(lengths)
        for i, told in rows.items():
            tokens = self.twin.told[i].tokens
            self.rest[i] = self.rest.get(i, [])[len(tokens) - len(told.tokens) :]
            self.remember(tokens)

    def record(self, choose: Choose) -> None:
        rows, told = self.twin.naive.rows, self.twin.told
        ids = [i for i in self.live if rows[i].known < rows[i].length]
        ids = self.some(choose, ids, 3)
        counts = [choose.integer(1, rows[i].length - rows[i].known) for i in ids]
        pairs = list(zip(ids, counts, strict=True))
        tokens = [t for i, n in pairs for t in told[i].tokens[rows[i].known :][:n]]
        if not ids:
            return
        # A wrong token is refused where it contradicts what a sequence that shares the block said.
        block, offset = divmod(rows[ids[0]].known, self.config.block_size)
        known = rows[ids[0]].tip.path()[block].tokens[offset]
        if known is not None and choose.integer(0, 1) == 0:
            assert not self.twin.record(ids, [known + 1, *tokens[1:]], counts)
        self.twin.record(ids, tokens, counts)

    def fork(self, choose: Choose) -> None:
        i = self.live[choose.integer(0, len(self.live) - 1)]
        for child in self.twin.fork(i, choose.integer(1, 3)):
            self.rest[child] = list(self.rest.get(i, []))

    def reorder(self, choose: Choose) -> None:
        ids = self.some(choose, self.live, 6)
        parents = [choose.integer(0, len(ids) - 1) for _ in ids]
        if not self.open:
            rest = [list(self.rest.get(ids[p], [])) for p in parents]
            self.rest.update(zip(ids, rest, strict=True))
        self.twin.reorder(ids, parents)

    def truncate(self, choose: Choose) -> None:
        ids = self.some(choose, self.live, 3)
        lengths = [choose.integer(0, len(self.twin.told[i].tokens)) for i in ids]
        self.twin.truncate(ids, lengths)

    def release(self, choose: Choose) -> None:
        ids = self.some(choose, self.live, 4)
        reals = self.twin.reals(ids).tolist()
        self.twin.release(ids)
        if not self.open:
            self.released += reals

    def clear(self, choose: Choose) -> None:
        self.twin.clear((None, *SALTS)[choose.integer(0, 3)])

    def ask(self, choose: Choose) -> None:
        ids = self.some(choose, self.live, self.config.max_batch + 1)
        counts = [choose.integer(1, 2 * self.config.block_size) for _ in ids]
        self.twin.ask(ids, None if choose.integer(0, 1) == 0 else counts)

    def stale(self, choose: Choose) -> None:
        if not self.released:
            return
        gone = self.released[choose.integer(0, len(self.released) - 1)]
        real = self.twin.real
        calls = [
            lambda: real.length(gone),
            lambda: real.num_cached(gone),
            lambda: real.block_table(gone),
            lambda: real.num_freed([gone]),
            lambda: real.num_needed([gone]),
        ]
        if not self.open:
            calls += [
                lambda: real.append([gone]),
                lambda: real.fork(gone, 2),
                lambda: real.reorder([gone], [0]),
                lambda: real.truncate([gone], [0]),
                lambda: real.release([gone]),
                lambda: real.record([gone], [0]),
            ]
        with pytest.raises(UnknownSequence):
            calls[choose.integer(0, len(calls) - 1)]()
        self.twin.check()


# Commands, and how often each is drawn. While a step is open most of them are refused.
WHEN_CLOSED = {
    "admit": 6, "append": 12, "create": 3, "fork": 3, "reorder": 3, "truncate": 3, "release": 4,
    "lookup": 3, "record": 3, "ask": 1, "stale": 1, "clear": 1,
}  # fmt: skip
WHEN_OPEN = {
    "close": 8, "append": 1, "create": 1, "fork": 1, "reorder": 1, "truncate": 1, "release": 1,
    "clear": 1, "lookup": 1, "ask": 1, "stale": 1,
}  # fmt: skip
NEED_A_SEQUENCE = {"append", "fork", "reorder", "truncate", "release", "record"}


def small_config(choose: Choose) -> tuple[Config, int]:
    """A config, and how many different tokens there are."""
    block_size = choose.integer(1, 4)
    num_blocks = choose.integer(4, 14) if choose.integer(0, 2) else choose.integer(15, 40)
    watermark = max(0, choose.integer(-3, 2))
    max_model_len = choose.integer(6, 40)
    alphabet = choose.integer(1, 3) if choose.integer(0, 5) else 30
    return Config(num_blocks, block_size, 5, max_model_len, watermark), alphabet


def run_program(seed: int, num_commands: int) -> None:
    choose = Seeded(seed)
    commands = Commands(*small_config(choose))
    for _ in range(num_commands):
        weights = WHEN_OPEN if commands.open else WHEN_CLOSED
        names = [name for name, weight in weights.items() for _ in range(weight)]
        name = names[choose.integer(0, len(names) - 1)]
        if name in NEED_A_SEQUENCE and not commands.live:
            name = "create"
        getattr(commands, name)(choose)


def test_seeded_programs(runs: int, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + runs):
        try:
            run_program(seed, 150)
        except BaseException:
            print(f"run again with --first-seed={seed} --runs=1")
            raise


class Machine(RuleBasedStateMachine):
    """The same commands, chosen and shrunk by hypothesis."""

    commands: Commands

    @initialize(data=st.data())
    def build(self, data: Any) -> None:
        self.commands = Commands(*small_config(Drawn(data)))

    @precondition(lambda self: self.commands.open)
    @rule(data=st.data())
    def refused(self, data: Any) -> None:
        names = [name for name in WHEN_OPEN if name in NEED_A_SEQUENCE and self.commands.live]
        names += ["create", "clear"]
        getattr(self.commands, data.draw(st.sampled_from(names)))(Drawn(data))


def add_rule(name: str, when: Callable[[Commands], bool]) -> None:
    def run(self: Machine, data: Any) -> None:
        getattr(self.commands, name)(Drawn(data))

    run.__name__ = name
    add = precondition(lambda self: when(self.commands))
    setattr(Machine, name, add(rule(data=st.data())(run)))


for command in WHEN_CLOSED:
    if command in NEED_A_SEQUENCE:
        add_rule(command, lambda commands: bool(commands.live) and not commands.open)
    elif command in WHEN_OPEN and command not in ("create", "clear"):
        add_rule(command, lambda commands: True)
    else:
        add_rule(command, lambda commands: not commands.open)
add_rule("close", lambda commands: commands.open)

TestMachine = Machine.TestCase
