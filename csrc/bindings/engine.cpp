// Devices, and the engine that carries out transfers on them.
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bindings/gate.h"
#include "bindings/manager.h"
#include "bindings/module.h"
#include "bindings/pools.h"
#include "host/host_device.h"
#include "host/simulated_device.h"
#include "transfer/transfer_engine.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

struct PyEngine {
  PyEngine() = default;
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  ~PyEngine() {
    try {
      if (engine) engine->close();
    } catch (const Error&) {
      owner.release();  // copies may be under way: its memory is never given back
    }
  }

  py::object owner;  // of the memory that is copied: outlives the engine, which waits when it ends
  std::unique_ptr<TransferEngine> engine;
  Gate gate;
};

template <class F>
auto enter(PyEngine& self, F&& call) {
  return self.gate.enter([&] { return call(*self.engine); });
}

// Waiting lets other Python threads run, which then must not enter.
template <class F>
auto enter_long(PyEngine& self, F&& call) {
  return enter(self, [&](TransferEngine& engine) {
    const py::gil_scoped_release release;
    return call(engine);
  });
}

std::unique_ptr<PyEngine> make_engine(std::shared_ptr<Device> device,
                                      const py::sequence& block_runs,
                                      std::int32_t num_device_blocks, std::int32_t num_host_blocks,
                                      py::object owner) {
  auto self = std::make_unique<PyEngine>();
  self->owner = std::move(owner);
  self->engine =
      std::make_unique<TransferEngine>(std::move(device), runs_of<BlockRun>(block_runs),
                                       EngineOptions{num_device_blocks, num_host_blocks});
  return self;
}

void engine_step(PyEngine& self, const StepPlanHandle& plan) {
  // Copied: while this waits, another thread may open the manager's next step.
  const std::span<const TransferId> view = plan.plan().wait_for;
  const std::vector<TransferId> wait_for(view.begin(), view.end());
  if (wait_for.empty()) return enter(self, [](TransferEngine& engine) { engine.step({}); });
  enter_long(self, [&](TransferEngine& engine) { engine.step(wait_for); });
}

void poll(PyEngine& self, py::list told) {
  for (const auto& ended : enter(self, [](TransferEngine& engine) { return engine.poll(); })) {
    told.append(py::make_tuple(static_cast<std::int64_t>(ended.id),
                               ended.failed ? py::object(py::str(ended.why)) : py::none(),
                               ended.seconds));
  }
}

TransferId transfer_id(std::int64_t transfer) { return TransferId{transfer}; }

void bind_engine_class(py::module_& m) {
  py::class_<PyEngine>(
      m, "TransferEngine", py::is_final(),
      "Carries out transfer plans on a device. Keeps `owner`, whose memory it is, alive.")
      .def(py::init(&make_engine), py::arg("device"), py::arg("block_runs"),
           py::arg("num_device_blocks"), py::arg("num_host_blocks"), py::kw_only(),
           py::arg("owner") = py::none())
      .def(
          "submit",
          [](PyEngine& self, const TransferPlan& plan) {
            enter(self, [&](TransferEngine& engine) { engine.submit(plan); });
          },
          py::arg("plan"), "Queue a plan behind all that the caller's stream was given.")
      .def("step", &engine_step, py::arg("plan"),
           "Make the caller's stream wait for what a step has to wait for.")
      .def(
          "follow", [](PyEngine& self) { enter(self, [](TransferEngine& e) { e.follow(); }); },
          "Make the caller's stream continue the one that he was on before.")
      .def(
          "has_moved", [](const PyEngine& self) { return self.engine->has_moved(); },
          "False if follow() has nothing to do.")
      .def(
          "poll", &poll, py::arg("told"),
          "Append what has ended since: (id, why it failed or None, seconds that its copies took).")
      .def(
          "wait",
          [](PyEngine& self, std::int64_t transfer) {
            enter_long(self, [&](TransferEngine& engine) { engine.wait(transfer_id(transfer)); });
          },
          py::arg("transfer"), "Return when a transfer has ended, which poll() tells.")
      .def(
          "cancel",
          [](PyEngine& self, std::int64_t transfer) {
            return enter(self, [&](TransferEngine& e) { return e.cancel(transfer_id(transfer)); });
          },
          py::arg("transfer"), "False: its copies have begun, or ended.")
      .def(
          "close",
          [](PyEngine& self) { enter_long(self, [](TransferEngine& engine) { engine.close(); }); },
          "Cancel what has not begun, wait for the rest, give the host tier back.")
      .def(
          "in_flight",
          [](const PyEngine& self, std::int64_t transfer) {
            return self.engine->in_flight(transfer_id(transfer));
          },
          py::arg("transfer"), "Whether poll() has still to tell its end.")
      .def_property_readonly("num_in_flight",
                             [](const PyEngine& self) { return self.engine->num_in_flight(); })
      .def_property_readonly("host_bytes",
                             [](const PyEngine& self) { return self.engine->host_bytes(); })
      .def_property_readonly("num_runs",
                             [](const PyEngine& self) { return self.engine->num_runs(); });
}

template <class T>
T named(const char* argument, const std::string& name, const std::map<std::string, T>& values) {
  const auto found = values.find(name);
  if (found != values.end()) return found->second;
  std::string text = std::string(argument) + " is \"" + name + "\", expected one of";
  for (const auto& value : values) text += " " + value.first;
  throw InvalidSpec(text);
}

void bind_simulated_device(py::module_& m) {
  py::class_<SimulatedDevice, Device, std::shared_ptr<SimulatedDevice>>(
      m, "SimulatedDevice", py::is_final(),
      "A machine whose copies run late, torn and out of order, as far as their order allows.")
      .def(py::init([](std::uint64_t seed, const std::string& schedule, int num_compute_streams,
                       std::size_t max_events) {
             SimulatedOptions options;
             options.seed = seed;
             options.schedule = schedule_of(schedule);
             options.num_compute_streams = num_compute_streams;
             options.max_events = max_events;
             options.granule_bytes = 16;
             return std::make_shared<SimulatedDevice>(options);
           }),
           py::arg("seed") = 0, py::kw_only(), py::arg("schedule") = "random",
           py::arg("num_compute_streams") = 1, py::arg("max_events") = std::size_t{1} << 20)
      .def("use_compute_stream", &SimulatedDevice::use_compute_stream, py::arg("index"))
      .def("hold_next", &SimulatedDevice::hold_next)
      .def("fail_copy", &SimulatedDevice::fail_copy, py::arg("k") = 1)
      .def("fail_allocate", &SimulatedDevice::fail_allocate, py::arg("k") = 1)
      .def("lose", &SimulatedDevice::lose)
      .def(
          "skip",
          [](SimulatedDevice& self, const std::string& site) {
            self.skip(
                named<FenceSite>("site", site,
                                 {{"transfer_after_compute", FenceSite::transfer_after_compute},
                                  {"transfer_after_transfer", FenceSite::transfer_after_transfer},
                                  {"step_after_transfer", FenceSite::step_after_transfer},
                                  {"stream_after_stream", FenceSite::stream_after_stream}}));
          },
          py::arg("site"))
      .def_property_readonly("violations",
                             [](const SimulatedDevice& self) {
                               std::vector<std::string> all;
                               for (const auto& v : self.violations()) all.push_back(v.text);
                               return all;
                             })
      .def_property_readonly("num_events", &SimulatedDevice::num_events)
      .def_property_readonly("num_pending", &SimulatedDevice::num_pending)
      .def_property_readonly("host_bytes", &SimulatedDevice::host_bytes);
}

}  // namespace

Schedule schedule_of(const std::string& name) {
  return named<Schedule>(
      "schedule", name,
      {{"eager", Schedule::eager}, {"lazy", Schedule::lazy}, {"random", Schedule::random}});
}

void bind_engine(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "Streams, copies and events.")
      .def_property_readonly("num_host_waits", &Device::num_host_waits)
      .def("close", [](Device& self) {
        const py::gil_scoped_release release;
        self.close();
      });
  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(
      m, "HostDevice", py::is_final(), "This process: copies run on worker threads.")
      .def(py::init([] { return std::make_shared<HostDevice>(); }));
  bind_simulated_device(m);
  bind_engine_class(m);
}

}  // namespace pagedkv
