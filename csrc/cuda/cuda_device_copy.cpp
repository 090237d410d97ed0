// Copies: made such as CUDA takes them, by the method that is fastest here.
#include <algorithm>
#include <chrono>
#include <vector>

#include "cuda/cuda_device.h"
#include "cuda/kernels.h"

namespace pagedkv {

namespace {

constexpr std::int64_t kMostPieceBytes = std::int64_t{64} << 10;  // of a kernel's work on one run

CudaStream cuda(Stream stream) {
  return reinterpret_cast<CudaStream>(static_cast<std::uintptr_t>(stream));
}

// Streams that CUDA refuses batched copies on: the legacy default stream, by its two names.
bool is_legacy(CudaStream stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 1; }

}  // namespace

// CUDA refuses a copy that reaches over the end of a registration, so each becomes one for each
// chunk of host memory that it touches. Those are pinned first, where they are not.
CudaDevice::Prepared CudaDevice::prepare(std::span<const CopyRun> runs) {
  Prepared all;
  all.runs.reserve(runs.size());
  for (const CopyRun& run : runs) {
    PinnedMemory* const target = find_host(run.target);
    PinnedMemory* const source = find_host(run.source);
    for (PinnedMemory* const memory : {target, source}) {
      if (memory == nullptr) continue;
      memory->lock(memory == target ? run.target : run.source, run.bytes);
      all.is_pinned &= memory->num_pageable_bytes() == 0;
    }
    all.is_pinned &= target != nullptr || source != nullptr;
    if (target != nullptr) all.direction = Direction::out;
    for (std::size_t at = 0, bytes = 0; at < run.bytes; at += bytes) {
      bytes = run.bytes - at;
      if (target != nullptr) bytes = std::min(bytes, target->left_in_chunk(run.target + at));
      if (source != nullptr) bytes = std::min(bytes, source->left_in_chunk(run.source + at));
      all.runs.push_back({run.target + at, run.source + at, bytes});
    }
  }
  return all;
}

void CudaDevice::copy(Stream stream, std::span<const CopyRun> runs) {
  check_open();
  const Guard guard(*this);
  const Prepared all = prepare(runs);
  if (all.runs.empty()) return;
  // The kernel is for pinned memory alone: other memory of the host it cannot reach.
  CopyMethod method = all.is_pinned ? methods_.choose(all.direction, all.runs) : CopyMethod::loop;
  if (method == CopyMethod::batch && is_legacy(cuda(stream))) method = CopyMethod::loop;
  try {
    copy_by(method, cuda(stream), all.runs);
  } catch (...) {
    // Some of the runs may be under way. Who is told that nothing was enqueued takes their memory
    // for other things, so they have to end first. A lost device runs nothing any more.
    if (lost_.empty() && runtime_->synchronize(cuda(stream)) != 0) runtime_->clear_error();
    throw;
  }
}

void CudaDevice::copy_by(CopyMethod method, CudaStream stream, std::span<const CopyRun> runs) {
  if (method == CopyMethod::kernel) return copy_by_kernel(stream, runs);
  if (method == CopyMethod::loop) {
    for (const CopyRun& run : runs) {
      check(runtime_->copy(run.target, run.source, run.bytes, stream), "cudaMemcpyAsync");
    }
    return;
  }
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<std::size_t> bytes;
  for (const CopyRun& run : runs) {
    targets.push_back(run.target);
    sources.push_back(run.source);
    bytes.push_back(run.bytes);
  }
  check(runtime_->copy_batch(targets.data(), sources.data(), bytes.data(), bytes.size(), stream),
        "cudaMemcpyBatchAsync");
}

void CudaDevice::copy_by_kernel(CudaStream stream, std::span<const CopyRun> runs) {
  Alignment all;
  std::int64_t largest = 0;
  for (const CopyRun& run : runs) {
    all.with(run.target).with(run.source).with(static_cast<std::int64_t>(run.bytes));
    largest = std::max(largest, static_cast<std::int64_t>(run.bytes));
  }
  const std::int64_t piece_bytes = std::min(largest, kMostPieceBytes);
  std::vector<TransferPiece> pieces;
  for (const CopyRun& run : runs) {
    const auto bytes = static_cast<std::int64_t>(run.bytes);
    for (std::int64_t at = 0; at < bytes; at += piece_bytes) {
      pieces.push_back({run.target + at, run.source + at, std::min(piece_bytes, bytes - at)});
    }
  }
  const std::size_t size = pieces.size() * sizeof(TransferPiece);
  transfer_ring_->upload(
      stream, size,
      [&](std::byte* host) {
        std::copy_n(reinterpret_cast<const std::byte*>(pieces.data()), size, host);
      },
      [&](std::byte* device) {
        check(runtime_->launch(TransferBlocks::make(reinterpret_cast<const TransferPiece*>(device),
                                                    static_cast<std::int64_t>(pieces.size()),
                                                    piece_bytes, all.word_bytes()),
                               stream),
              "transfer_blocks");
      });
}

void CudaDevice::calibrate() {
  check_open();
  const std::size_t size = options_.calibration_bytes;
  const Guard guard(*this);
  PinnedMemory host(runtime_, options_.index, size, {.chunk_bytes = size, .ahead = false});
  host.lock_all();
  void* memory = nullptr;
  check(runtime_->allocate(&memory, size), "cudaMalloc");
  CudaStream stream = nullptr;
  const auto measure = [&](CopyMethod method, Direction direction, std::size_t piece) {
    std::vector<CopyRun> runs;  // every other piece, so that no two are neighbours
    for (std::size_t at = 0; at + piece <= size; at += 2 * piece) {
      std::byte* const there = static_cast<std::byte*>(memory) + at;
      std::byte* const here = host.data() + at;
      runs.push_back(direction == Direction::out ? CopyRun{here, there, piece}
                                                 : CopyRun{there, here, piece});
    }
    // What is not pinned no kernel can reach; and a method that is refused is not to be had here.
    if (method == CopyMethod::kernel && host.num_pageable_bytes() > 0) return 0.0;
    double best = 1e9;
    bool refused = false;
    for (int round = 0; round < 3 && !refused; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      try {
        copy_by(method, stream, runs);
      } catch (const DeviceError&) {
        if (!lost_.empty()) throw;
        refused = true;
      }
      check(runtime_->synchronize(stream), "cudaStreamSynchronize");
      best = std::min(
          best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return refused ? 0.0 : static_cast<double>(runs.size() * piece) / std::max(best, 1e-9);
  };
  const auto give_back = [&] {
    if (stream != nullptr && runtime_->destroy_stream(stream) != 0) runtime_->clear_error();
    if (runtime_->free(memory) != 0) runtime_->clear_error();
  };
  try {
    check(runtime_->create_stream(&stream), "cudaStreamCreateWithFlags");
    methods_.calibrate(measure);
  } catch (...) {
    if (stream != nullptr) static_cast<void>(runtime_->synchronize(stream));
    give_back();
    throw;
  }
  give_back();
}

}  // namespace pagedkv
