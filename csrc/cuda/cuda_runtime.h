// runtime.h carried out by CUDA itself.
#pragma once

#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace pagedkv {

class RealRuntime final : public CudaRuntime {
 public:
  std::string error_text(int code) override;
  void clear_error() override;

  int get_device(int* device) override;
  int set_device(int device) override;
  int load_kernels() override;

  int create_stream(CudaStream* stream) override;
  int destroy_stream(CudaStream stream) override;
  int synchronize(CudaStream stream) override;
  int device_of(CudaStream stream, int* device) override;
  int is_capturing(CudaStream stream, bool* capturing) override;

  int create_event(CudaEvent* event) override;
  int destroy_event(CudaEvent event) override;
  int record(CudaEvent event, CudaStream stream) override;
  int wait(CudaStream stream, CudaEvent event) override;
  int query(CudaEvent event) override;
  int synchronize(CudaEvent event) override;
  int elapsed(CudaEvent first, CudaEvent second, float* milliseconds) override;

  int copy(void* target, const void* source, std::size_t bytes, CudaStream stream) override;
  bool has_copy_batch() override;
  int copy_batch(void** targets, const void** sources, std::size_t* bytes, std::size_t count,
                 CudaStream stream) override;

  int allocate(void** memory, std::size_t bytes) override;
  int free(void* memory) override;
  bool reaches_host() override;
  int register_host(void* memory, std::size_t bytes) override;
  int unregister_host(void* memory) override;

  int launch(const CopyBlocks& kernel, CudaStream stream) override;
  int launch(const ScatterKv& kernel, CudaStream stream) override;
  int launch(const ScatterFp8& kernel, CudaStream stream) override;
  int launch(const GatherKv& kernel, CudaStream stream) override;
  int launch(const TransferBlocks& kernel, CudaStream stream) override;
  int launch(const UpdateTables& kernel, CudaStream stream) override;
};

}  // namespace pagedkv
