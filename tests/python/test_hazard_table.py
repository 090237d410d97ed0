"""docs/hazards.md names every hazard, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "hazards.md").read_text()
ROWS = dict(re.findall(r"^\| (\d+) \|(.*)$", TABLE, re.MULTILINE))
SOURCES = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
TESTS = set(re.findall(r"^def (test_hazard_\w+)", SOURCES, re.MULTILINE))


def test_every_hazard_has_a_row() -> None:
    assert [int(n) for n in ROWS] == list(range(1, 47))


def test_every_row_names_its_tests_and_every_test_is_in_its_row() -> None:
    for number, row in ROWS.items():
        named = set(re.findall(r"test_hazard_\w+", row))
        assert named == {t for t in TESTS if t.startswith(f"test_hazard_{int(number):02}_")}
        assert named, f"hazard {number} has no test"
    assert set(re.findall(r"test_hazard_\w+", TABLE)) == TESTS
