"""The package as a user meets it: import, version, errors, the command line, the CUDA module."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pagedkv
from pagedkv import cli, errors
from pagedkv.info import collect


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagedkv", *arguments], capture_output=True, text=True, check=False
    )


# A finder that hides packages, as on a machine without them.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""


def test_import_loads_neither_numpy_nor_torch() -> None:
    """Nor typing, which takes longer than all the rest (what the start-up loads does not count)."""
    heavy = "{'numpy', 'torch', 'transformers', 'typer', 'rich', 'typing'}"
    run = python(
        "import sys; before = set(sys.modules); import pagedkv;"
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_info_loads_neither_numpy_nor_torch() -> None:
    heavy = "{'numpy', 'torch', 'transformers'}"
    run = python(
        "import sys; from pagedkv.info import collect; collect();"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_control_plane_and_spec_need_no_torch() -> None:
    run = python(
        HIDE.format(hidden=["torch", "transformers"])
        + "import pagedkv as pk\n"
        + "m = pk.BlockManager(8)\n"
        + "s = m.create([1, 2, 3])\n"
        + "m.commit(m.append([s], [1]))\n"
        + "spec = pk.KVSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype='float16')\n"
        + "print(m.length(s), m.stats().num_sequences)"
    )
    assert run.stdout.split() == ["1", "1"], run.stderr


@pytest.mark.parametrize("name", ["KVCache", "PagedCache", "Step"])
def test_what_needs_torch_says_which_extra_is_missing(name: str) -> None:
    run = python(
        HIDE.format(hidden=["torch"])
        + f"import pagedkv\ntry: pagedkv.{name}\nexcept ImportError as e: print(e)"
    )
    assert "pip install 'pagedkv[torch]'" in run.stdout, run.stderr


def test_paged_cache_says_that_transformers_is_missing() -> None:
    pytest.importorskip("torch")
    run = python(
        HIDE.format(hidden=["transformers"])
        + "import pagedkv\ntry: pagedkv.PagedCache\nexcept ImportError as e: print(e)"
    )
    assert "pip install 'pagedkv[transformers]'" in run.stdout, run.stderr


def test_all_names_are_there() -> None:
    pytest.importorskip("transformers")
    assert [name for name in pagedkv.__all__ if getattr(pagedkv, name, None) is None] == []
    assert dir(pagedkv) == sorted(pagedkv.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'KVCash'"):
        pagedkv.KVCash  # noqa: B018


def test_version_is_the_metadata_version() -> None:
    assert pagedkv.__version__ == importlib.metadata.version("pagedkv")


def test_types_are_shipped() -> None:
    folder = Path(pagedkv.__file__).parent
    assert [f for f in ("py.typed", "_core.pyi", "_cuda.pyi") if not (folder / f).is_file()] == []


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_exported_and_a_kverror(name: str) -> None:
    error = getattr(pagedkv, name)
    assert error is getattr(errors, name)
    assert issubclass(error, errors.KVError)


@pytest.mark.parametrize(
    ("error", "base"),
    [
        ("UnknownSequence", KeyError),
        ("InvalidSpec", ValueError),
        ("InvalidState", RuntimeError),
        ("ConcurrentUse", RuntimeError),
        ("DeviceError", RuntimeError),
        ("BrokenInvariant", RuntimeError),
    ],
)
def test_errors_are_python_errors_too(error: str, base: type[Exception]) -> None:
    assert issubclass(getattr(pagedkv, error), base)


def test_out_of_blocks_tells_what_to_do_and_pickles() -> None:
    manager = pagedkv.BlockManager(2, block_size=4)
    sequence = manager.create(list(range(8)))
    manager.commit(manager.append([sequence], list(range(8)), counts=[8]))
    with pytest.raises(pagedkv.OutOfBlocks, match="release or preempt") as caught:
        manager.append([manager.create()], counts=[1])
    error = caught.value
    assert (error.tier, error.needed, error.available) == ("device", 1, 0)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.tier, copy.needed, copy.available, str(copy)) == ("device", 1, 0, str(error))


def test_the_command_line_says_its_version() -> None:
    run = command("--version")
    assert (run.returncode, run.stdout) == (0, f"pagedkv {pagedkv.__version__}\n")
    assert "KV-cache block manager" in command("--help").stdout


def test_info_prints_a_table() -> None:
    run = command("info")
    assert run.returncode == 0, run.stderr
    for word in (pagedkv.__version__, "_core", "_cuda", "numpy", "torch", "transformers", "C++20"):
        assert word in run.stdout


def test_info_prints_json() -> None:
    run = command("info", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["pagedkv"] == pagedkv.__version__
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert found["cuda"]["built"] == cuda_is_built()
    assert (found["cuda"]["status"] == "ok") == (found["cuda"]["devices"] != [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inform"], "No such command"),
        (["info", "--yaml"], "No such option"),
        (["demo", "--out", "no-such-folder/tree.png"], "no-such-folder"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    run = command(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "plan --model Llama-3-8B --gpu A100-80GB",
        "plan --model Llama-3-8B --gpu A100-80GB --json",
        "simulate --trace synthetic:alpaca --num-requests 20 --policy paged",
        "info",
        "--help",
    ],
)
def test_output_that_nobody_reads_on_ends_as_sigpipe_does(arguments: str) -> None:
    """Not as 1, which would say that a load does not fit. A shell makes it 141."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "pagedkv", *arguments.split()]
    with os.fdopen(writer, "wb") as stdout:
        run = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (run.returncode, run.stderr) == (-signal.SIGPIPE, b"")


def test_messages_that_nobody_reads_on_end_as_sigpipe_does() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = "plan --model Llama-3-8B --gpu nosuch"
    words = [sys.executable, "-m", "pagedkv", *arguments.split()]
    with os.fdopen(writer, "wb") as stderr:
        run = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=stderr, check=False)
    assert run.returncode == -signal.SIGPIPE


def test_a_connection_that_breaks_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours:
            ours.send(b"for nobody")

    monkeypatch.setattr(cli, "app", breaks)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2  # as any OSError


def test_main_leaves_sigpipe_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pagedkv", "info", "--json"])
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGPIPE) == before


def test_an_error_of_pagedkv_is_a_message_and_exit_code_2() -> None:
    run = python(
        "import sys; from pagedkv import cli\n"
        "def collect(): raise cli.KVError('say this')\n"
        "cli.collect = collect; sys.argv = ['pagedkv', 'info']; cli.main()"
    )
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "pagedkv: say this\n")


def test_the_demo_says_which_extra_is_missing() -> None:
    run = python(
        HIDE.format(hidden=["torch", "transformers", "matplotlib"])
        + "from pagedkv.cli import main; sys.argv = ['pagedkv', 'demo', '--model', 'tiny']; main()"
    )
    assert run.returncode == 2
    assert "pip install 'pagedkv[demo]'" in run.stderr
    assert "Traceback" not in run.stderr


def cuda_is_built() -> bool:
    return importlib.util.find_spec("pagedkv._cuda") is not None


@pytest.mark.skipif(not cuda_is_built(), reason="built without the _cuda module")
def test_cuda_answers_with_and_without_a_driver() -> None:
    cuda = importlib.import_module("pagedkv._cuda")
    assert cuda.runtime_version() >= 11000
    if cuda.driver_version() == 0:
        assert cuda.devices() == []
        assert cuda.status() != "ok"
    else:
        for index, device in enumerate(cuda.devices()):
            assert device["index"] == index
            assert device["total_bytes"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not collect().cuda.devices, reason="no CUDA device, or built without _cuda")
def test_cuda_and_torch_see_the_same_devices() -> None:
    torch = pytest.importorskip("torch")
    cuda = importlib.import_module("pagedkv._cuda")
    assert [d["name"] for d in cuda.devices()] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]


def test_the_package_has_the_example_that_the_demo_runs() -> None:
    """Where the package was built from this tree as it is; a later edit asks for a new install."""
    found = importlib.util.find_spec("pagedkv._example_engine")
    assert found is not None
    assert found.origin is not None
    source = Path(__file__).parents[2] / "examples" / "engine.py"
    assert Path(found.origin).read_text() == source.read_text()
