// What the files that bind BlockManager share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/buffers.h"
#include "bindings/state.h"

namespace pagedkv {

struct PyManager {
  std::shared_ptr<ManagerState> state;
};

using Ints = Argument<std::int64_t>;
using Tokens = Argument<Token>;

inline SequenceId id_of(const pybind11::object& id) { return SequenceId{int_argument("id", id)}; }

template <class Id>
pybind11::array_t<std::int64_t> ids_of(const std::vector<Id>& ids) {
  pybind11::array_t<std::int64_t> array(static_cast<pybind11::ssize_t>(ids.size()));
  std::copy(ids.begin(), ids.end(), reinterpret_cast<Id*>(array.mutable_data()));
  return array;
}

// swap_out() to restore(), and the questions about tiers.
void bind_swap(pybind11::class_<PyManager>& cls);

}  // namespace pagedkv
