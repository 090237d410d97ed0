"""The house stays one-way and tidy: reads sources, runs nothing.

Arrows go core <- transfer <- host, cuda <- bindings <- python. Needs the source tree, which is
where these tests live; what it says about the Python package holds for the files in it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "pagedkv"

# What a room may include, besides itself.
ROOMS = {
    "core": set(),
    "transfer": {"core"},
    "host": {"core", "transfer"},
    "cuda": {"core", "transfer", "host"},  # a CUDA machine has a host
    "bindings": {"core", "transfer", "host", "cuda"},
}

# The same log of commands gives the same plans: nothing of threads, clocks, locks, callbacks,
# input and output, or chance may enter core.
CORE_HEADERS = set(
    """
    algorithm array bit compare concepts cstddef cstdint cstdlib cstring limits memory new numeric
    optional span stdexcept string string_view tuple type_traits unordered_map utility variant
    vector
    """.split()  # noqa: SIM905
)

# Modules of the package that work without torch, so that planning and scheduling need none.
TORCH_FREE = set(
    "__init__ __main__ cli config errors info layer_kinds preemption spec units".split()  # noqa: SIM905
)
# Packages of which every module does.
TORCH_FREE_PACKAGES = {"planner", "simulator"}
# `import pagedkv` runs these, and takes milliseconds.
EAGER = {"__init__", "errors"}
HEAVY = {"numpy", "torch", "transformers", "typer", "rich", "re", "typing", "dataclasses"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
# What is over the limit, and how far. These numbers only go down.
FILE_RATCHET = {
    "python/pagedkv/_core.pyi": 600,  # a module has one stub
}
FUNCTION_RATCHET = {
    "csrc/bindings/manager.cpp bind_manager": 140,
    "csrc/core/block_manager_step.cpp append": 83,
}

SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py", ".pyi"}
FOLDERS = ("csrc", "python", "tests", "bench", "examples")
# Written in two halves, so that this file does not contain them.
BANNED = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")


def torch_free_modules() -> list[Path]:
    packages = [p for name in TORCH_FREE_PACKAGES for p in (PACKAGE / name).glob("*.py")]
    return sorted([PACKAGE / f"{module}.py" for module in TORCH_FREE] + packages)


def native_files(room: str = "*") -> list[Path]:
    return sorted(p for p in CSRC.glob(f"{room}/*") if p.suffix in SUFFIXES)


def package_modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def all_files() -> list[Path]:
    return sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in SUFFIXES)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[tuple[str, str]]:
    """("<" or a quote, what is included) of every #include."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def top_imports(path: Path) -> set[str]:
    """Packages that running the module imports; not those for type checkers or in functions."""

    def walk(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
            elif isinstance(node, ast.Try):
                yield from walk(node.body)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                yield from walk(node.body + node.orelse)

    return set(walk(ast.parse(path.read_text()).body))


def native_functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of the functions that start in column 0, as clang-format lays them out."""
    start = None
    for number, line in enumerate(path.read_text().splitlines()):
        if line == "}" and start is not None:
            title = re.search(r"(\w+|operator\S+)\(", start[1])
            yield (title[1] if title else start[1], number - start[0] + 1)
        if re.match(r"\S", line):
            begins = re.match(r"(?!namespace|struct|class|enum|union)[A-Za-z\[].*[^};]$", line)
            start = (number, line) if begins else None


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_readers_find_what_they_shall_judge() -> None:
    assert {p.parent.name for p in native_files()} <= set(ROOMS)
    assert len(native_files("core")) > 10
    assert ('"', "core/types.h") in includes(CSRC / "core" / "block_manager.h")
    assert "torch" in top_imports(PACKAGE / "cache.py")
    assert dict(native_functions(CSRC / "core" / "block_pool.cpp")).keys() >= {"take", "give"}


@pytest.mark.parametrize("path", native_files(), ids=name)
def test_native_includes_go_one_way(path: Path) -> None:
    room = path.parent.name
    for kind, included in includes(path):
        if kind == '"':
            assert (CSRC / included).is_file(), f"{included}: include paths start at csrc/"
            assert included.split("/")[0] in ROOMS[room] | {room}, f"{room} includes {included}"


@pytest.mark.parametrize("path", native_files("core"), ids=name)
def test_core_uses_deterministic_standard_headers_only(path: Path) -> None:
    allowed = CORE_HEADERS | ({"source_location"} if path.name == "mutant.h" else set())
    assert {header for kind, header in includes(path) if kind == "<"} <= allowed


@pytest.mark.parametrize("room", ["transfer", "host"])
def test_rooms_below_the_bindings_know_neither_python_nor_cuda(room: str) -> None:
    for path in native_files(room):
        found = {header for kind, header in includes(path) if kind == "<"}
        assert [h for h in found if re.match(r"pybind11|Python\.h|cuda|torch|ATen", h)] == []


def test_cuda_knows_no_python() -> None:
    for path in native_files("cuda"):
        found = {header for kind, header in includes(path) if kind == "<"}
        assert [h for h in found if re.match(r"pybind11|Python\.h|torch|ATen", h)] == []


def test_nothing_includes_torch() -> None:
    found = {(name(p), h) for p in native_files() for _, h in includes(p)}
    assert [x for x in found if re.match(r"torch/|ATen/|c10/", x[1])] == []


@pytest.mark.parametrize("path", torch_free_modules(), ids=name)
def test_torch_free_modules_import_none(path: Path) -> None:
    imports = top_imports(path)
    packages = {i.split(".")[0] for i in imports}
    assert packages & {"torch", "transformers", "matplotlib"} == set()
    own = {i.split(".")[1] for i in imports if i.startswith("pagedkv.")}
    allowed = TORCH_FREE | TORCH_FREE_PACKAGES | {"_core"}
    assert own <= allowed, f"{path.name} imports modules that need torch"


@pytest.mark.parametrize("module", sorted(EAGER))
def test_import_pagedkv_stays_light(module: str) -> None:
    packages = {i.split(".")[0] for i in top_imports(PACKAGE / f"{module}.py")}
    assert packages & HEAVY == set()


def test_only_the_command_line_needs_typer_and_rich() -> None:
    users = {
        name(p)
        for p in package_modules()
        if {i.split(".")[0] for i in top_imports(p)} & {"typer", "rich"}
    }
    allowed = [PACKAGE / "cli.py", *PACKAGE.glob("demo/*.py")]
    allowed += [*PACKAGE.glob("*/command.py"), *PACKAGE.glob("*/show.py")]
    assert users <= {name(p) for p in allowed}


def test_the_package_does_not_import_the_integrations() -> None:
    below = [p for p in package_modules() if p.parent == PACKAGE]
    assert below
    for path in below:
        assert not any(i.startswith("pagedkv.integrations") for i in top_imports(path)), name(path)


@pytest.mark.parametrize("path", all_files(), ids=name)
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_RATCHET.get(name(path), MAX_FILE_LINES)
    assert [word for word in BANNED if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize("path", all_files(), ids=name)
def test_functions_are_short(path: Path) -> None:
    functions = python_functions if path.suffix in {".py", ".pyi"} else native_functions
    for function, lines in functions(path):
        allowed = FUNCTION_RATCHET.get(f"{name(path)} {function}", MAX_FUNCTION_LINES)
        assert lines <= allowed, f"{function} has {lines} lines, expected at most {allowed}"


def test_the_ratchets_have_no_slack_that_is_not_needed() -> None:
    for file in FILE_RATCHET:
        assert (ROOT / file).read_text().count("\n") > MAX_FILE_LINES, f"{file}: take it off"
    for entry in FUNCTION_RATCHET:
        file, function = entry.split()
        longest = max(n for f, n in native_functions(ROOT / file) if f == function)
        assert longest > MAX_FUNCTION_LINES, f"{entry}: take it off"


@pytest.mark.parametrize("path", native_files() + package_modules(), ids=name)
def test_one_word_per_concept(path: Path) -> None:
    """A block is never a "page"; the machine's own pages and other libraries' names are theirs."""
    theirs = r"_SC_\w*PAGE\w*|kv_last_page_len|page_table|OS pages?|page-locked"
    text = re.sub(theirs, "", path.read_text())
    assert re.findall(r"(?i)\bpages?\b|\bslot_mapping\b|\bonload\b|\boffload\b", text) == []


def test_calls_are_left_out_in_test_builds_only() -> None:
    """Who defines KV_MUTANTS is a test's own CMake file, and the module refuses to be built so."""
    users = [p for p in ROOT.rglob("CMakeLists.txt") if "KV_MUTANTS" in p.read_text()]
    assert [name(p) for p in users if "build" not in p.parts] == ["tests/cpp/CMakeLists.txt"]
    assert not any("KV_MUTANTS" in p.read_text() for p in (ROOT / "cmake").iterdir())
    assert "KV_MUTANTS" not in (ROOT / "pyproject.toml").read_text()
    module = (CSRC / "bindings" / "module.cpp").read_text()
    assert re.search(r"#ifdef KV_MUTANTS\n#error ", module)
