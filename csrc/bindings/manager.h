// What the files that bind BlockManager share.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/buffers.h"
#include "bindings/state.h"

namespace pagedkv {

struct PyManager {
  std::shared_ptr<ManagerState> state;
};

using Ints = Argument<std::int64_t>;
using Tokens = Argument<Token>;

inline SequenceId id_of(const pybind11::object& id) { return SequenceId{int_argument("id", id)}; }

// swap_out() to restore(), and the questions about tiers.
void bind_swap(pybind11::class_<PyManager>& cls);

}  // namespace pagedkv
