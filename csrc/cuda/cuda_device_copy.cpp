// Copies: made such as CUDA takes them, by the method that is fastest here.
#include <algorithm>
#include <vector>

#include "cuda/cuda_device.h"
#include "cuda/cuda_error.h"
#include "cuda/kernels.h"
#include "cuda/staging.h"

namespace pagedkv {

namespace {

constexpr std::int64_t kMostPieceBytes = std::int64_t{64} << 10;  // of a kernel's work on one run
// Of one batched copy: what a call costs is spread by then. Others have reported that a driver
// (580.159, CUDA 13.0) crashes or hangs on tens of thousands.
constexpr std::size_t kMostBatched = 512;

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

void CudaDevice::prepare_memory(std::span<const CopyRun> runs) {
  check_open();
  const Guard guard(*this);
  static_cast<void>(prepare(runs));
}

void CudaDevice::copy(Stream stream, std::span<const CopyRun> runs) {
  check_open();
  const Guard guard(*this);
  Prepared all = prepare(runs);
  if (all.runs.empty()) return;
  sort_by_host(all.runs, all.direction);
  // Kernels are for pinned memory alone: other memory of the host they cannot reach.
  CopyMethod method = CopyMethod::loop;
  if (all.is_pinned) {
    method = methods_.choose(all.direction, all.runs, num_host_ranges(all.runs, all.direction));
  }
  if (method == CopyMethod::staged && staging(cuda(stream)) == nullptr) method = CopyMethod::batch;
  if (method == CopyMethod::batch && !can_batch(cuda(stream))) method = CopyMethod::loop;
  try {
    copy_by(method, cuda(stream), all.direction, all.runs);
  } catch (const std::exception& error) {
    if (!lost_.empty()) throw;
    // Some of the runs may be under way, and their memory is nobody else's before they have ended:
    // so it is the next record that has failed, and not this call.
    broken_.try_emplace(cuda(stream), error.what());
  }
}

CopyMethods CudaDevice::available_methods() {
  const Guard guard(*this);
  const bool reaches_host = runtime_->reaches_host();
  return CopyMethods(reaches_host && runtime_->has_copy_batch(), reaches_host);
}

// CUDA refuses batched copies on the legacy default stream.
bool CudaDevice::can_batch(CudaStream stream) const {
  return methods_.has(CopyMethod::batch) && !is_legacy(stream);
}

void CudaDevice::copy_by(CopyMethod method, CudaStream stream, Direction direction,
                         std::span<const CopyRun> sorted) {
  switch (method) {
    case CopyMethod::loop:
      for (const CopyRun& run : sorted) {
        check(runtime_->copy(run.target, run.source, run.bytes, stream), "cudaMemcpyAsync");
      }
      return;
    case CopyMethod::batch: return copy_by_batch(stream, sorted);
    case CopyMethod::kernel: return copy_by_kernel(stream, sorted, true);
    case CopyMethod::staged: return copy_by_staging(stream, direction, sorted);
  }
}

void CudaDevice::copy_by_batch(CudaStream stream, std::span<const CopyRun> runs) {
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<std::size_t> bytes;
  for (const CopyRun& run : runs) {
    targets.push_back(run.target);
    sources.push_back(run.source);
    bytes.push_back(run.bytes);
  }
  for (std::size_t first = 0; first < runs.size(); first += kMostBatched) {
    const std::size_t count = std::min(kMostBatched, runs.size() - first);
    check(runtime_->copy_batch(targets.data() + first, sources.data() + first, bytes.data() + first,
                               count, stream),
          "cudaMemcpyBatchAsync");
  }
}

// The staging of a stream, whose order keeps its rounds apart. Null if there is no memory for it:
// then no copy asks for it any more.
std::byte* CudaDevice::staging(CudaStream stream) {
  for (const auto& [owner, memory] : staging_) {
    if (owner == stream) return static_cast<std::byte*>(memory);
  }
  void* memory = nullptr;
  const int code = runtime_->allocate(&memory, options_.staging_bytes);
  if (is_sticky(code)) check(code, "cudaMalloc");
  if (code != 0) {
    runtime_->clear_error();
    methods_.rule_out_staging();
    return nullptr;
  }
  staging_.emplace_back(stream, memory);
  return static_cast<std::byte*>(memory);
}

void CudaDevice::copy_by_staging(CudaStream stream, Direction direction,
                                 std::span<const CopyRun> sorted) {
  const auto across = [&](std::span<const CopyRun> runs) {
    const Prepared all = prepare(runs);  // neighbours may have met over the end of a chunk
    const bool batch = all.runs.size() > 1 && can_batch(stream);
    copy_by(batch ? CopyMethod::batch : CopyMethod::loop, stream, direction, all.runs);
  };
  for (const StagedRound& round :
       staged_rounds(sorted, direction, staging(stream), options_.staging_bytes)) {
    if (direction == Direction::in) across(round.across);
    copy_by_kernel(stream, round.inside, false);
    if (direction == Direction::out) across(round.across);
  }
}

void CudaDevice::copy_by_kernel(CudaStream stream, std::span<const CopyRun> runs, bool across_bus) {
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
  // In parts that leave room in the ring for those before them.
  const std::size_t most =
      std::max<std::size_t>(transfer_ring_->capacity() / 4 / sizeof(TransferPiece), 1);
  for (std::size_t first = 0; first < pieces.size(); first += most) {
    const std::size_t count = std::min(most, pieces.size() - first);
    transfer_ring_->upload(
        stream, count * sizeof(TransferPiece),
        [&](std::byte* host) {
          std::copy_n(reinterpret_cast<const std::byte*>(pieces.data() + first),
                      count * sizeof(TransferPiece), host);
        },
        [&](std::byte* device) {
          const auto* there = reinterpret_cast<const TransferPiece*>(device);
          check(runtime_->launch(TransferBlocks::make(there, static_cast<std::int64_t>(count),
                                                      piece_bytes, all.word_bytes(), across_bus),
                                 stream),
                "transfer_blocks");
        });
  }
}

}  // namespace pagedkv
