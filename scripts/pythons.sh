#!/usr/bin/env bash
# Prints the paths of the CPython interpreters 3.10 to 3.13 found on PATH or kept by pyenv, one for
# each version. A pyenv shim whose version is not selected does not run, and is passed over.
set -euo pipefail

pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-}/.pyenv")}
for minor in 10 11 12 13; do
  for candidate in "$(command -v "python3.$minor" || :)" "$pyenv_root"/versions/3."$minor".*/bin/python3."$minor"; do
    if [ -x "$candidate" ] && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      echo "$candidate"
      break
    fi
  done
done
