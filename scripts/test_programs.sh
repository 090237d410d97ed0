#!/usr/bin/env bash
# test_programs.sh [SEEDS=100000]: random programs over core, transfers and the simulated device,
# then the same with one fence, or one call that holds, drops, publishes or waits, left out at a
# time: each has to be noticed. Then 2,000 through KVCache.
source "$(dirname "$0")/lib.sh"

need cmake ninja
bin=$(dirname "$PYTHON")
build=$WORK/cpp-plain
"$bin/cmake" -G Ninja -S . -B "$build" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DKV_PYTHON=OFF -DKV_TESTS=ON -DKV_SANITIZE="" -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
  >"$build.log" || { cat "$build.log"; exit 1; }
"$bin/cmake" --build "$build" --target kv_programs kv_mutants
say "random programs"
time "$build/tests/cpp/kv_programs" --seeds "${1:-100000}"
say "random programs on a CUDA device with a simulated runtime"
"$build/tests/cpp/kv_programs" --cuda --seeds 20000
say "mutants"
"$PYTHON" tests/cpp/run_mutants.py "$build/tests/cpp/kv_mutants"
say "random programs through KVCache"
"$PYTHON" -m pytest -q tests/python/test_programs.py --runs 2000
