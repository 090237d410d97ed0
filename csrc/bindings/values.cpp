// Frozen values: PrefixHit, TierStats, Stats, Snapshot.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "core/block_manager.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

template <class T, class M>
struct Field {
  const char* name;
  M T::* member;
};
template <class T, class M>
Field(const char*, M T::*) -> Field<T, M>;

// A pickle is the call that makes the value, of all its fields.
template <class T, class... M>
void make_picklable(py::class_<T>& cls, Field<T, M>... fields) {
  cls.def(py::init([fields...](M... values) {
    T value;
    ((value.*fields.member = std::move(values)), ...);
    return value;
  }));
  cls.def("__reduce__", [fields...](const py::object& self) {
    const T& value = self.cast<const T&>();
    return py::make_tuple(py::type::of(self), py::make_tuple(value.*fields.member...));
  });
}

// A class with read-only fields that compares, hashes and prints as the tuple of them.
template <class T, class... M>
void bind_value(py::module_& m, const char* name, const char* doc, Field<T, M>... fields) {
  py::class_<T> cls(m, name, py::is_final(), doc);
  make_picklable(cls, fields...);
  (cls.def_readonly(fields.name, fields.member), ...);
  const auto key = [fields...](const T& value) { return py::make_tuple(value.*fields.member...); };
  cls.def("__eq__", [key](const T& a, const py::object& b) -> py::object {
    if (!py::isinstance<T>(b)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    return py::bool_(key(a).equal(key(b.cast<const T&>())));
  });
  cls.def("__hash__", [key](const T& value) { return py::hash(key(value)); });
  cls.def("__repr__", [name = std::string(name), fields...](const T& value) {
    std::string text = name + "(";
    bool first = true;
    ((text += (std::exchange(first, false) ? "" : ", ") + std::string(fields.name) + "=" +
              std::string(py::repr(py::cast(value.*fields.member)))),
     ...);
    return text + ")";
  });
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  py::array_t<T> array(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

// A class whose fields are vectors, read as arrays.
template <class T, class... E>
void bind_arrays(py::module_& m, const char* name, const char* doc,
                 Field<T, std::vector<E>>... fields) {
  py::class_<T> cls(m, name, py::is_final(), doc);
  make_picklable(cls, fields...);
  cls.def("__eq__", [fields...](const T& a, const py::object& b) -> py::object {
    if (!py::isinstance<T>(b)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    const T& other = b.cast<const T&>();
    return py::bool_(((a.*fields.member == other.*fields.member) && ...));
  });
  cls.attr("__hash__") = py::none();
  (cls.def_property_readonly(fields.name,
                             [fields](const T& value) { return array_of(value.*fields.member); }),
   ...);
}

}  // namespace

void bind_values(py::module_& m) {
  bind_value(m, "PrefixHit", "What a lookup found.", Field{"num_tokens", &PrefixHit::num_tokens},
             Field{"num_full_blocks", &PrefixHit::num_full_blocks},
             Field{"num_partial_tokens", &PrefixHit::num_partial_tokens},
             Field{"num_host_tokens", &PrefixHit::num_host_tokens});
  bind_value(m, "TierStats", "Blocks of one tier: free + active + cached == num_blocks.",
             Field{"num_blocks", &TierStats::num_blocks}, Field{"num_free", &TierStats::num_free},
             Field{"num_active", &TierStats::num_active},
             Field{"num_cached", &TierStats::num_cached});
  bind_value(
      m, "Stats", "Counts of a BlockManager at one moment, and totals since it was made.",
      Field{"device", &Stats::device}, Field{"host", &Stats::host},
      Field{"num_sequences", &Stats::num_sequences},
      Field{"num_logical_blocks", &Stats::num_logical_blocks},
      Field{"num_peak_blocks", &Stats::num_peak_blocks}, Field{"num_steps", &Stats::num_steps},
      Field{"num_appended_tokens", &Stats::num_appended_tokens},
      Field{"num_hit_tokens", &Stats::num_hit_tokens}, Field{"num_copies", &Stats::num_copies},
      Field{"num_merged_blocks", &Stats::num_merged_blocks},
      Field{"num_evicted_blocks", &Stats::num_evicted_blocks},
      Field{"num_swapped_out_blocks", &Stats::num_swapped_out_blocks},
      Field{"num_swapped_in_blocks", &Stats::num_swapped_in_blocks},
      Field{"num_transfers", &Stats::num_transfers},
      Field{"metadata_bytes", &Stats::metadata_bytes});

  bind_arrays(
      m, "Snapshot", "The block tree at one moment, parents before children.",
      Field{"parents", &Snapshot::parents}, Field{"blocks", &Snapshot::blocks},
      Field{"num_tokens", &Snapshot::num_tokens}, Field{"counts", &Snapshot::counts},
      Field{"published", &Snapshot::published}, Field{"host_blocks", &Snapshot::host_blocks},
      Field{"host_counts", &Snapshot::host_counts}, Field{"sequence_ids", &Snapshot::sequence_ids},
      Field{"sequence_nodes", &Snapshot::sequence_nodes},
      Field{"sequence_lengths", &Snapshot::sequence_lengths},
      Field{"sequence_tiers", &Snapshot::sequence_tiers});
}

}  // namespace pagedkv
