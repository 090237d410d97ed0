"""The report on figures that are known, and end to end at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import report


def entry(row: str, median: float, clock: int = 0, per: int = 1, **extra: Any) -> dict[str, Any]:
    return {
        "stats": {"median": median},
        "extra_info": {"row": row, "clock": clock, "per": per, **extra},
    }


RECORD = {
    "machine_info": {"cpu": {"brand_raw": "A CPU", "count": 2}, "python_version": "3.11.0"},
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        *(entry("clock", t) for t in (3e-6, 1e-6, 2e-6)),
        *(entry("decode step, 256 x 2k", t, per=16) for t in (320e-6, 160e-6)),
        entry("beam step, 8 x 2k", 3e-6, clock=1),
        entry("beam step, 8 x 128k", 6e-6, clock=1),
        entry("metadata bytes per block", 1.0, value=136.0),
    ],
}


def test_figures() -> None:
    rows = report.read_rows(RECORD)
    assert rows["decode step, 256 x 2k"] == pytest.approx(10e-6)  # the least, for each call
    assert rows["beam step, 8 x 2k"] == pytest.approx(2e-6)  # without the clock
    found = {f.bar.name: f for f in report.figures(rows)}
    assert found["metadata bytes per block"].value == 136.0
    assert found["beam step, 8 x 128k / beam step, 8 x 2k"].value == pytest.approx(2.5)
    assert found["beam step, 8 x 2k"].ok is True
    assert found["beam step, 8 x 128k"].ok is False
    assert found["clock"].ok is None


def test_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, peers = tmp_path / "bench.json", tmp_path / "peers.json"
    out, figures = tmp_path / "out.md", tmp_path / "out.json"
    measured.write_text(json.dumps(RECORD))
    peers.write_text(json.dumps({"rows": {"beam step, 8 x 2k": {"another": 460.0}}}))
    arguments = [measured, "--peers", peers, "--out", out, "--json", figures]
    report.main([str(argument) for argument in arguments])
    assert out.read_text() == capsys.readouterr().out
    assert "| beam step, 8 x 2k | 2 us | 3.5 | met | " in out.read_text()
    assert "another 460 (230x)" in out.read_text()
    assert "**missed**" in out.read_text()
    assert json.loads(figures.read_text())["machine"]["cpu"] == "A CPU"


def test_transformers_benchmark_at_a_small_size() -> None:
    pytest.importorskip("transformers")
    import bench_transformers as bench

    model = bench.random_llama(layers=1, hidden=64, heads=2, vocab=100)
    result = bench.measure(model, bench.Size(prompt=24, new=3, beams=2, rounds=1))
    assert result.equal == {"paged": True, "prefilled": True, "paged_greedy": True}
    assert set(bench.BARS) <= set(result.ratios())
    assert "| KV peak, beam / dense |" in bench.report(result)
