"""The attention benchmark runs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import bench_attention


def test_each_case_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    bench_attention.main(["--small"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(bench_attention.SMALL)
    assert "2 beams 1 to 40, 4/2 heads of 16, bfloat16" in rows[1]
    assert "2 x 1 to 40, 4/2 heads of 16, bfloat16, padded" in rows[2]
