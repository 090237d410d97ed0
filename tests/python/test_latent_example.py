"""examples/latent.py: attention off latents gives the tokens of generate()."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "latent.py"


def test_it_runs_alone() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--tokens", "24"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "The tokens are those of generate(): True." in run.stdout
    assert "Bytes per token: 480; keys and values of all heads: 3840." in run.stdout
    assert "that were there: 86 of 87." in run.stdout
