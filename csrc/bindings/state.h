// The state behind a Python BlockManager: core, and the gate that every call goes through.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <memory>

#include "bindings/gate.h"
#include "core/block_manager.h"

namespace pagedkv {

// The outputs of a StepPlan that are arrays.
enum class Output {
  input_ids,
  slots,
  positions,
  query_starts,
  seq_lens,
  block_tables,
  copies,
  table_updates,
  wait_for
};
inline constexpr int kNumOutputs = 9;
inline constexpr const char* kOutputNames[kNumOutputs] = {
    "input_ids",    "slots",  "positions",     "query_starts", "seq_lens",
    "block_tables", "copies", "table_updates", "wait_for"};

// For the arrays of plans, whose memory others still write to or read.
inline pybind11::array read_only(pybind11::array array) {
  pybind11::detail::array_proxy(array.ptr())->flags &=
      ~pybind11::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

// Shared by the manager and its plans. Arrays keep core alive, not this, so nothing is circular.
struct ManagerState {
  explicit ManagerState(const Config& config) : core(std::make_shared<BlockManager>(config)) {}

  // A view of the persistent buffers, made when its shape is first asked for.
  const pybind11::object& view(Output output);

  std::shared_ptr<BlockManager> core;
  Gate gate;

 private:
  struct View {
    std::array<std::int64_t, 2> shape{-1, -1};
    pybind11::object array;
  };
  pybind11::object make(Output output, std::int64_t rows, std::int64_t columns) const;

  std::array<View, kNumOutputs> views_;
};

template <class F>
auto enter(ManagerState& state, F&& call) {
  return state.gate.enter([&] { return call(*state.core); });
}

// A handle on the manager's buffers at one step, or (after copy() and pickling) arrays of its own.
struct StepPlanHandle {
  // Of the manager's step `number`, which is the last one appended.
  StepPlanHandle(std::shared_ptr<ManagerState> owner, std::int64_t number);
  // A value: `outputs` has an array for each Output, or None for absent input_ids. Throws
  // InvalidSpec if they do not fit together.
  StepPlanHandle(std::int64_t number, std::int64_t after, const pybind11::tuple& outputs);

  std::shared_ptr<ManagerState> state;  // null: a value
  std::int64_t step;
  pybind11::tuple arrays;  // of a value
  StepPlan value;          // views of them

  const StepPlan& plan() const;  // throws InvalidState once stale
  pybind11::object output(Output output) const;
};

}  // namespace pagedkv
