#!/usr/bin/env bash
# Linters, formatters, types, and the stubs against the built modules. `--fix` mends what can be.
source "$(dirname "$0")/lib.sh"

bin=$(dirname "$PYTHON")
need ruff mypy clang-format
mapfile -t native < <(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

if [ "${1:-}" = --fix ]; then
  "$bin/ruff" check --fix .
  "$bin/ruff" format .
  "$bin/clang-format" -i "${native[@]}"
fi
say "ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .
say "clang-format"
"$bin/clang-format" --dry-run -Werror "${native[@]}"
say "mypy --strict"
"$PYTHON" -m mypy --strict
say "stubs"
modules=(pagedkv._core)
if "$PYTHON" -c 'import pagedkv._cuda' 2>/dev/null; then modules+=(pagedkv._cuda); fi
"$PYTHON" -m mypy.stubtest "${modules[@]}"
