"""What the project says in one place and does in another: commands, versions, scripts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.sh"))


def read(file: str) -> str:
    """The text of a file; a test of one that an sdist leaves out is skipped there."""
    if not (ROOT / file).is_file():
        pytest.skip(f"no {file} here")
    return (ROOT / file).read_text()


def commands() -> list[str]:
    return re.findall(r"```sh\n(.*?)\n```", read("README.md"), re.DOTALL)


def test_the_readme_sets_up_with_two_commands() -> None:
    demo, tests = commands()
    assert demo.endswith("'.[demo]' && .venv/bin/pagedkv demo")
    assert tests.endswith("'.[demo,test]' && .venv/bin/pytest")
    for command in (demo, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints")


def test_the_tests_of_the_readme_are_run_as_it_says() -> None:
    read("scripts/test_readme.sh")
    assert "stage readme scripts/test_readme.sh\n" in read(".ci/run")
    run = subprocess.run(
        [ROOT / "scripts" / "test_readme.sh", "--print"], capture_output=True, text=True, check=True
    )
    assert run.stdout.rstrip("\n") == commands()[1]


@pytest.mark.parametrize("tool", ["ruff", "clang-format", "mypy"])
def test_hooks_have_the_pinned_versions(tool: str) -> None:
    pin = rf"\b{tool}==([\w.]+)"
    pinned = re.findall(pin, read("constraints.txt"))
    assert len(pinned) == 1
    assert set(re.findall(pin, read(".pre-commit-config.yaml"))) == set(pinned)


def test_every_script_is_explained_and_every_check_is_run() -> None:
    explained = read("CONTRIBUTING.md")
    assert [s for s in SCRIPTS if f"`{s}" not in explained and s != "lib.sh"] == []
    stages = read(".ci/run")
    checks = [s for s in SCRIPTS if s.startswith(("test_", "check_", "fuzz"))]
    assert [s for s in checks if f" scripts/{s}" not in stages] == []


def test_the_changelog_has_this_version() -> None:
    version = re.findall(r'^version = "(.*)"', read("pyproject.toml"), re.MULTILINE)[0]
    assert f"\n## [{version}]" in read("CHANGELOG.md")
