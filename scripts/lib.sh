# For the other scripts: source "$(dirname "$0")/lib.sh". Works from any folder.
#
# PYTHON is the environment to use, by default the checkout's .venv; WORK holds what scripts build.
# A script that cannot do its part on this machine says why and exits with 77.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
WORK=${WORK:-$PWD/build/scripts}
CLANG=${CLANG:-clang++-19}
mkdir -p "$WORK"
if command -v ccache >/dev/null; then
  # Builds of one kind in several folders have most objects in common.
  export CMAKE_{C,CXX,CUDA}_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
fi

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
cannot() { printf 'SKIPPED: %s\n' "$*" >&2; exit 77; }

# need MODULE...: installs the missing ones into PYTHON's environment, at the pinned versions.
need() {
  [ -x "$PYTHON" ] || die "no $PYTHON: make an environment (CONTRIBUTING.md), or set PYTHON"
  "$PYTHON" -m pip install -q -c constraints.txt "$@"
}

# venv FOLDER PYTHON: a fresh virtual environment.
venv() {
  rm -rf "$1"
  "$2" -m venv "$1"
}

has_fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
    "$CLANG" -fsanitize=fuzzer,address -x c++ - -o "$WORK/fuzzer_links" 2>/dev/null
}
