"""A KVCache on a simulated device, and beside it what every sequence must hold.

K and V of a token are a digest of all tokens up to it, so that content which belongs to another
sequence, another position, layer or half is never right by chance. What is found wrong is collected
in `problems`, for tests that want something to go wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.testing import SimulatedDevice  # noqa: E402

NUM_LAYERS = 2
LAYOUTS = ("block_major", "layer_major")


def digest(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(8, "little"), digest_size=64).digest()


def half(layer: int, which: int) -> slice:
    """Where in a digest the layer's keys (0) or values (1) are."""
    return slice(32 * layer + 16 * which, 32 * layer + 16 * which + 16)


@dataclass
class Text:
    """What a sequence must hold, and what is left of its prompt."""

    root: bytes = b""
    tokens: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)

    def copy(self) -> Text:
        return Text(self.root, list(self.tokens), list(self.digests), list(self.rest))

    def grow(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.digests.append(digest(self.digests[-1] if self.digests else self.root, token))

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.digests[length:]

    def hold(self, length: int) -> None:
        """Take so much of the rest as makes `length`, or give back what is beyond it."""
        if length < len(self.tokens):
            self.rest = self.tokens[length:] + self.rest
            self.cut(length)
        more = length - len(self.tokens)
        assert more <= len(self.rest), "more is held than was asked for"
        self.grow(self.rest[:more])
        del self.rest[:more]

    def content(self, layer: int, which: int) -> bytes:
        return b"".join(d[half(layer, which)] for d in self.digests)


class World:
    """The cache and its texts. Commands are the cache's, and keep the texts up to date."""

    def __init__(
        self,
        *,
        device: pk.Device | str | None = None,
        schedule: str = "lazy",
        seed: int = 0,
        num_compute_streams: int = 1,
        device_blocks: int = 8,
        host_blocks: int = 8,
        block_size: int = 2,
        layout: Any = "block_major",
        skip: str | None = None,
        **options: Any,
    ) -> None:
        self.device: Any = device or SimulatedDevice(
            seed, schedule=schedule, num_compute_streams=num_compute_streams
        )
        if skip is not None:
            self.device.skip(skip)
        spec = pk.KVSpec(NUM_LAYERS, 1, 4, "float32", block_size)
        self.kv = pk.KVCache(
            spec,
            device=self.device,
            num_device_blocks=device_blocks,
            num_host_blocks=host_blocks or None,
            layout=layout,
            **options,
        )
        self.texts: dict[int, Text] = {}
        self.problems: list[str] = []

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kv.close()

    # ---- commands

    def create(self, prompt: Sequence[int], salt: bytes = b"") -> int:
        """A sequence that holds what create() finds of the prompt; the rest is to be stepped."""
        i = self.kv.create(list(prompt), salt=salt)
        self.texts[i] = Text(root=salt, rest=list(prompt))
        self.texts[i].hold(self.kv.length(i))
        return i

    def step(self, appended: dict[int, list[int]], check: bool = False) -> None:
        """Append to sequences, and write K and V of the new tokens."""
        ids = list(appended)
        tokens = [token for i in ids for token in appended[i]]
        with self.kv.step(ids, tokens, counts=[len(appended[i]) for i in ids]) as step:
            new = {i: self.appended(i, appended[i]) for i in ids}
            self.write(step, [d for i in ids for d in new[i].digests[-len(appended[i]) :]])
            if check:
                self.compare(step, [new[i] for i in ids])
        self.texts.update(new)

    def appended(self, i: int, tokens: list[int]) -> Text:
        text = self.texts[i].copy()
        if text.rest[: len(tokens)] != tokens:
            text.rest = []
        del text.rest[: len(tokens)]
        text.grow(tokens)
        return text

    def write(self, step: Any, digests: list[bytes]) -> None:
        values = np.frombuffer(b"".join(digests), np.float32).reshape(-1, NUM_LAYERS, 2, 1, 4)
        kv = torch.from_numpy(values.copy())
        if self.kv.device.type == "cuda":  # a copy from other memory waits for all before it
            kv = kv.pin_memory().to(self.kv.device, non_blocking=True)
        for layer in range(NUM_LAYERS):
            self.kv.write(layer, kv[:, layer, 0], kv[:, layer, 1], step)

    def admit(self, prompt: Sequence[int], salt: bytes = b"") -> int:
        """A sequence that holds all of the prompt."""
        i = self.create(prompt, salt)
        self.step({i: self.texts[i].rest})
        return i

    def fork(self, i: int, n: int) -> list[int]:
        ids = [int(x) for x in self.kv.fork(i, n)]
        for new in ids[1:]:
            self.texts[new] = self.texts[i].copy()
        return ids

    def reorder(self, ids: list[int], parents: list[int]) -> None:
        self.kv.reorder(ids, parents)
        self.texts.update({i: self.texts[ids[p]].copy() for i, p in zip(ids, parents, strict=True)})

    def truncate(self, i: int, length: int) -> None:
        self.kv.truncate([i], [length])
        if length < len(self.texts[i].tokens):
            self.texts[i].cut(length)
            self.texts[i].rest = []

    def release(self, *ids: int) -> None:
        self.kv.release(list(ids))
        for i in ids:
            del self.texts[i]

    def fetch(self, i: int) -> Any:
        transfer = self.kv.fetch(i)
        self.texts[i].hold(self.kv.length(i))
        return transfer

    def resume(self, ids: list[int]) -> None:
        for i, length in zip(ids, self.kv.resume(ids).tolist(), strict=True):
            self.texts[i].hold(length)

    def forget(self, ids: Iterable[int]) -> None:
        """These sequences were dropped: they hold nothing until they are resumed."""
        for i in ids:
            if i in self.texts:
                self.texts[i].hold(0)

    def overwrite(self) -> None:
        """Give every device block that is free or cached to others, who write it, and go."""
        tier = self.kv.stats().device
        room = (tier.num_free + tier.num_cached) * self.kv.spec.block_size
        self.release(self.admit(range(10**6, 10**6 + room), b"others"))
        self.kv.clear(b"others")

    def admit_on_host(self, prompt: Sequence[int]) -> int:
        """A sequence that the host tier alone has."""
        i = self.admit(prompt)
        self.kv.swap_out([i]).wait()
        self.overwrite()
        return i

    # ---- looking

    def read(self, *ids: int) -> None:
        """Compare all that these resident sequences hold with what they must hold."""
        with self.kv.step([]):
            for i in ids:
                text = self.texts[i]
                assert self.kv.length(i) == len(text.tokens)
                table = torch.from_numpy(self.kv.manager.block_table(i)[None]).to(self.kv.device)
                length = len(text.tokens)
                lens = torch.tensor([length], dtype=torch.int32, device=self.kv.device)
                for layer in range(NUM_LAYERS):
                    halves = self.kv.gather_blocks(layer, table, 0, lens, length)
                    self.compare_row(layer, halves, 0, text, f"sequence {i}")

    def compare(self, step: Any, texts: list[Text]) -> None:
        """What kv.gather finds in a step that is open, with all that was written."""
        assert step.seq_lens.tolist() == [len(text.tokens) for text in texts]
        for layer in range(NUM_LAYERS):
            halves = self.kv.gather(layer, step)
            for row, text in enumerate(texts):
                self.compare_row(layer, halves, row, text, f"row {row} of a step")

    def compare_row(
        self, layer: int, halves: tuple[Any, Any], row: int, text: Text, name: str
    ) -> None:
        n = len(text.tokens)
        for which, found in enumerate(halves):
            if found[row, 0, :n].cpu().numpy().tobytes() != text.content(layer, which):
                self.problems.append(f"{name}: wrong {'KV'[which]} in layer {layer}")

    def all_problems(self) -> list[str]:
        return self.problems + list(self.device.violations)

    def settle(self) -> None:
        """Let every transfer end; then look at all that is resident."""
        while self.kv.stats().num_transfers:
            self.kv.poll()
        self.kv.manager.verify()
        self.read(*(i for i in self.texts if self.kv.ready([i])))


Scenario = Callable[[World], None]


def holds(scenario: Scenario, *, without: str | None = None, **options: Any) -> None:
    """The scenario goes well under every schedule and in both layouts.

    And it can go wrong: where the lazy device leaves out the fence `without`, something does.
    """
    for layout in LAYOUTS:
        for schedule, seed in [("eager", 0), ("lazy", 0), *(("random", s) for s in range(5))]:
            with World(layout=layout, schedule=schedule, seed=seed, **options) as world:
                scenario(world)
                world.settle()
            assert world.all_problems() == [], f"{layout}, {schedule} {seed}"
            assert world.device.host_bytes == world.device.num_pending == 0
            assert world.device.num_events == 0
    if without is not None:
        with World(skip=without, **options) as world:
            scenario(world)
            world.settle()
        assert world.all_problems(), f"nothing notices that {without} is missing"
