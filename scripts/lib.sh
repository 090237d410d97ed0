# For the other scripts: source "$(dirname "$0")/lib.sh". Works from any folder.
#
# PYTHON is the environment to use, by default the checkout's .venv; WORK holds what scripts build.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
WORK=${WORK:-$PWD/build/scripts}
mkdir -p "$WORK"
if command -v ccache >/dev/null; then
  export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache
fi

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# need MODULE...: installs the missing ones into PYTHON's environment, at the pinned versions.
need() {
  "$PYTHON" -m pip install -q -c constraints.txt "$@"
}

# venv FOLDER PYTHON: a fresh virtual environment.
venv() {
  rm -rf "$1"
  "$2" -m venv "$1"
}
