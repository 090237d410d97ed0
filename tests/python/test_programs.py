"""Random programs on a cache and a simulated device: every byte against what it must be."""

from __future__ import annotations

import random
from typing import Any, Literal

import pagedkv as pk
from hazard_world import LAYOUTS, World
from pagedkv.testing import SimulatedDevice

SCHEDULES: list[Literal["eager", "lazy", "random"]] = ["lazy", "random", "random", "eager"]
REFUSALS = (pk.OutOfBlocks, pk.NotResident, pk.InvalidState, pk.TransferError)


class Program:
    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.lost = False
        self.w = self.make_world(
            seed,
            device_blocks=self.choose.randrange(4, 14),
            host_blocks=self.choose.randrange(1, 14),
            block_size=self.choose.randrange(1, 4),
            layout=LAYOUTS[seed % 2],
            max_model_len=24,
        )
        self.transfers: list[pk.Transfer] = []

    def make_world(self, seed: int, **options: Any) -> World:
        device = SimulatedDevice(
            seed,
            schedule=self.choose.choice(SCHEDULES),
            num_compute_streams=2,
            max_events=self.choose.choice([3, 6, 1000, 1000]),
        )
        return World(device=device, **options)

    def some(self, most: int = 2) -> list[int]:
        ids = list(self.w.texts)
        return self.choose.sample(ids, min(len(ids), self.choose.randrange(1, most + 1)))

    def tokens(self, most: int) -> list[int]:
        return [self.choose.randrange(3) for _ in range(self.choose.randrange(1, most))]

    def create(self) -> None:
        if len(self.w.texts) < 6:
            i = self.w.create(self.tokens(10), self.choose.choice([b"", b"b"]))
            self.w.step({i: self.w.texts[i].rest})

    def fetch(self) -> None:
        if len(self.w.texts) < 6:
            self.w.fetch(self.w.create(self.tokens(10)))

    def step(self) -> None:
        self.w.step({i: self.tokens(4) for i in self.some(3)}, check=self.choose.random() < 0.5)

    def broken_step(self) -> None:
        try:
            with self.w.kv.step(self.some(), counts=None):
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    def fork(self) -> None:
        if len(self.w.texts) < 6:
            for i in self.some(1):
                self.w.fork(i, 2)

    def reorder(self) -> None:
        ids = self.some(3)
        self.w.reorder(ids, [self.choose.randrange(len(ids)) for _ in ids])

    def truncate(self) -> None:
        for i in self.some(1):
            self.w.truncate(i, self.choose.randrange(self.w.kv.length(i) + 1))

    def release(self) -> None:
        self.w.release(*self.some(1))

    def swap_out(self) -> None:
        self.transfers.append(self.w.kv.swap_out(self.some()))

    def swap_in(self) -> None:
        self.transfers.append(self.w.kv.swap_in(self.some()))

    def preempt(self) -> None:
        self.w.kv.preempt(self.some(), self.choose.choice(["auto", "swap", "recompute"]))

    def resume(self) -> None:
        self.w.resume(self.some())

    def cancel(self) -> None:
        for transfer in self.transfers[-2:]:
            transfer.cancel()

    def wait(self) -> None:
        for transfer in self.transfers[-1:]:
            transfer.wait()

    def fail(self) -> None:
        if self.choose.random() < 0.3:
            self.w.device.fail_copy(self.choose.randrange(1, 3))

    def poll(self) -> None:
        self.w.kv.poll()

    def lose(self) -> None:
        if self.choose.random() < 0.1:
            self.w.device.lose()
            self.lost = True

    def stream(self) -> None:
        self.w.device.use_compute_stream(self.choose.randrange(2))

    def run(self) -> None:
        names = """create create fetch step step step broken_step fork reorder truncate release
            swap_out swap_out swap_in swap_in preempt resume resume cancel wait fail poll stream
            lose"""
        with self.w as w:
            for _ in range(self.choose.randrange(5, 45)):
                try:
                    getattr(self, self.choose.choice(names.split()))()
                except REFUSALS:
                    pass
                except pk.DeviceError as error:
                    if not (self.lost and "lost" in str(error)) and not self.may_be_refused(error):
                        raise
                except pk.InvalidSpec as error:
                    if "max_model_len" not in str(error):
                        raise
                w.forget(i for i in list(w.texts) if w.kv.manager.is_dropped(i))
                w.kv.manager.verify()
            if self.choose.random() < 0.7 and not self.lost:
                self.look_at_all()
        self.check_end()

    def may_be_refused(self, error: pk.DeviceError) -> bool:
        return "event" in str(error)

    def check_end(self) -> None:
        assert self.w.all_problems() == []
        assert self.w.device.host_bytes == self.w.device.num_events == 0

    def look_at_all(self) -> None:
        w = self.w
        while True:
            try:
                w.kv.poll()
            except pk.TransferError:
                continue
            if not w.kv.stats().num_transfers:
                break
        w.forget(i for i in w.texts if w.kv.manager.is_dropped(i))
        w.read(*(i for i in w.texts if w.kv.ready([i])))


def run_all(kind: type[Program], runs: int, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + runs):
        try:
            kind(seed).run()
        except BaseException:
            print(f"repeat with --runs=1 --first-seed={seed}")
            raise


def test_random_programs(runs: int, first_seed: int) -> None:
    run_all(Program, runs, first_seed)
