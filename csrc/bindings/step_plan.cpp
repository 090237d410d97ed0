// StepPlan: views of the persistent buffers, and values made of them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/module.h"
#include "bindings/state.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

// Read only; its base is the same array to be written in, which torch asks for.
template <class T, class Memory>
py::array strided(const Memory* data, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                  py::handle owner) {
  constexpr auto size = static_cast<py::ssize_t>(sizeof(T));
  const auto* values = reinterpret_cast<const T*>(data);
  const auto array = columns < 0
                         ? py::array_t<T>({rows}, {size}, values, owner)
                         : py::array_t<T>({rows, columns}, {stride * size, size}, values, owner);
  return read_only(array.attr("view")());
}

}  // namespace

const py::object& ManagerState::view(Output output) {
  const StepPlan& plan = core->plan();
  std::int64_t rows = 0;
  std::int64_t columns = -1;
  switch (output) {
    case Output::input_ids:
    case Output::slots:
    case Output::positions: rows = plan.num_tokens; break;
    case Output::query_starts: rows = plan.batch_size + 1; break;
    case Output::seq_lens: rows = plan.batch_size; break;
    case Output::block_tables: rows = plan.batch_size, columns = plan.table_width; break;
    case Output::copies: rows = static_cast<std::int64_t>(plan.copies.size()), columns = 3; break;
    case Output::table_updates:
      rows = static_cast<std::int64_t>(plan.table_updates.size()), columns = 3;
      break;
    case Output::wait_for: rows = static_cast<std::int64_t>(plan.wait_for.size()); break;
  }
  View& view = views_[static_cast<std::size_t>(output)];
  const bool kept = view.array && output != Output::wait_for;
  if (!kept || view.shape[0] != rows || view.shape[1] != columns) {
    view.array = make(output, rows, columns);
    view.shape = {rows, columns};
  }
  return view.array;
}

py::object ManagerState::make(Output output, std::int64_t rows, std::int64_t columns) const {
  const StepPlan& plan = core->plan();
  const py::capsule owner(new std::shared_ptr<BlockManager>(core),
                          [](void* p) { delete static_cast<std::shared_ptr<BlockManager>*>(p); });
  using i32 = std::int32_t;
  using i64 = std::int64_t;
  switch (output) {
    case Output::input_ids: return strided<i64>(plan.input_ids, rows, -1, 1, owner);
    case Output::slots: return strided<i64>(plan.slots, rows, -1, 1, owner);
    case Output::positions: return strided<i64>(plan.positions, rows, -1, 1, owner);
    case Output::query_starts: return strided<i32>(plan.query_starts, rows, -1, 1, owner);
    case Output::seq_lens: return strided<i32>(plan.seq_lens, rows, -1, 1, owner);
    case Output::block_tables:
      return strided<i32>(plan.block_tables, rows, columns, plan.table_stride, owner);
    case Output::copies: return strided<i32>(plan.copies.data(), rows, columns, 3, owner);
    case Output::table_updates:
      return strided<i32>(plan.table_updates.data(), rows, columns, 3, owner);
    case Output::wait_for: break;
  }
  // A copy: of these alone there is no most, so their memory moves.
  const py::array_t<i64> copy(rows, reinterpret_cast<const i64*>(plan.wait_for.data()));
  return read_only(copy.attr("view")());
}

namespace {

// One array of a value, [rows], or [rows, columns] if columns is not -1; what is -2 may be
// anything.
template <class T>
std::span<const T> array_of(const py::tuple& arrays, Output output, std::int64_t rows,
                            std::int64_t columns = -1) {
  const auto i = static_cast<std::size_t>(output);
  const py::object object = arrays[i];
  if (py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    const bool fits = array.ndim() == (columns == -1 ? 1 : 2) &&
                      (rows == -2 || array.shape(0) == rows) &&
                      (columns < 0 || array.shape(1) == columns);
    if (fits) {
      return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
    }
  }
  throw InvalidSpec(std::string("the plan's ") + kOutputNames[i] +
                    " is not what a StepPlan has: it is damaged, or of another version");
}

template <class Row>
std::span<const Row> rows_of(const py::tuple& arrays, Output output, std::int64_t most) {
  const std::span<const std::int32_t> cells = array_of<std::int32_t>(arrays, output, -2, 3);
  if (static_cast<std::int64_t>(cells.size()) > 3 * most) {
    throw InvalidSpec("the plan has more copies or updates than sequences");
  }
  return {reinterpret_cast<const Row*>(cells.data()), cells.size() / 3};
}

StepPlan value_of_arrays(std::int64_t step, std::int64_t after, const py::tuple& arrays) {
  if (arrays.size() != static_cast<std::size_t>(kNumOutputs)) {
    throw InvalidSpec("not the pickle of a StepPlan of this version");
  }
  StepPlan plan;
  plan.step = step;
  plan.after = after;
  const auto lens = array_of<std::int32_t>(arrays, Output::seq_lens, -2);
  const auto slots = array_of<std::int64_t>(arrays, Output::slots, -2);
  const auto num_rows = static_cast<std::int64_t>(lens.size());
  plan.batch_size = static_cast<std::int32_t>(num_rows);
  plan.num_tokens = static_cast<std::int64_t>(slots.size());
  plan.seq_lens = lens.data();
  plan.slots = slots.data();
  plan.positions = array_of<std::int64_t>(arrays, Output::positions, plan.num_tokens).data();
  const auto starts = array_of<std::int32_t>(arrays, Output::query_starts, num_rows + 1);
  if (starts.front() != 0 || starts.back() != plan.num_tokens || !std::ranges::is_sorted(starts)) {
    throw InvalidSpec("the plan's query_starts do not divide its tokens");
  }
  plan.query_starts = starts.data();
  plan.has_tokens = !py::object(arrays[static_cast<std::size_t>(Output::input_ids)]).is_none();
  if (plan.has_tokens) {
    plan.input_ids = array_of<std::int64_t>(arrays, Output::input_ids, plan.num_tokens).data();
  }
  const auto tables = array_of<std::int32_t>(arrays, Output::block_tables, num_rows, -2);
  plan.block_tables = reinterpret_cast<const BlockId*>(tables.data());
  plan.table_width = num_rows > 0 ? static_cast<std::int32_t>(tables.size()) / plan.batch_size : 0;
  plan.table_stride = plan.table_width;
  plan.copies = rows_of<BlockCopy>(arrays, Output::copies, num_rows);
  plan.table_updates = rows_of<TableUpdate>(arrays, Output::table_updates, num_rows);
  for (const TableUpdate& update : plan.table_updates) {
    if (update.row >= 0 && update.row < num_rows && update.first >= 0 &&
        update.first <= update.last) {
      continue;
    }
    throw InvalidSpec("the plan's table_updates name cells that are not in its tables");
  }
  const auto waits = array_of<std::int64_t>(arrays, Output::wait_for, -2);
  plan.wait_for = {reinterpret_cast<const TransferId*>(waits.data()), waits.size()};
  return plan;
}

// Those that came in read-only memory are copied, since torch makes no tensors of them.
py::tuple writable(const py::tuple& arrays) {
  py::tuple result(arrays.size());
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const py::object array = arrays[i];
    const bool copies = py::isinstance<py::array>(array) && !py::array(array).writeable();
    result[i] = copies ? array.attr("copy")() : array;
  }
  return result;
}

}  // namespace

StepPlanHandle::StepPlanHandle(std::shared_ptr<ManagerState> owner, std::int64_t number)
    : state(std::move(owner)), step(number), arrays(py::reinterpret_steal<py::tuple>(nullptr)) {}

StepPlanHandle::StepPlanHandle(std::int64_t number, std::int64_t after, const py::tuple& outputs)
    : step(number), arrays(writable(outputs)), value(value_of_arrays(step, after, arrays)) {}

const StepPlan& StepPlanHandle::plan() const {
  if (!state) return value;
  const StepPlan& plan = state->core->plan();
  if (plan.step != step) {
    throw InvalidState("this plan is of step " + std::to_string(step) +
                       " and its buffers now hold step " + std::to_string(plan.step) +
                       ": read a plan before the next append, or copy() it");
  }
  return plan;
}

py::object StepPlanHandle::output(Output output) const {
  if (!state) return arrays[static_cast<std::size_t>(output)];
  if (!plan().has_tokens && output == Output::input_ids) return py::none();
  return state->view(output);
}

namespace {

StepPlanHandle value_of(const StepPlanHandle& handle) {
  py::tuple arrays(kNumOutputs);
  for (int i = 0; i < kNumOutputs; ++i) {
    const py::object array = handle.output(static_cast<Output>(i));
    arrays[static_cast<std::size_t>(i)] = array.is_none() ? array : array.attr("copy")();
  }
  return {handle.step, handle.plan().after, arrays};
}

bool equal(const StepPlanHandle& a, const StepPlanHandle& b) {
  if (a.step != b.step || a.plan().after != b.plan().after) return false;
  const py::object array_equal = py::module_::import("numpy").attr("array_equal");
  for (int i = 0; i < kNumOutputs; ++i) {
    const py::object x = a.output(static_cast<Output>(i));
    const py::object y = b.output(static_cast<Output>(i));
    if (x.is_none() != y.is_none()) return false;
    if (!x.is_none() && !array_equal(x, y).cast<bool>()) return false;
  }
  return true;
}

std::string repr_of_step(const StepPlanHandle& handle) {
  if (handle.state && handle.state->core->plan().step != handle.step) {
    return "<StepPlan step=" + std::to_string(handle.step) + " stale>";
  }
  return "<StepPlan step=" + std::to_string(handle.step) +
         " batch_size=" + std::to_string(handle.plan().batch_size) +
         " num_tokens=" + std::to_string(handle.plan().num_tokens) +
         " num_copies=" + std::to_string(handle.plan().copies.size()) + ">";
}

}  // namespace

void bind_step_plan(py::module_& m) {
  py::class_<StepPlanHandle> cls(
      m, "StepPlan", py::is_final(),
      "Read-only views of the manager's buffers, valid until the next append; copy() keeps them.");
  cls.def_property_readonly("step", [](const StepPlanHandle& h) { return h.step; });
  cls.def_property_readonly("after", [](const StepPlanHandle& h) { return h.plan().after; });
  cls.def_property_readonly("batch_size",
                            [](const StepPlanHandle& h) { return h.plan().batch_size; });
  cls.def_property_readonly("num_tokens",
                            [](const StepPlanHandle& h) { return h.plan().num_tokens; });
  cls.def_property_readonly("num_copies",
                            [](const StepPlanHandle& h) { return h.plan().copies.size(); });
  for (int i = 0; i < kNumOutputs; ++i) {
    const auto output = static_cast<Output>(i);
    cls.def_property_readonly(kOutputNames[i],
                              [output](const StepPlanHandle& h) { return h.output(output); });
  }
  cls.def("copy", &value_of, "The same plan as a value that stays.");
  cls.def("__eq__", [](const StepPlanHandle& a, const py::object& b) -> py::object {
    if (!py::isinstance<StepPlanHandle>(b)) {
      return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    }
    return py::bool_(equal(a, b.cast<const StepPlanHandle&>()));
  });
  cls.attr("__hash__") = py::none();
  cls.def("__repr__", &repr_of_step);
  // A pickle is the call that makes the value.
  cls.def(py::init<std::int64_t, std::int64_t, py::tuple>());
  cls.def("__reduce__", [](const py::object& self) {
    const auto& h = self.cast<const StepPlanHandle&>();
    const StepPlanHandle value = h.state ? value_of(h) : h;
    return py::make_tuple(py::type::of(self),
                          py::make_tuple(value.step, value.value.after, value.arrays));
  });
}

}  // namespace pagedkv
