"""The README's Python blocks run, and its commands are the ones that the project uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_one_block_for_each_user() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = BLOCKS[number]
    for needed in ("torch", "transformers"):
        if f"import {needed}" in code or f"from {needed}" in code:
            pytest.importorskip(needed)
    exec(compile(code, f"{README.name}, block {number}", "exec"), {})
    printed = capsys.readouterr().out
    if "num_hit_tokens" in code:
        assert printed.splitlines()[-1] == "39"
    if "salt=" in code:
        assert "PrefixHit(num_tokens=96, num_full_blocks=6, num_partial_tokens=0" in printed
