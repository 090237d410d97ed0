#!/usr/bin/env bash
# KV_CUDA: OFF builds without the _cuda module; ON without nvcc fails and names what to set; where
# nvcc is, ON builds _cuda without a warning, it imports and answers without a GPU, and its machine
# code is what the kernels were written for.
source "$(dirname "$0")/lib.sh"

need cmake ninja pybind11
bin=$(dirname "$PYTHON")
log=$WORK/cuda.log

# configure ON|OFF [SETTING...]: into a fresh build folder.
configure() {
  "$bin/cmake" --fresh -G Ninja -S . -B "$WORK/cuda-$1" -DKV_CUDA="$1" -DPython_EXECUTABLE="$PYTHON" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_COMPILE_WARNING_AS_ERROR=ON >"$log" 2>&1
}

say "KV_CUDA=OFF"
configure OFF || { cat "$log"; exit 1; }
grep 'CPU-only' "$log"
"$bin/cmake" --build "$WORK/cuda-OFF"
[ -z "$(find "$WORK/cuda-OFF" -name '_cuda*.so')" ] || die "KV_CUDA=OFF built the _cuda module"

say "KV_CUDA=ON without nvcc"
! CUDACXX=no-such-nvcc configure ON || die "KV_CUDA=ON succeeded without nvcc"
grep -A 4 'KV_CUDA is ON' "$log"
grep -q CUDACXX "$log" || die "the message does not name CUDACXX"

command -v "${CUDACXX:-nvcc}" >/dev/null || cannot "no nvcc: KV_CUDA=ON was not built here"
say "KV_CUDA=ON with nvcc"
configure ON || { cat "$log"; exit 1; }
grep '_cuda module' "$log"
"$bin/cmake" --build "$WORK/cuda-ON" --target _cuda
PYTHONPATH=$WORK/cuda-ON "$PYTHON" -c 'import _cuda; print(_cuda.runtime_version(), _cuda.status())'

say "machine code"
need nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm pytest ||
  cannot "no nvidia-cuda-cuobjdump to be had from pip: the machine code was not looked at"
PYTHONPATH=$WORK/cuda-ON "$PYTHON" -m pytest -q --noconftest tests/python/test_cuda_binary.py | tee "$log"
! grep -q skipped "$log" || die "with the module and the tools here, no test may be skipped"

say "clang-tidy"
need clang-tidy || cannot "no clang-tidy to be had from pip: the CUDA host code was not linted"
include=$("${CUDACXX:-nvcc}" --dryrun -x cu /dev/null 2>&1 |
  sed -n 's/.*INCLUDES="-I\([^"]*\)".*/\1/p')
[ -d "$include" ] || die "nvcc does not say where its headers are: \"$include\""
# As C++, which all of it is but launch.cu; what that launches, simulated_runtime.cpp runs as well.
printf '%s\n' csrc/cuda/*.cpp csrc/cuda/{cuda_runtime,device_query}.cu |
  xargs -P 2 -I {} "$bin/clang-tidy" --quiet {} -- -x c++ -std=c++20 -Icsrc -isystem "$include"
