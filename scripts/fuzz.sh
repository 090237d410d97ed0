#!/usr/bin/env bash
# fuzz.sh [SECONDS=60]: random command streams against the core, guided by coverage, under
# AddressSanitizer and UndefinedBehaviorSanitizer. What crashes is left in the build folder.
source "$(dirname "$0")/lib.sh"

has_fuzzer || cannot "$CLANG has no libFuzzer: scripts/install_system.sh, or set CLANG"
need cmake ninja
bin=$(dirname "$PYTHON")
seconds=${1:-60}
build=$WORK/fuzz
mkdir -p "$build/corpus"
"$bin/cmake" -G Ninja -S . -B "$build" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DCMAKE_CXX_COMPILER="$CLANG" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DKV_PYTHON=OFF -DKV_FUZZ=ON -DKV_SANITIZE=address,undefined >"$build.log" ||
  { cat "$build.log"; exit 1; }
"$bin/cmake" --build "$build" --target kv_fuzz
"$build/tests/cpp/kv_fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=20 -rss_limit_mb=2048 \
  -print_final_stats=1 -artifact_prefix="$build/" "$build/corpus" 2>&1 | tail -n 25
