"""The model of a plan: from a name, a config.json, a folder, a hub id or a config object."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pagedkv.config import ModelConfig
from pagedkv.errors import InvalidSpec
from pagedkv.planner.catalog import find_model, similar_models
from pagedkv.planner.families import FAMILIES
from pagedkv.spec import KVSpec

__all__ = ["Checkpoint", "Model", "load_model"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What the safetensors files of a folder say of themselves.

    Attributes:
        num_bytes: bytes of all tensors.
        num_elements: elements of all tensors, where their headers were read: packed ones of a
            quantised model among them. None if there is only an index.
    """

    num_bytes: int
    num_elements: int | None = None


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        name: as given, or as the catalog spells it.
        source: where its facts are from.
        config: its fields.
        checkpoint: its weights' size, if there are files.
        notes: what was taken from class defaults, or left out.
        assumptions: what was guessed; `strict` refuses these.
    """

    name: str
    source: str
    config: ModelConfig
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def max_model_len(self) -> int | None:
        """Tokens that the model was made for, or stretched to.

        YaRN stretches what was trained; "llama3" and "longrope" configs have stretched it already.
        None if the config has no such field, as with ALiBi or recurrent models.
        """
        config = self.config
        if config.get("max_position_embeddings") is None:
            return None
        length = config.number("max_position_embeddings")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        factor = rope.get("factor") if isinstance(rope, dict) else None
        if factor is None or kind not in ("yarn", "linear", "dynamic"):
            return length
        trained = rope.get("original_max_position_embeddings")
        for name, value in (("factor", factor), ("original_max_position_embeddings", trained)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < 1e9):
                raise InvalidSpec(
                    f"rope_scaling.{name} is {value!r} in the config, expected a positive number"
                )
        if trained is None:
            return max(1, int(length * factor))
        return max(length, int(trained * factor))


def load_model(model: Any) -> Model:
    """Find a model's config.

    `model`: a name of the catalog, the path of a config.json or of a folder that has one, a hub id
    ("owner/name": needs huggingface_hub and the network, unless the catalog knows it), the dict of
    a config.json, or a transformers config object.

    Raises:
        InvalidSpec: there is no such model, or its file is no config.
    """
    if isinstance(model, Path):
        return _from_path(model)
    if not isinstance(model, str):
        return _model(str(getattr(model, "name_or_path", "") or "config"), "given", model)
    if Path(model).exists():
        return _from_path(Path(model))
    known = find_model(model)
    if known is not None:
        return _model(known[0], "built-in facts", known[1])
    if model.endswith(".json") or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise InvalidSpec(f"model is {model!r}, and there is no such file or folder")
    if _HUB_ID.fullmatch(model):
        return _from_hub(model)
    similar = ", ".join(similar_models(model))
    raise InvalidSpec(
        f"model is {model!r}, expected a known name{f' such as {similar}' if similar else ''}, a "
        "config.json, a folder with one, or a hub id such as Qwen/Qwen3-8B"
    )


def _model(name: str, source: str, config: Any, checkpoint: Checkpoint | None = None) -> Model:
    found = ModelConfig.read(config)
    spec = KVSpec.from_config(found)  # what the config lacks is said before anything else
    if not (spec.token_bytes or spec.state_bytes):
        raise InvalidSpec("no layer of the config keeps anything, expected one with attention")
    notes = [
        f"{field} is not in the config: {found.defaults[field]!r}, the default of "
        f"{found.model_type}, is taken"
        for field in ("num_attention_heads", "vocab_size", "intermediate_size")
        if field in found.defaults and found.get(field) == found.defaults[field]
        and not any(field == key for key in found.fields) and _is_default(found, field)
    ]  # fmt: skip
    if found.towers and checkpoint is None:
        notes.append(f"the weights of {', '.join(found.towers)} are not counted")
    assumptions = []
    if found.model_type not in FAMILIES:
        kind = found.model_type or "no model_type"
        assumptions.append(
            f"the architecture ({kind}) is not known: weights are counted as llama's, and K and V "
            "by the fields of the config"
        )
    if found.dtype is None:
        assumptions.append("the config has no dtype: bfloat16 is taken")
    return Model(name, source, found, checkpoint, tuple(notes), tuple(assumptions))


def _is_default(config: ModelConfig, field: str) -> bool:
    """Whether the file is silent on a field under each of its names."""
    bare = ModelConfig(config.fields, config.model_type)
    return bare.get(field) is None


def _from_path(path: Path) -> Model:
    if path.is_file():
        return _model(path.stem if path.stem != "config" else path.parent.name, str(path),
                      _read(path))  # fmt: skip
    file = path / "config.json"
    if not file.is_file():
        raise InvalidSpec(f"model is {str(path)!r}, a folder without a config.json")
    return _model(path.resolve().name, str(file), _read(file), _checkpoint(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"model is {str(path)!r}, which is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InvalidSpec(f"model is {str(path)!r}, a JSON {type(found).__name__}, not an object")
    return found


def _from_hub(name: str) -> Model:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InvalidSpec(
            f"model is {name!r}, a hub id: that needs huggingface_hub (pip install "
            "huggingface_hub), or give the path of a config.json"
        ) from error

    def fetch(file: str) -> Path:
        """Ask for what is not cached first: without a network, a download tries again for 24 s."""
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, file), str):
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file))
        return Path(huggingface_hub.hf_hub_download(name, file))

    try:
        config = fetch("config.json")
    except Exception as error:  # its own errors, those of the network, of the file system
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidSpec(
            f"model is {name!r}, and its config.json was not found on the hub: {first}"
        ) from error
    try:
        index = fetch(_INDEX)
    except Exception:  # one file has no index; the count by architecture is as good
        return _model(name, f"hub: {name}", _read(config))
    return _model(name, f"hub: {name}", _read(config), _from_index(index))


def _checkpoint(folder: Path) -> Checkpoint | None:
    """Headers of the files where they are there, else the index, else nothing."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        parts = [_header(file) for file in files]
        return Checkpoint(sum(p.num_bytes for p in parts), sum(p.num_elements or 0 for p in parts))
    index = folder / _INDEX
    return _from_index(index) if index.is_file() else None


def _from_index(index: Path) -> Checkpoint:
    metadata = _read(index).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(size, (int, float)) or size <= 0:
        raise InvalidSpec(f"{index} has no metadata.total_size: not a safetensors index")
    return Checkpoint(int(size))


def _header(file: Path) -> Checkpoint:
    """The first 8 bytes are the length of a JSON header with each tensor's place and shape."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > 100 * 2**20:
                raise ValueError(f"a header of {length} bytes")
            tensors = json.loads(opened.read(length))
        tensors.pop("__metadata__", None)
        sizes = [t["data_offsets"][1] - t["data_offsets"][0] for t in tensors.values()]
        return Checkpoint(sum(sizes), sum(prod(t["shape"]) for t in tensors.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InvalidSpec(f"{file} is no safetensors file: {error}") from error
