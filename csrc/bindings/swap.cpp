// Between tiers: the commands of BlockManager, and the TransferPlan that they return.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/manager.h"
#include "bindings/module.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

using Command = TransferPlan (BlockManager::*)(std::span<const SequenceId>);

auto plan_of(Command command) {
  return [command](const PyManager& self, const py::object& ids) {
    return enter(*self.state,
                 [&](BlockManager& core) { return (core.*command)(as_ids(Ints("ids", ids))); });
  };
}

auto apply(void (BlockManager::*command)(std::span<const SequenceId>)) {
  return [command](const PyManager& self, const py::object& ids) {
    enter(*self.state, [&](BlockManager& core) { (core.*command)(as_ids(Ints("ids", ids))); });
  };
}

// An id, or the plan that has it.
TransferId transfer_argument(const py::object& transfer) {
  if (py::isinstance<TransferPlan>(transfer)) return transfer.cast<const TransferPlan&>().id;
  return TransferId{int_argument("transfer", transfer)};
}

py::object transfer_or_none(TransferId id) {
  return id == TransferId::none ? py::object(py::none()) : py::int_(static_cast<std::int64_t>(id));
}

// Views of the plan's own memory, which they keep alive.
py::array copies_of(const py::object& self) {
  const auto& copies = self.cast<const TransferPlan&>().copies;
  return read_only(
      py::array_t<std::int32_t>({static_cast<py::ssize_t>(copies.size()), py::ssize_t{3}},
                                reinterpret_cast<const std::int32_t*>(copies.data()), self));
}

py::tuple state_of(const TransferPlan& plan) {
  return py::make_tuple(static_cast<std::int64_t>(plan.id), plan.target == Tier::device,
                        py::bytes(reinterpret_cast<const char*>(plan.copies.data()),
                                  plan.copies.size() * sizeof(BlockCopy)),
                        py::bytes(reinterpret_cast<const char*>(plan.wait_for.data()),
                                  plan.wait_for.size() * sizeof(TransferId)),
                        plan.after);
}

template <class T>
std::vector<T> from_bytes(const std::string& bytes) {
  if (bytes.size() % sizeof(T) != 0) throw InvalidSpec("not the pickle of a TransferPlan");
  const T* values = reinterpret_cast<const T*>(bytes.data());
  return {values, values + bytes.size() / sizeof(T)};
}

// Of the items of state_of().
TransferPlan plan_from(std::int64_t id, bool to_device, const py::bytes& copies,
                       const py::bytes& wait_for, std::int64_t after) {
  return {TransferId{id}, to_device ? Tier::device : Tier::host, from_bytes<BlockCopy>(copies),
          from_bytes<TransferId>(wait_for), after};
}

std::string repr_of_transfer(const TransferPlan& plan) {
  return "<TransferPlan id=" + std::to_string(static_cast<std::int64_t>(plan.id)) +
         " direction=" + (plan.target == Tier::device ? "in" : "out") +
         " num_copies=" + std::to_string(plan.copies.size()) + ">";
}

}  // namespace

void bind_transfer_plan(py::module_& m) {
  py::class_<TransferPlan> cls(m, "TransferPlan", py::is_final(),
                               "Copies of blocks between the device and the host tier.");
  cls.def_property_readonly("id",
                            [](const TransferPlan& p) { return static_cast<std::int64_t>(p.id); });
  cls.def_property_readonly(
      "direction", [](const TransferPlan& p) { return p.target == Tier::device ? "in" : "out"; });
  cls.def_property_readonly("after", [](const TransferPlan& p) { return p.after; });
  cls.def_property_readonly("num_copies", [](const TransferPlan& p) { return p.copies.size(); });
  cls.def_property_readonly("copies", &copies_of);
  cls.def_property_readonly("wait_for", [](const TransferPlan& p) { return ids_of(p.wait_for); });
  cls.def("__eq__", [](const TransferPlan& a, const py::object& b) -> py::object {
    if (!py::isinstance<TransferPlan>(b)) {
      return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    }
    return py::bool_(state_of(a).equal(state_of(b.cast<const TransferPlan&>())));
  });
  cls.def("__hash__", [](const TransferPlan& p) { return py::hash(state_of(p)); });
  cls.def("__repr__", &repr_of_transfer);
  // A pickle is the call that makes the value.
  cls.def(py::init(&plan_from));
  cls.def("__reduce__", [](const py::object& self) {
    return py::make_tuple(py::type::of(self), state_of(self.cast<const TransferPlan&>()));
  });

  py::class_<Aborted> aborted(m, "Aborted", py::is_final(), "What abort() took along.");
  aborted.def_property_readonly("transfers", [](const Aborted& a) { return ids_of(a.transfers); });
  aborted.def_property_readonly("sequences", [](const Aborted& a) { return ids_of(a.sequences); });
  aborted.def_property_readonly("waited_for",
                                [](const Aborted& a) { return ids_of(a.waited_for); });
}

void bind_swap(py::class_<PyManager>& cls) {
  cls.def("swap_out", plan_of(&BlockManager::swap_out), py::arg("ids"),
          "Move whole sequences to the host tier. Nothing of them is copied twice.");
  cls.def("swap_in", plan_of(&BlockManager::swap_in), py::arg("ids"),
          "Move whole sequences back to the device tier.");
  cls.def(
      "fetch",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return core.fetch(id_of(id)); });
      },
      py::arg("id"), "Bring what the host tier has of the prompt of create() or restore().");
  cls.def(
      "complete",
      [](const PyManager& self, const py::object& transfer) {
        enter(*self.state, [&](BlockManager& core) { core.complete(transfer_argument(transfer)); });
      },
      py::arg("transfer"), "All copies of a transfer have ended.");
  cls.def(
      "abort",
      [](const PyManager& self, const py::object& transfer) {
        return enter(*self.state,
                     [&](BlockManager& core) { return core.abort(transfer_argument(transfer)); });
      },
      py::arg("transfer"), "The copies of a transfer have ended and count for nothing.");
  cls.def(
      "transfers",
      [](const PyManager& self) {
        return ids_of(enter(*self.state, [](BlockManager& core) { return core.transfers(); }));
      },
      "Those planned that have not ended, by ascending id.");
  cls.def("drop", apply(&BlockManager::drop), py::arg("ids"),
          "Give up the paths of sequences, which remember their tokens: to be recomputed.");
  cls.def("restore", apply(&BlockManager::restore), py::arg("ids"),
          "Dropped sequences hold again what is still a prefix hit of their tokens.");
  cls.def(
      "tier",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return name(core.tier(id_of(id))); });
      },
      py::arg("id"), "\"device\" or \"host\".");
  cls.def(
      "is_dropped",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return core.is_dropped(id_of(id)); });
      },
      py::arg("id"), "Whether the sequence waits for restore().");
  cls.def(
      "is_resident",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return core.is_resident(id_of(id)); });
      },
      py::arg("id"), "Whether the sequence can be in a step now.");
  cls.def(
      "waits_for",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) {
          return transfer_or_none(core.waits_for(id_of(id)));
        });
      },
      py::arg("id"), "The transfer in flight that the sequence waits for, or None.");
}

}  // namespace pagedkv
