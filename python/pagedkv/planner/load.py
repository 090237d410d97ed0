"""What is asked: the load, the machine, and what an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.config import check_int
from pagedkv.errors import InvalidSpec
from pagedkv.planner.model import Model
from pagedkv.planner.weights import weights_dtype
from pagedkv.spec import DTYPE_BYTES
from pagedkv.units import parse_bytes

__all__ = ["Load", "Settings"]

_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_OUTPUT = 512  # tokens of output, where none are asked for


@dataclass(frozen=True)
class Settings:
    """The arguments of plan_memory as they were given; None for what is to be derived."""

    num_gpus: int | None = None
    tp: int | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    concurrency: int = 1
    beams: int = 1
    samples: int = 1
    utilization: float = 0.9
    max_batched_tokens: int = 2048
    max_num_seqs: int | None = None
    host_memory: int | str | None = None
    weights_memory: int | str | None = None
    activation_memory: int | str | None = None
    non_torch_memory: int | str | None = None
    windows: str = "capped"
    strict: bool = False


@dataclass(frozen=True)
class Load:
    """Settings with everything filled in and checked.

    Attributes:
        tp: GPUs that one copy of the model is divided among.
        replicas: copies of the model: num_gpus / tp.
        kv_dtype: storage type of K and V; state_dtype: of recurrent state, the weights'.
        concurrency: requests at once on one replica.
        longest: tokens of the longest sequence that would be accepted: max_model_len where it is
            given, else the model's.
        sequences: sequences of one request: beams * samples.
        max_num_seqs: most sequences in a step, for the sampler's memory.
    """

    tp: int
    replicas: int
    kv_dtype: str
    state_dtype: str
    block_size: int
    max_model_len: int
    longest: int
    input_len: int
    output_len: int
    concurrency: int
    sequences: int
    max_num_seqs: int
    max_batched_tokens: int
    utilization: float
    capped: bool
    host_memory: int | None
    weights_memory: int | None
    activation_memory: int | None
    non_torch_memory: int | None

    @property
    def length(self) -> int:
        """Tokens of one sequence at its end."""
        return self.input_len + self.output_len

    @classmethod
    def of(cls, settings: Settings, model: Model) -> Load:
        """Raises InvalidSpec naming the argument that is wrong, or contradicts another."""
        tp, replicas = _gpus(settings, model)
        _check_ints(settings)
        if settings.windows not in ("capped", "full"):
            raise InvalidSpec(f'windows is {settings.windows!r}, expected "capped" or "full"')
        utilization = settings.utilization
        if not isinstance(utilization, (int, float)) or not 0 < utilization <= 1:
            raise InvalidSpec(f"utilization is {utilization!r}, expected more than 0, at most 1")
        max_model_len, input_len, output_len = _lengths(settings, model)
        requests = -(-settings.concurrency // replicas)
        sequences = settings.beams * settings.samples
        in_a_step = settings.max_num_seqs
        if in_a_step is not None and in_a_step < requests * sequences:
            raise InvalidSpec(
                f"max_num_seqs is {in_a_step}, expected at least {requests * sequences}: the "
                "sequences that are to run at once"
            )
        return cls(
            tp=tp,
            replicas=replicas,
            kv_dtype=_kv_dtype(settings, model),
            state_dtype=weights_dtype(model, settings.dtype),
            block_size=settings.block_size,
            max_model_len=max_model_len,
            longest=settings.max_model_len or model.max_model_len or max_model_len,
            input_len=input_len,
            output_len=output_len,
            concurrency=requests,
            sequences=sequences,
            max_num_seqs=in_a_step or max(256, requests * sequences),
            max_batched_tokens=settings.max_batched_tokens,
            utilization=float(utilization),
            capped=settings.windows == "capped",
            host_memory=_size(settings.host_memory, "host_memory"),
            weights_memory=_size(settings.weights_memory, "weights_memory"),
            activation_memory=_size(settings.activation_memory, "activation_memory"),
            non_torch_memory=_size(settings.non_torch_memory, "non_torch_memory"),
        )


def _size(value: int | str | None, name: str) -> int | None:
    size = None if value is None else parse_bytes(value, name)
    if size is not None and 0 < size < 2**20:
        raise InvalidSpec(f"{name} is {size} bytes: is a unit missing, such as GiB?")
    return size


def _check_ints(settings: Settings) -> None:
    for name in ("block_size", "concurrency", "beams", "samples", "max_batched_tokens"):
        check_int(name, getattr(settings, name))
    for name, least in (("max_model_len", 1), ("input_len", 0), ("output_len", 0),
                        ("max_num_seqs", 1)):  # fmt: skip
        if getattr(settings, name) is not None:
            check_int(name, getattr(settings, name), least)


def _gpus(settings: Settings, model: Model) -> tuple[int, int]:
    """(tp, replicas). Given one of tp and num_gpus, it is the other too."""
    tp = settings.tp if settings.tp is not None else settings.num_gpus
    tp = check_int("tp" if settings.tp is not None else "num_gpus", 1 if tp is None else tp)
    number = check_int("num_gpus", tp if settings.num_gpus is None else settings.num_gpus)
    if number % tp:
        raise InvalidSpec(f"num_gpus is {number} and tp is {tp}, expected a multiple of it")
    if not divides(model, tp):
        good = [n for n in range(1, 65) if divides(model, n)]
        raise InvalidSpec(
            f"tp is {tp}, which does not divide the model's {model.config.num_heads} attention "
            f"heads, or not its {model.config.num_kv_heads} KV heads: expected one of "
            f"{', '.join(map(str, good))}"
        )
    return tp, number // tp


def divides(model: Model, tp: int) -> bool:
    """Whether `tp` GPUs can share the heads, or each KV head has equally many GPUs."""
    if model.config.get("num_attention_heads") is None:  # a model without attention
        return True
    heads, kv_heads = model.config.num_heads, model.config.num_kv_heads
    if model.config.get("kv_lora_rank") is not None:
        return heads % tp == 0
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def _kv_dtype(settings: Settings, model: Model) -> str:
    asked = str(settings.kv_dtype).removeprefix("torch.")
    found = (
        weights_dtype(model, settings.dtype) if asked == "auto" else _KV_DTYPES.get(asked, asked)
    )
    if found not in DTYPE_BYTES:
        raise InvalidSpec(f"kv_dtype is {asked!r}, expected auto, fp8, {', '.join(DTYPE_BYTES)}")
    return found


def _lengths(settings: Settings, model: Model) -> tuple[int, int, int]:
    """(max_model_len, input_len, output_len).

    Without max_model_len it is the load's own length where lengths are given, else the model's.
    Without lengths the load is one sequence of max_model_len tokens, the last few of them output.
    """
    most = model.max_model_len
    given = settings.max_model_len
    if given is not None and most is not None and given > most:
        raise InvalidSpec(f"max_model_len is {given}, expected at most the model's {most}")
    asked = [n for n in (settings.input_len, settings.output_len) if n is not None]
    limit = given or most
    if len(asked) == 2:
        length = sum(asked)
        if limit is not None and length > limit:
            whose = "max_model_len" if given else "the model's length"
            raise InvalidSpec(
                f"input_len is {asked[0]} and output_len is {asked[1]}, together {length}, "
                f"expected at most {whose}, {limit}"
            )
        if length == 0:
            raise InvalidSpec("input_len and output_len are 0, expected a token")
        return given or length, asked[0], asked[1]
    if limit is None:
        raise InvalidSpec("the config has no max_position_embeddings: give a max_model_len")
    if asked and asked[0] > limit:
        name = "input_len" if settings.input_len is not None else "output_len"
        raise InvalidSpec(f"{name} is {asked[0]}, expected at most the model's length, {limit}")
    if settings.input_len is not None:
        output = min(_OUTPUT, limit - settings.input_len)
        return given or settings.input_len + output, settings.input_len, output
    output = min(_OUTPUT, limit // 4) if settings.output_len is None else settings.output_len
    return limit, limit - output, output
