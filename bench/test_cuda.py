"""bench_cuda.py runs, on any machine; what it would say of a worse run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import bench_cuda

SCRIPT = Path(bench_cuda.__file__)


def test_it_runs_and_writes_its_report(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads((tmp_path / "cuda.json").read_text())
    assert len(record["figures"]) == 17
    for figure in record["figures"]:
        assert figure["name"] in done.stdout
        assert figure["name"] in (tmp_path / "cuda.md").read_text()
    assert record["machine"]["date"]


def test_a_ratio_that_is_more_than_a_tenth_worse_is_told(tmp_path: Path) -> None:
    baseline = tmp_path / "cuda.json"
    before = [{"name": "a", "value": 1.0}, {"name": "b", "value": 1.0}]
    baseline.write_text(json.dumps({"figures": before}))
    now = [bench_cuda.Figure("a", 1.09), bench_cuda.Figure("b", 1.2), bench_cuda.Figure("c", 9.0)]
    found = bench_cuda.worse(now, baseline)
    assert len(found) == 1
    assert found[0].startswith("b: 1.200, and 1.000")
