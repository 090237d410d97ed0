#!/usr/bin/env bash
# gpu_check.sh [FOLDER=build/gpu]: on a machine with an NVIDIA GPU and nvcc, and no network: builds,
# runs every test that needs a GPU, and the benchmarks, and writes the report to FOLDER. What matters
# most comes first, and each part has a time of its own. What could not run counts as failed.
#
# PYTHON has torch with CUDA, transformers, numpy, typer, rich, matplotlib, pytest, pytest-benchmark,
# hypothesis, pybind11, scikit-build-core, cmake (3.26 or later) and ninja; KV_DOCTEST_INCLUDE is the
# folder of doctest/doctest.h, where it is none of the system's. Attention backends (flashinfer,
# flash_attn_interface, flash_attn) are tested if PYTHON has them. BASELINE=cuda.json compares with an
# earlier run.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=${1:-build/gpu} python=${PYTHON:-python3} work=build/scripts/gpu
export KV_DOCTEST_INCLUDE=${KV_DOCTEST_INCLUDE:-/usr/include}
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
mkdir -p "$out" "$work"

failed=0
# part NAME SECONDS COMMAND...: goes on after a failure, and remembers it.
part() {
  local begin=$SECONDS status
  printf '\n== %s\n' "$1" | tee -a "$out/log.txt"
  if timeout --foreground --kill-after=10 "$2" bash -o pipefail -c '"$@"' - "${@:3}" >"$work/part.log" 2>&1; then
    status=ok
  else
    status=FAILED failed=1
  fi
  tail -n 15 "$work/part.log"
  cat "$work/part.log" >>"$out/log.txt"
  echo "$1 $status $((SECONDS - begin)) s" | tee -a "$out/parts.txt"
}

build() {
  "$python" -c 'import torch; print("torch", torch.__version__, torch.version.cuda)' &&
    "$python" -m venv --clear --without-pip "$work/venv" &&
    # All packages of $python, which may be a virtual environment itself.
    "$python" -c 'import site; [print(f"import site; site.addsitedir({folder!r})")
      for folder in [*site.getsitepackages(), site.getusersitepackages()]]' \
      >"$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth" &&
    "$work/venv/bin/python" -m pip install -q --no-build-isolation --no-deps . \
      -Ccmake.define.KV_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native &&
    "$work/venv/bin/python" -m pagedkv info &&
    "$work/venv/bin/python" -c 'import pagedkv, sys
assert pagedkv.__file__.startswith(sys.prefix), f"not what was built: {pagedkv.__file__}"'
}
contract() {
  cmake -G Ninja -S . -B "$work/cpp" -DKV_PYTHON=OFF -DKV_TESTS=ON -DKV_GPU_TESTS=ON \
    -DKV_DOCTEST_INCLUDE="$KV_DOCTEST_INCLUDE" &&
    cmake --build "$work/cpp" --target kv_gpu_tests &&
    "$work/cpp/tests/cpp/kv_gpu_tests"
}
# A process for each file: after an illegal address nothing works any more in its own.
gpu_tests() {
  local file status=0
  for file in "$@"; do
    "$work/venv/bin/python" -m pytest -q -m gpu "tests/python/$file" --runs 200 |
      tee "$work/tests.txt" || status=1
    grep -q ' passed' "$work/tests.txt" || status=1  # if all were skipped, nothing was tested
  done
  return $status
}
memcheck() {
  compute-sanitizer --error-exitcode 9 --target-processes all --report-api-errors no \
    "$work/venv/bin/python" -m pytest -q tests/python/test_gpu.py -k "waits or reused" --runs 1 |
    tee "$work/tests.txt" && grep -q ' passed' "$work/tests.txt"
}
benchmarks() {
  "$work/venv/bin/python" bench/bench_cuda.py --host-gib 8 --out "$out" \
    ${BASELINE:+--baseline "$BASELINE"}
}
export -f build contract gpu_tests memcheck benchmarks

: >"$out/parts.txt" >"$out/log.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
part build 200 build
part contract 90 contract
part tests 90 gpu_tests test_gpu.py test_graphs.py test_ops.py test_fp8.py test_package.py
part benchmarks 120 benchmarks
part attention 120 gpu_tests test_attention_kernels.py
part demo 40 "$work/venv/bin/pagedkv" demo --model tiny --device cuda:0 --out "$out/tree.png"
part memcheck 90 memcheck

printf '\n== report: %s\n' "$out"
cat "$out/parts.txt"
exit $failed
