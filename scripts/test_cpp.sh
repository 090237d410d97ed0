#!/usr/bin/env bash
# The C++ tests, first as released, then under AddressSanitizer and UndefinedBehaviorSanitizer, then
# under ThreadSanitizer.
source "$(dirname "$0")/lib.sh"

need cmake ninja
bin=$(dirname "$PYTHON")
for sanitize in "" address,undefined thread; do
  say "C++ tests ${sanitize:+under $sanitize}"
  build=$WORK/cpp-${sanitize:-plain}
  "$bin/cmake" -G Ninja -S . -B "$build" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DKV_PYTHON=OFF -DKV_TESTS=ON -DKV_SANITIZE="$sanitize" \
    -DCMAKE_COMPILE_WARNING_AS_ERROR=ON >"$build.log" || { cat "$build.log"; exit 1; }
  "$bin/cmake" --build "$build" --target kv_tests kv_programs
  "$build/tests/cpp/kv_tests"
  "$build/tests/cpp/kv_programs" --seeds 3000
  "$build/tests/cpp/kv_programs" --seeds 1000 --cuda
done
