// The calls of CUDA's runtime that this folder makes, and no others: so that all but the calls
// themselves is tested on machines without a GPU, against a runtime that keeps CUDA's order and no
// more. Nothing here needs CUDA's headers.
//
// Every call returns CUDA's error code, 0 for success. Calls work on the current device of the
// calling thread, except where a stream or an event names its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace pagedkv {

// CUDA's own handles, which torch and others pass as integers.
using CudaStream = struct CUstream_st*;
using CudaEvent = struct CUevent_st*;

// Streams that are the current device's: the legacy default stream, by its two names, and the
// default stream of each thread.
inline bool is_legacy(CudaStream stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 1; }
inline bool is_default(CudaStream stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 2; }

struct CopyBlocks;  // kernels.h has these
struct ScatterKv;
struct ScatterFp8;  // scatter_fp8.h
struct GatherKv;
struct TransferBlocks;
struct UpdateTables;

class CudaRuntime {
 public:
  virtual ~CudaRuntime() = default;

  virtual std::string error_text(int code) = 0;  // CUDA's name and words
  virtual void clear_error() = 0;                // so that nobody else finds a failure of ours

  virtual int get_device(int* device) = 0;
  virtual int set_device(int device) = 0;
  // All kernels, onto the current device: a first launch would wait for what is running.
  virtual int load_kernels() = 0;

  // One that the legacy stream does not wait for.
  virtual int create_stream(CudaStream* stream) = 0;
  virtual int destroy_stream(CudaStream stream) = 0;
  virtual int synchronize(CudaStream stream) = 0;
  // Not of one that is being captured.
  virtual int device_of(CudaStream stream, int* device) = 0;
  virtual int is_capturing(CudaStream stream, bool* capturing) = 0;  // into a graph

  virtual int create_event(CudaEvent* event) = 0;  // with timing
  virtual int destroy_event(CudaEvent event) = 0;
  virtual int record(CudaEvent event, CudaStream stream) = 0;
  virtual int wait(CudaStream stream, CudaEvent event) = 0;
  virtual int query(CudaEvent event) = 0;  // kNotReady while pending
  virtual int synchronize(CudaEvent event) = 0;
  virtual int elapsed(CudaEvent first, CudaEvent second, float* milliseconds) = 0;

  virtual int copy(void* target, const void* source, std::size_t bytes, CudaStream stream) = 0;
  // Copies without an order among themselves. Not on the legacy stream, and only where
  // reaches_host(): for others CUDA ends in an illegal address.
  virtual bool has_copy_batch() = 0;
  virtual int copy_batch(void** targets, const void** sources, std::size_t* bytes,
                         std::size_t count, CudaStream stream) = 0;

  virtual int allocate(void** memory, std::size_t bytes) = 0;  // on the device
  virtual int free(void* memory) = 0;
  // Whether the current device reaches pinned memory at the host's own addresses.
  virtual bool reaches_host() = 0;
  // Pinned, for all devices. Called from helper threads, too.
  virtual int register_host(void* memory, std::size_t bytes) = 0;
  virtual int unregister_host(void* memory) = 0;

  virtual int launch(const CopyBlocks& kernel, CudaStream stream) = 0;
  virtual int launch(const ScatterKv& kernel, CudaStream stream) = 0;
  virtual int launch(const ScatterFp8& kernel, CudaStream stream) = 0;
  virtual int launch(const GatherKv& kernel, CudaStream stream) = 0;
  virtual int launch(const TransferBlocks& kernel, CudaStream stream) = 0;
  virtual int launch(const UpdateTables& kernel, CudaStream stream) = 0;

  static constexpr int kSuccess = 0;
  static constexpr int kNotReady = 600;  // cudaErrorNotReady
};

std::shared_ptr<CudaRuntime> real_runtime();  // CUDA's own; where cmake/cuda.cmake found nvcc

}  // namespace pagedkv
