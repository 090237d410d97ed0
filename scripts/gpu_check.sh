#!/usr/bin/env bash
# gpu_check.sh [FOLDER=build/gpu]: on a machine with an NVIDIA GPU and nvcc, and no network: builds,
# runs every test that needs a GPU, and the benchmarks, and writes the report to FOLDER.
#
# PYTHON has torch with CUDA, transformers, pytest, hypothesis, pybind11, scikit-build-core and ninja,
# and cmake is 3.26 or later. Attention backends (flashinfer, flash_attn_interface, flash_attn) are tested
# if it has them. BASELINE=cuda.json compares with an earlier run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
work=build/scripts/gpu
mkdir -p "$out" "$work"

say() { printf '\n== %s\n' "$*"; }
failed=0
# part NAME COMMAND...: goes on after a failure, and remembers it. Within it, set -e is off.
part() {
  say "$1"
  local begin=$SECONDS
  if "${@:2}" >"$out/$1.log" 2>&1; then status=ok; else status=FAILED; failed=1; fi
  tail -15 "$out/$1.log"
  echo "$1 $status $((SECONDS - begin)) s" | tee -a "$out/parts.txt"
}

: >"$out/parts.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"

build() {
  "$python" -c 'import torch; print("torch", torch.__version__, torch.version.cuda)' || return 1
  "$python" -m venv --without-pip "$work/venv" &&
    # All packages of $python, which may be a virtual environment itself.
    "$python" -c 'import site; [print(f"import site; site.addsitedir({folder!r})")
      for folder in [*site.getsitepackages(), site.getusersitepackages()]]' \
      >"$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth" &&
    "$work/venv/bin/python" -m pip install -q --no-build-isolation --no-deps . \
      -Ccmake.define.KV_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native &&
    "$work/venv/bin/python" -m pagedkv info
}
contract() {
  cmake -G Ninja -S . -B "$work/cpp" -DKV_PYTHON=OFF -DKV_TESTS=ON -DKV_GPU_TESTS=ON &&
    cmake --build "$work/cpp" --target kv_gpu_tests &&
    "$work/cpp/tests/cpp/kv_gpu_tests"
}
sanitizer() {
  compute-sanitizer --error-exitcode 9 --target-processes all --tool "$1" \
    "$work/venv/bin/python" -m pytest -q tests/python/test_gpu.py -k "waits or reused" --runs 1
}

part build build
gpu_tests() {
  "$work/venv/bin/python" -m pytest -q -m gpu tests/python --runs 200 | tee "$work/tests.txt" &&
    grep -q " passed" "$work/tests.txt"  # if all were skipped, nothing was tested
}
part tests gpu_tests
if [ -f /usr/include/doctest/doctest.h ]; then
  part contract contract
else
  echo "contract SKIPPED: no doctest/doctest.h" | tee -a "$out/parts.txt"
fi
if command -v compute-sanitizer >/dev/null; then
  part memcheck sanitizer memcheck
  part racecheck sanitizer racecheck
else
  echo "compute-sanitizer SKIPPED: not on PATH" | tee -a "$out/parts.txt"
fi
part demo "$work/venv/bin/pagedkv" demo --model tiny --device cuda:0 --out "$out/tree.png"
part benchmarks "$work/venv/bin/python" bench/bench_cuda.py --out "$out" \
  ${BASELINE:+--baseline "$BASELINE"}
echo "benchmarks: $(tail -n 1 "$out/benchmarks.log")" | tee -a "$out/parts.txt"

say "report: $out"
cat "$out/parts.txt"
exit $failed
