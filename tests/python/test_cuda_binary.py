"""The machine code of the _cuda module, read by NVIDIA's cuobjdump: no GPU is needed.

The kernels do nothing but move memory, so what matters shows in their instructions: full words,
several loads under way before the first store, and nothing kept in local memory. Skipped where
_cuda is not built, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm are not installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
FORWARD = {"sm_80", "sm_120"}  # whose PTX serves devices between, and after
KERNELS = ["CopyBlocks", "GatherKv", "ScatterKv", "TransferBlocks"]
WORD_BYTES = {"h": 1, "t": 2, "j": 4, "5uint2": 8, "5uint4": 16}  # by mangled type
IN_FLIGHT = 4  # kInFlight of launch.cu

MOVES = re.compile(r"move_wordsINS_\d+([A-Za-z]+)E(5uint4|5uint2|[jth])EE")
CONVERTS = re.compile(r"convert_valuesI(?:NS_\d([A-Z]\w+?)E|f)Li(\d+)EE")
CONVERSIONS = {(f"ScatterFp8 from {t}", n) for t in ("Bf16", "Fp16", "float") for n in (1, 16)}
ACCESS = re.compile(r"\b(LD|ST|LDG|STG|LDL|STL)(\.[\w.]+)? ")  # LD and ST: which memory is unknown


def module() -> Path:
    """A _cuda of its own on the path goes first: one that was built to be looked at."""
    spec = importlib.util.find_spec("_cuda") or importlib.util.find_spec("pagedkv._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the _cuda module is not built")
    return Path(spec.origin)


def tool(name: str) -> Path:
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"nvidia-cuda-{name} is not installed")
    return next(Path(str(f.locate())) for f in files if f.name == name)


@functools.cache
def cuobjdump(*options: str) -> str:
    found = tool("cuobjdump")
    path = f"{tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(found), *options, str(module())]
    return subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    ).stdout


def kernel(function: str) -> tuple[str, int]:
    """(name, bytes of the word that it stores)."""
    if match := MOVES.search(function):
        return match[1], WORD_BYTES[match[2]]
    match = CONVERTS.search(function)
    assert match, f"{function}: a kernel that this test does not know"
    return f"ScatterFp8 from {match[1] or 'float'}", int(match[2])


@functools.cache
def accesses(architecture: str) -> dict[tuple[str, int], list[str]]:
    """The memory accesses of each kernel, in the order of its code."""
    text = cuobjdump("-sass", "-arch", architecture)
    functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {
        kernel(f.splitlines()[0]): [m[1] + (m[2] or "") for m in ACCESS.finditer(f)]
        for f in functions
    }


def test_machine_code_for_each_architecture_and_ptx_for_those_between_and_after() -> None:
    elf = set(re.findall(r"\.(sm_\d+)\.cubin$", cuobjdump("-lelf"), re.MULTILINE))
    ptx = set(re.findall(r"\.(sm_\d+)\.ptx$", cuobjdump("-lptx"), re.MULTILINE))
    assert elf == set(ARCHITECTURES), "built with another CMAKE_CUDA_ARCHITECTURES, or older nvcc?"
    assert ptx == FORWARD


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_kernel_is_there_for_each_width_of_a_word(architecture: str) -> None:
    every = {(name, bytes_) for name in KERNELS for bytes_ in WORD_BYTES.values()}
    assert accesses(architecture).keys() == every | {("UpdateTables", 4)} | CONVERSIONS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_access_is_to_global_memory(architecture: str) -> None:
    for which, found in accesses(architecture).items():
        assert found, which
        assert {access.split(".")[0] for access in found} == {"LDG", "STG"}, which


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_16_bytes_move_at_once_and_several_before_the_first_store(
    architecture: str, name: str
) -> None:
    found = accesses(architecture)[name, 16]
    moves = [a for a in found if a.endswith(".128")]
    assert {a for a in found if a.startswith("STG")} == {"STG.E.128"}
    assert moves[:IN_FLIGHT] == ["LDG.E.128"] * IN_FLIGHT
    assert moves.count("STG.E.128") >= IN_FLIGHT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conversions_load_16_bytes_at_once_and_store_them_so(architecture: str) -> None:
    for name, values in CONVERSIONS:
        if values == 16:
            loads = 4 if name.endswith("float") else 2
            found = [a for a in accesses(architecture)[name, 16] if a.endswith(".128")]
            assert found == ["LDG.E.128"] * loads + ["STG.E.128"], name


def test_nothing_is_spilled() -> None:
    usage = re.findall(
        r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    assert len(usage) == len(ARCHITECTURES) * (
        len(KERNELS) * len(WORD_BYTES) + 1 + len(CONVERSIONS)
    )
    for function, *memory in usage:
        assert memory == ["0", "0", "0"], kernel(function)
