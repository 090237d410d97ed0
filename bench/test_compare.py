"""compare.py without its peers: the work at a small size, its arithmetic, and what it says."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import compare
import compare_report
import workloads
from drive_floor import Floor
from drive_pagedkv import PagedKV
from workloads import SIZES, WORKLOADS, Driver

RESULTS = compare.BENCH / "results"


@pytest.mark.parametrize("workload", list(WORKLOADS))
@pytest.mark.parametrize("driver", [PagedKV(), Floor()], ids=["pagedkv", "floor"])
def test_work_at_a_small_size(workload: str, driver: Driver) -> None:
    assert not driver.cannot
    try:
        values = WORKLOADS[workload].run(driver, SIZES["small"])
    except workloads.NotSeen:
        assert workload == "resident"  # what a process grows by is its allocator's to say
        return
    assert values
    assert all(math.isfinite(value) for value in values)
    assert min(values) >= 0
    if isinstance(driver, PagedKV):
        driver.m.verify()


def test_the_work_is_what_it_says() -> None:
    """Hits, evictions and copies really happen, and the trace shares prefixes."""
    driver, small = PagedKV(), SIZES["small"]
    WORKLOADS["hit"].run(driver, small)
    stats = driver.m.stats()
    admissions = 2 + 1 + 2 * small.rounds
    assert stats.num_hit_tokens == 1536 * (admissions - 1)
    WORKLOADS["admit"].run(driver, small)
    assert driver.m.stats().num_hit_tokens == 0
    WORKLOADS["evict"].run(driver, small)
    assert driver.m.stats().num_evicted_blocks >= 128 * 2 * small.rounds
    WORKLOADS["beam"].run(driver, small)
    assert driver.m.stats().num_copies == 8 * (1 + 2 * small.rounds)
    WORKLOADS["trace"].run(driver, small)
    assert driver.m.stats().num_hit_tokens > 0


def test_a_driver_is_a_script_that_prints_json() -> None:
    system = compare.System("floor", "drive_floor.py")
    assert len(compare.measure(system, "admit", "small")["values"]) == 2 * SIZES["small"].rounds


def test_a_driver_says_what_it_cannot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(Floor):
        cannot = {"beam": "has no fork"}  # noqa: RUF012

    monkeypatch.setattr(sys, "argv", ["drive", "beam"])
    workloads.main(Unable())
    assert json.loads(capsys.readouterr().out) == {"cannot": "has no fork"}


def test_a_swap_out_finds_nothing_left_on_the_host() -> None:
    told: list[str] = []

    class Telling(Floor):
        def before_swap(self) -> None:
            told.append("before")

        def swap(self, handle: Any) -> Any:
            return lambda: told.append("out"), lambda: told.append("in")

    for workload in ("swap_out", "swap_in"):
        WORKLOADS[workload].run(Telling(), SIZES["small"])
        assert told == ["before", "out", "in"] * (1 + SIZES["small"].rounds)
        told.clear()


PEERS = [
    (system, workload)
    for system in compare.MANAGERS
    for workload in ("decode", "evict", "swap_out", "swap_in", "trace")
    if system.packages
]


@pytest.mark.parametrize(
    ("system", "workload"), PEERS, ids=[f"{s.name}-{workload}" for s, workload in PEERS]
)
def test_a_peer_does_the_work(system: compare.System, workload: str) -> None:
    """Its driver raises where the work was not done."""
    if not (system.folder / "packages.txt").is_file():
        pytest.skip(f"{system.packages[0]} is not installed into {system.folder}")
    found = compare.measure(system, workload, "small")
    assert min(found.get("values", [0])) > 0, found


def test_a_decode_step_of_sglang_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the call of its scheduler, once a right one and once a wrong one."""
    torch = pytest.importorskip("torch")
    allocation = ModuleType("sglang.srt.mem_cache.allocation")

    def allocate(batch: Any, tokens: int) -> Any:
        slots = torch.tensor(given.pop())
        batch.req_to_token_pool.write((batch.req_pool_indices, batch.seq_lens), slots.int())
        return slots

    monkeypatch.setitem(sys.modules, allocation.__name__, allocation)
    monkeypatch.setattr(allocation, "alloc_for_decode_default", allocate, raising=False)
    monkeypatch.delitem(sys.modules, "sglang_batch", raising=False)
    from sglang_batch import Batch, Request, Rows

    rows = Rows(2)
    batch = Batch([Request(3), Request(16)], [1, 2], rows, None)
    rows.write((1, slice(0, 3)), torch.arange(32, 35))
    rows.write((2, slice(0, 16)), torch.arange(64, 80))
    given = [[36, 96], [35, 128]]  # the second step leaves its blocks
    batch.check(batch.advance(9))
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [4, 17]
    assert rows.req_to_token[[1, 2], [3, 16]].tolist() == [35, 128]
    assert [list(request.output_ids) for request in batch.reqs] == [[9], [9]]
    with pytest.raises(AssertionError, match="did not give every row its slot"):
        batch.check(batch.advance(9))


def test_what_a_destructor_raises_fails_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        def __del__(self) -> None:
            raise AssertionError("not drained")

    class Careless(Floor):
        def admit(self, prompt: Any) -> Any:
            Held()
            return super().admit(prompt)

    monkeypatch.setattr(sys, "argv", ["drive", "admit", "--size", "small"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
    with pytest.raises(RuntimeError, match=r"times in a destructor: AssertionError.*not drained"):
        workloads.main(Careless())


def rounds_of(*values: tuple[float, float]) -> list[dict[str, dict[str, Any]]]:
    return [
        {"pagedkv": {"values": [ours]}, "peer": {"values": [theirs]}} for ours, theirs in values
    ]


SYSTEMS = (compare.System("pagedkv", ""), compare.System("peer", ""))


def test_a_ratio_is_the_median_of_those_within_rounds() -> None:
    ours, peer = compare.summary(SYSTEMS, rounds_of((1, 10), (10, 20), (2, 40)), 1e3)
    assert (ours["value"], ours["ratio"]) == (2e3, 1)
    assert (peer["value"], peer["ratio"]) == (20e3, 10)  # of 10, 2 and 20; not 20 / 2
    assert peer["same_tokens"]


def test_what_has_no_figure_says_why() -> None:
    rounds = rounds_of((1, 2))
    rounds[0]["peer"] = {"cannot": "has no fork"}
    assert compare.summary(SYSTEMS, rounds, 1)[1]["why"] == "cannot: has no fork"
    rounds[0]["peer"] = {"failed": "ImportError: x"}
    assert compare.summary(SYSTEMS, rounds, 1)[1]["why"] == "not run: ImportError: x"
    rounds = rounds_of((1, 2))
    rounds[0]["pagedkv"] = {"failed": "broken"}
    ours, peer = compare.summary(SYSTEMS, rounds, 1)
    assert ours["why"] == "not run: broken"
    assert peer["value"] == 2
    assert "ratio" not in peer


def test_other_tokens_are_told() -> None:
    rounds = rounds_of((1, 2))
    rounds[0]["pagedkv"]["tokens"], rounds[0]["peer"]["tokens"] = [1, 2], [1, 3]
    peer = compare.summary(SYSTEMS, rounds, 1)[1]
    assert not peer["same_tokens"]
    assert compare_report.verdict(peer) == "**other tokens**"


RECORD = {
    "machine": {"cpu": "A", "cores": 2, "python": "3.11", "date": "2026-01-02", "commit": "abc"},
    "size": "full",
    "rounds": 3,
    "systems": [{"name": "peer", "packages": ["peer==1.0"]}],
    "rows": [
        {
            "work": "beam step",
            "unit": "us",
            "what": "eight rows",
            "figures": [
                {"system": "pagedkv", "floor": False, "value": 2.0, "ratio": 1.0},
                {"system": "peer", "floor": False, "value": 460.0, "ratio": 230.0},
                {"system": "slow|peer", "floor": False, "why": "not run: a | b"},
                {"system": "ahead", "floor": False, "value": 1.0, "ratio": 0.5},
                {"system": "a list", "floor": True, "value": 0.2, "ratio": 0.1},
            ],
        }
    ],
}


def test_the_table() -> None:
    lines = compare_report.markdown(RECORD).splitlines()
    assert lines[0] == "A, 2 cores, Python 3.11, 2026-01-02, commit abc"
    assert "| **beam step**: eight rows | pagedkv | 2 us |  |  |" in lines
    assert "|  | peer | 460 us | 230x |  |" in lines
    assert "|  | ahead | 1 us | 0.5x | **we are behind** |" in lines
    assert "|  | *floor: a list* | 0.2 us | 0.1x |  |" in lines
    assert any("not run: a / b" in line for line in lines)
    assert lines[-1] == "Medians of 3 round(s). From PyPI: peer: peer==1.0."


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare_report.draw(RECORD, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results")
def test_the_results_are_of_one_record() -> None:
    record = json.loads((RESULTS / "compare.json").read_text())
    assert compare_report.markdown(record) == (RESULTS / "compare.md").read_text()
    assert {work.name for work in WORKLOADS.values()} <= {row["work"] for row in record["rows"]}
    systems = {s.name for s in compare.MANAGERS}
    for row in record["rows"][: len(WORKLOADS)]:
        assert {figure["system"] for figure in row["figures"]} == systems


def test_a_peer_that_cannot_be_installed_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    absent = compare.System("absent", "drive_floor.py", ("there-is-no-such-peer==1.0",))
    monkeypatch.setattr(compare, "MANAGERS", (compare.MANAGERS[0], absent))
    options = argparse.Namespace(
        quick=True, model=None, only=[], work=["admit"], rounds=1, size="small"
    )
    (record,) = compare.compare(options)
    ours, theirs = record["rows"][0]["figures"]
    assert ours["value"] > 0
    assert theirs["why"].startswith("not run: there-is-no-such-peer==1.0: ERROR: ")
    assert theirs["why"] in compare_report.markdown(record)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("raise ImportError('no module vllm')", "ImportError: no module vllm"),
        ("print('hello')", "printed 'hello'"),
        ("pass", "printed 'it said nothing'"),
        ("import time; time.sleep(60)", "more than 3 s"),
    ],
)
def test_a_driver_that_fails_says_why(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "drive_bad.py").write_text(script)
    monkeypatch.setattr(compare, "BENCH", tmp_path)
    found = compare.measure(compare.System("bad", "drive_bad.py"), "admit", "small", timeout=3)
    assert found == {"failed": why}


def test_the_command_writes_all_three_and_draws_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = str(compare.BENCH / "compare.py")
    command = [sys.executable, script, "--quick", "--out", str(tmp_path)]
    command += ["--only", "pagedkv", "--work", "admit"]
    subprocess.run(command, check=True, capture_output=True)
    names = ["compare.json", "compare.md", "compare.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    before = (tmp_path / "compare.md").read_text()
    assert "no figures to compare by" in before
    subprocess.run([*command, "--redraw"], check=True, capture_output=True)
    assert (tmp_path / "compare.md").read_text() == before


@pytest.mark.parametrize("beams", [1, 4])
def test_caches_give_the_same_tokens(beams: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import drive_transformers
    from bench_transformers import random_llama

    model = random_llama(layers=1, hidden=64, heads=2, vocab=100)
    config = transformers.GenerationConfig(
        max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompt = torch.arange(3, 27)[None]
    dense = drive_transformers.dense(model, prompt, config)
    assert len(dense) == 28
    assert drive_transformers.paged(model, prompt, config) == dense


def test_what_is_left_out_can_be_imported_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import left_out

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    left_out.leave_out("surely_absent.server")
    left_out.bare_package("surely_absent", "nowhere")
    from surely_absent.server.http import App, serve

    class Mine(App):
        pass

    assert Mine(1, key=2).anything(3).more is not None
    assert isinstance(serve(), left_out.Nothing)
    with pytest.raises(ImportError):
        import surely_absent.other  # noqa: F401
