// The loop around every kernel, and its launches.
#include <algorithm>
#include <array>
#include <atomic>
#include <type_traits>

#include "cuda/cuda_runtime.h"
#include "cuda/kernels.h"
#include "cuda/scatter_fp8.h"

namespace pagedkv {

namespace {

constexpr int kThreads = 256;
// Of a kernel across the bus: so few saturate it.
constexpr int kTransferThreadBlocks = 32;
constexpr int kInFlight = 4;  // words that a thread has loaded before it stores the first

// Moves words of type Word: all loads of a round before its stores, so that several are in flight.
template <class Kernel, class Word>
__global__ void __launch_bounds__(kThreads) move_words(const Kernel kernel) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t count = kernel.words.count;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += kInFlight * stride) {
    Word word[kInFlight];
    Word* to[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      to[j] = nullptr;
      if (i + j * stride >= count) continue;
      const Move move = kernel(i + j * stride);
      to[j] = reinterpret_cast<Word*>(move.to);
      word[j] = move.from ? *reinterpret_cast<const Word*>(global(move.from)) : Word{};
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (to[j]) *global(to[j]) = word[j];
    }
  }
}

template <class Value, int kCount>
__global__ void __launch_bounds__(kThreads) convert_values(const ScatterFp8 kernel) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < kernel.count;
       i += stride) {
    kernel.convert<Value, kCount>(i);
  }
}

// How many thread blocks of a kernel run side by side on the current device. Asked once: the answer
// takes longer than a launch.
template <auto kFunction>
int num_side_by_side(int* num_blocks) {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  if (const int code = cudaGetDevice(&device)) return code;
  const bool keep = device < static_cast<int>(known.size());
  if (keep && (*num_blocks = known[static_cast<std::size_t>(device)]) > 0) return cudaSuccess;
  cudaFuncAttributes loaded{};  // by asking
  if (const int code = cudaFuncGetAttributes(&loaded, kFunction)) return code;
  int num_processors = 0, per_processor = 0;
  if (const int code =
          cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device)) {
    return code;
  }
  if (const int code =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kFunction, kThreads, 0)) {
    return code;
  }
  *num_blocks = num_processors * std::max(per_processor, 1);
  if (keep) known[static_cast<std::size_t>(device)] = *num_blocks;
  return cudaSuccess;
}

template <auto kFunction, class Kernel>
int launch_grid(const Kernel& kernel, std::int64_t count, CudaStream stream) {
  int most = 0;
  if (const int code = num_side_by_side<kFunction>(&most)) return code;
  if constexpr (std::is_same_v<Kernel, TransferBlocks>) {
    if (kernel.across_bus) most = std::min(most, kTransferThreadBlocks);
  }
  // No more than run side by side, or fewer: the loop does the rest.
  const std::int64_t needed = (count + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<std::int64_t>(most, needed)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  // Returns this launch's own error, where cudaPeekAtLastError() may find somebody else's.
  return cudaLaunchKernelEx(&config, kFunction, kernel);
}

template <class Word, class Kernel>
int launch_with(const Kernel& kernel, CudaStream stream) {
  return launch_grid<move_words<Kernel, Word>>(kernel, kernel.words.count, stream);
}

template <class Kernel>
int launch_words(const Kernel& kernel, CudaStream stream) {
  if (kernel.words.count == 0) return cudaSuccess;
  switch (kernel.words.bytes) {
    case 16: return launch_with<uint4>(kernel, stream);
    case 8: return launch_with<uint2>(kernel, stream);
    case 4: return launch_with<std::uint32_t>(kernel, stream);
    case 2: return launch_with<std::uint16_t>(kernel, stream);
    default: return launch_with<std::uint8_t>(kernel, stream);
  }
}

template <class Kernel, class... Word>
int load_for() {
  int code = cudaSuccess, num_blocks = 0;
  static_cast<void>(
      (((code = num_side_by_side<move_words<Kernel, Word>>(&num_blocks)) == cudaSuccess) && ...));
  return code;
}

// Of every word that launch_words() knows.
template <class Kernel>
int load_words() {
  return load_for<Kernel, uint4, uint2, std::uint32_t, std::uint16_t, std::uint8_t>();
}

}  // namespace

int RealRuntime::load_kernels() {
  if (const int code = load_words<CopyBlocks>()) return code;
  if (const int code = load_words<ScatterKv>()) return code;
  if (const int code = load_words<GatherKv>()) return code;
  if (const int code = load_words<TransferBlocks>()) return code;
  if (const int code = load_for<UpdateTables, std::uint32_t>()) return code;
  for (const SourceType type : {SourceType::bf16, SourceType::fp16, SourceType::fp32}) {
    for (const int values : {1, ScatterFp8::kWide}) {
      ScatterFp8 kernel{};
      kernel.source_type = type;
      kernel.values = values;
      int num_blocks = 0;
      const int code = kernel.dispatch([&]<class Value, int kCount>() {
        return num_side_by_side<convert_values<Value, kCount>>(&num_blocks);
      });
      if (code != cudaSuccess) return code;
    }
  }
  return cudaSuccess;
}

int RealRuntime::launch(const CopyBlocks& k, CudaStream stream) { return launch_words(k, stream); }
int RealRuntime::launch(const ScatterKv& k, CudaStream stream) { return launch_words(k, stream); }
int RealRuntime::launch(const ScatterFp8& k, CudaStream stream) {
  if (k.count == 0) return cudaSuccess;
  return k.dispatch([&]<class Value, int kCount>() {
    return launch_grid<convert_values<Value, kCount>>(k, k.count, stream);
  });
}
int RealRuntime::launch(const GatherKv& k, CudaStream stream) { return launch_words(k, stream); }
int RealRuntime::launch(const TransferBlocks& k, CudaStream stream) {
  return launch_words(k, stream);
}
int RealRuntime::launch(const UpdateTables& k, CudaStream stream) {
  return k.words.count == 0 ? int{cudaSuccess} : launch_with<std::uint32_t>(k, stream);
}

}  // namespace pagedkv
