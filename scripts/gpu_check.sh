#!/usr/bin/env bash
# gpu_check.sh [FOLDER=build/gpu]: on a machine with an NVIDIA GPU and nvcc, and no network: builds,
# runs every test that needs a GPU, and the benchmarks, and writes the report to FOLDER. What matters
# most comes first, each part has a time of its own, and all of them have DEADLINE seconds (540).
# What could not run counts as failed.
#
# PYTHON has torch with CUDA, transformers, numpy, typer, rich, matplotlib, pytest, pytest-benchmark,
# hypothesis, pybind11, scikit-build-core, cmake (3.26 or later) and ninja; KV_DOCTEST_INCLUDE is the
# folder of doctest/doctest.h, by default .doctest here, then the system's. Attention backends
# (flashinfer, flash_attn_interface, flash_attn) are tested if PYTHON has them. BASELINE=cuda.json
# compares with an earlier run; PAGEDKV_COMMIT names the commit where git cannot.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=${1:-build/gpu} python=${PYTHON:-python3} work=$PWD/build/scripts/gpu
export py=$work/venv/bin/python PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 HF_HUB_OFFLINE=1
doctest=/usr/include
[ ! -d .doctest ] || doctest=$PWD/.doctest
export KV_DOCTEST_INCLUDE=${KV_DOCTEST_INCLUDE:-$doctest}
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$out" "$work"
: >"$out/parts.txt" >"$out/log.txt"

failed=0 deadline=${DEADLINE:-540}
# part NAME SECONDS COMMAND...: goes on after a failure, and remembers it.
part() {
  local begin=$SECONDS status limit=$2 from
  ((limit < deadline - begin)) || limit=$((deadline - begin))
  printf '\n== %s\n' "$1" | tee -a "$out/log.txt"
  from=$(wc -l <"$out/log.txt")
  if ((limit < 5)); then
    status="NOT RUN: no time is left" failed=1
  # Whoever looks at the log of a part that was cut off, or of a machine that was, finds all of it.
  elif timeout --kill-after=10 "$limit" bash -o pipefail -c '"$@"' - "${@:3}" >>"$out/log.txt" 2>&1
  then
    status=ok
  else
    status=FAILED failed=1
    [ $((SECONDS - begin)) -lt "$limit" ] || status="CUT OFF after $limit s"
  fi
  tail -n "+$((from + 1))" "$out/log.txt" | tail -n 15
  echo "$1: $status, $((SECONDS - begin)) s" | tee -a "$out/parts.txt"
}

# Of this GPU, as CMake names it: "90".
architecture() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. '; }

build() {
  "$python" -c 'import torch
print("torch", torch.__version__, torch.version.cuda)
print("DLPack from C:", hasattr(torch.Tensor, "__dlpack_c_exchange_api__"))' &&
    "$python" -m venv --clear --without-pip "$work/venv" &&
    # All packages of $python, which may be a virtual environment itself.
    "$python" -c 'import site; [print(f"import site; site.addsitedir({folder!r})")
      for folder in [*site.getsitepackages(), site.getusersitepackages()]]' \
      >"$("$py" -c 'import site; print(site.getsitepackages()[0])')/outer.pth" &&
    "$py" -m pip install -q --no-build-isolation --no-deps . \
      -Ccmake.define.KV_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$(architecture)" &&
    "$py" -m pagedkv info &&
    "$py" -c 'import pagedkv, sys
assert pagedkv.__file__.startswith(sys.prefix), f"not what was built: {pagedkv.__file__}"'
}
contract_build() {
  cmake -G Ninja -S . -B "$work/cpp" -DKV_PYTHON=OFF -DKV_TESTS=ON -DKV_GPU_TESTS=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$(architecture)" -DKV_DOCTEST_INCLUDE="$KV_DOCTEST_INCLUDE" &&
    cmake --build "$work/cpp" --target kv_gpu_tests
}
contract() {
  wait_for "$work/contract_build" && "$work/cpp/tests/cpp/kv_gpu_tests"
}
# wait_for FILE: what runs beside writes its exit status there.
wait_for() {
  until [ -s "$1" ]; do sleep 0.2; done
  cat "$1.log"
  [ "$(cat "$1")" = 0 ]
}
# tests FILE... [OPTION...]: in one process; after an illegal address nothing works any more in it.
tests() {
  "$py" -m pytest -v --tb=short -o faulthandler_timeout=30 -m gpu --runs 200 "$@" |
    tee "$work/tests.txt" && grep -q ' passed' "$work/tests.txt"  # if all were skipped, none was run
}
memcheck() {
  compute-sanitizer --error-exitcode 9 --target-processes all --report-api-errors no \
    "$py" -m pytest -v tests/python/test_gpu.py -k "waits or reused" --runs 1 |
    tee "$work/tests.txt" && grep -q ' passed' "$work/tests.txt"
}
benchmarks() {
  "$py" bench/bench_cuda.py --host-gib 8 --out "$out" ${BASELINE:+--baseline "$BASELINE"}
}
export -f architecture build contract_build contract wait_for tests memcheck benchmarks

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
[ -f "$KV_DOCTEST_INCLUDE/doctest/doctest.h" ] ||
  echo "no doctest/doctest.h in $KV_DOCTEST_INCLUDE: the contract suite cannot be built" |
  tee -a "$out/parts.txt"
# The C++ tests are compiled beside the extension: there are cores enough.
rm -f "$work/contract_build"
(
  contract_build >"$work/contract_build.log" 2>&1 && status=0 || status=$?
  echo "$status" >"$work/contract_build"
) &
part build 240 build
part graphs 60 tests tests/python/test_graphs.py
part gpu 90 tests tests/python/test_gpu.py
part benchmarks 180 benchmarks
grep 'bars missed' "$out/log.txt" | tail -n 1 >>"$out/parts.txt" || :
part contract 60 contract
part ops 60 tests tests/python/test_ops.py tests/python/test_fp8.py tests/python/test_package.py
part gather 60 tests tests/python/test_attention_kernels.py -k gather
for package in flashinfer flash_attn_interface flash_attn; do
  "$py" -c "import $package" 2>/dev/null || continue
  part kernels 90 tests tests/python/test_attention_kernels.py -k "not gather and not flex"
  break
done
part memcheck 90 memcheck
part demo 60 "$py" -m pagedkv demo --model tiny --device cuda:0 --out "$out/tree.png"
part flex 120 tests tests/python/test_attention_kernels.py -k "flex and layer_major and bfloat16"

printf '\n== report: %s\n' "$out"
cat "$out/parts.txt"
exit $failed
