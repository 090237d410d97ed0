"""The examples of docs/planner.md and of the README are what the command prints."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import pagedkv as pk
from pagedkv.cli import app

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def examples(text: str) -> list[tuple[str, list[str]]]:
    """(arguments, lines of output) of each block that runs `pagedkv plan`."""
    found = re.findall(r"```console\n\$ pagedkv plan (.*)\n((?:.*\n)*?)```", text)
    return [(arguments, output.splitlines()) for arguments, output in found]


def test_each_text_has_its_examples() -> None:
    assert len(examples(DOCS)) == 10
    assert len(examples(README)) == 1


@pytest.mark.parametrize(
    ("arguments", "lines"), examples(DOCS) + examples(README), ids=lambda x: str(x)[:40]
)
def test_the_output_is_real(arguments: str, lines: list[str]) -> None:
    """Every line of the example is printed, in this order; "..." stands for lines left out."""
    result = CliRunner().invoke(app, ["plan", *arguments.split()])
    assert result.exit_code == (1 if any("DOES NOT FIT" in line for line in lines) else 0)
    printed = iter([line.rstrip() for line in result.stdout.splitlines()])
    for line in lines:
        if line != "...":
            assert line.rstrip() in printed, line  # which also moves on to behind it


def test_the_python_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(code, "planner.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("True 2")


def test_the_command_takes_what_plan_memory_takes() -> None:
    options = {o.name for o in get_command(app).commands["plan"].params}  # type: ignore[attr-defined]
    assert options - {"as_json", "plot"} == set(inspect.signature(pk.plan_memory).parameters)
