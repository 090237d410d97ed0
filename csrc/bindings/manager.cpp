// BlockManager for Python: one native call per command, buffers in and out.
#include "bindings/manager.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <random>

#include "bindings/module.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

// Tables are touched when they are made: refuse what would drive the machine out of memory.
void check_memory(const Config& config) {
  config.validate();
  const double bytes = BlockManager::metadata_bytes(config);
  const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE));
  if (bytes < memory) return;
  throw InvalidSpec("num_device_blocks and num_host_blocks need tables of " +
                    std::to_string(static_cast<std::int64_t>(bytes / (1 << 30))) +
                    " GiB, more than this machine's memory");
}

PyManager make_manager(const py::object& num_device_blocks, const py::object& num_host_blocks,
                       const py::object& block_size, const py::object& max_batch,
                       const py::object& max_model_len, const py::object& watermark) {
  Config config;
  config.num_device_blocks = int_argument("num_device_blocks", num_device_blocks);
  config.num_host_blocks = int_argument("num_host_blocks", num_host_blocks);
  config.block_size = int_argument("block_size", block_size);
  config.max_batch = int_argument("max_batch", max_batch);
  if (!max_model_len.is_none()) config.max_model_len = int_argument("max_model_len", max_model_len);
  config.watermark = int_argument("watermark", watermark);
  std::random_device device;
  config.seed = (std::uint64_t{device()} << 32) | device();
  check_memory(config);
  try {
    return {std::make_shared<ManagerState>(config)};
  } catch (const std::bad_alloc&) {
    throw InvalidSpec(
        "num_device_blocks, max_batch and max_model_len need tables larger than memory: make them "
        "smaller");
  }
}

std::int64_t create(const PyManager& m, const py::object& tokens, const py::object& salt) {
  return enter(*m.state, [&](BlockManager& core) {
    const auto prefix = Tokens::optional("tokens", tokens);
    const auto root = salt_argument(salt);
    if (!prefix.given() && root) throw InvalidSpec("salt is given without tokens, expected both");
    return static_cast<std::int64_t>(prefix.given() ? core.create(prefix.span(), root.value_or(""))
                                                    : core.create_anonymous());
  });
}

StepPlanHandle append(const PyManager& m, const py::object& ids, const py::object& tokens,
                      const py::object& counts) {
  return enter(*m.state, [&](BlockManager& core) {
    const Ints batch("ids", ids);
    const auto known = Tokens::optional("tokens", tokens);
    const auto each = Ints::optional("counts", counts);
    const StepPlan& plan = core.append(as_ids(batch), known.value(), each.value());
    return StepPlanHandle(m.state, plan.step);
  });
}

void require_own(const PyManager& m, const StepPlanHandle& plan) {
  if (plan.state == m.state) return;
  throw InvalidState(plan.state ? "this plan is another manager's"
                                : "this plan is a copy: commit or roll back the original");
}

void commit(const PyManager& m, const StepPlanHandle& plan, const py::object& lengths) {
  require_own(m, plan);
  enter(*m.state, [&](BlockManager& core) {
    const auto kept = Ints::optional("lengths", lengths);
    core.commit(plan.step, kept.value());
  });
}

void rollback(const PyManager& m, const StepPlanHandle* plan) {
  if (plan != nullptr) require_own(m, *plan);
  enter(*m.state, [&](BlockManager& core) {
    const std::int64_t step = plan != nullptr ? plan->step : core.open_step();
    if (step != 0) core.rollback(step);
  });
}

py::array_t<std::int64_t> fork(const PyManager& m, const py::object& id, const py::object& n) {
  return enter(*m.state, [&](BlockManager& core) {
    const std::int64_t count = int_argument("n", n);
    return ids_of(core.fork(id_of(id), count));
  });
}

py::array_t<std::int32_t> block_table(const PyManager& m, const py::object& id) {
  return enter(*m.state, [&](BlockManager& core) {
    const SequenceId sequence = id_of(id);
    py::array_t<std::int32_t> table(core.num_table_blocks(sequence));
    core.block_table(sequence, {reinterpret_cast<BlockId*>(table.mutable_data()),
                                static_cast<std::size_t>(table.size())});
    return table;
  });
}

// Two batch arguments of equal length, then a command.
template <class F>
void pairwise(const PyManager& m, const py::object& ids, const char* name, const py::object& others,
              F&& command) {
  enter(*m.state, [&](BlockManager& core) {
    const Ints batch("ids", ids);
    const Ints values(name, others);
    command(core, as_ids(batch), values.span());
  });
}

}  // namespace

void bind_manager(py::module_& m) {
  py::class_<PyManager> cls(
      m, "BlockManager", py::is_final(),
      "The control plane: which block holds which tokens of which sequence. No tensors.");
  cls.def(py::init(&make_manager), py::arg("num_device_blocks"), py::arg("num_host_blocks") = 0,
          py::arg("block_size") = 16, py::kw_only(), py::arg("max_batch") = 256,
          py::arg("max_model_len") = py::none(), py::arg("watermark") = 0);
  const auto config = [&cls](const char* name, auto member) {
    cls.def_property_readonly(
        name, [member](const PyManager& self) { return self.state->core->config().*member; });
  };
  config("num_device_blocks", &Config::num_device_blocks);
  config("num_host_blocks", &Config::num_host_blocks);
  config("block_size", &Config::block_size);
  config("max_batch", &Config::max_batch);
  config("watermark", &Config::watermark);
  cls.def_property_readonly("max_model_len", [](const PyManager& self) {
    return self.state->core->config().model_len();
  });

  cls.def("create", &create, py::arg("tokens") = py::none(), py::kw_only(),
          py::arg("salt") = py::none(),
          "A new sequence that holds the longest published prefix of tokens but the last one.");
  cls.def(
      "num_cached",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return core.num_cached(id_of(id)); });
      },
      py::arg("id"), "Tokens that create() found.");
  cls.def(
      "length",
      [](const PyManager& self, const py::object& id) {
        return enter(*self.state, [&](BlockManager& core) { return core.length(id_of(id)); });
      },
      py::arg("id"), "Tokens in the sequence.");
  cls.def(
      "lookup",
      [](const PyManager& self, const py::object& tokens, const py::object& salt) {
        return enter(*self.state, [&](BlockManager& core) {
          const Tokens prefix("tokens", tokens);
          return core.lookup(prefix.span(), salt_argument(salt).value_or(""));
        });
      },
      py::arg("tokens"), py::kw_only(), py::arg("salt") = py::none(),
      "What create() would take. Changes nothing.");
  // Engines give counts by position: keywords cost pybind11 a third of a microsecond.
  cls.def("append", &append, py::arg("ids"), py::arg("tokens") = py::none(),
          py::arg("counts") = py::none(),
          "Open a step: counts[b] new tokens (default 1) for each of ids, all or nothing.");
  cls.def("commit", &commit, py::arg("plan"), py::arg("lengths") = py::none(),
          "Close the step and publish its full blocks; lengths[b] keeps only that much of row b.");
  cls.def("rollback", &rollback, py::arg("plan") = py::none(),
          "Close the step, or the open one, as if it had not been.");
  cls.def(
      "record",
      [](const PyManager& self, const py::object& ids, const py::object& tokens,
         const py::object& counts) {
        enter(*self.state, [&](BlockManager& core) {
          const Ints batch("ids", ids);
          const Tokens known("tokens", tokens);
          const auto each = Ints::optional("counts", counts);
          core.record(as_ids(batch), known.span(), each.value());
        });
      },
      py::arg("ids"), py::arg("tokens"), py::arg("counts") = py::none(),
      "Tell tokens that were appended without: counts[b] (default 1) per sequence, in order.");
  cls.def("fork", &fork, py::arg("id"), py::arg("n"),
          "n ids that share all of id; the first is id.");
  cls.def(
      "reorder",
      [](const PyManager& self, const py::object& ids, const py::object& parents) {
        pairwise(self, ids, "parents", parents,
                 [](BlockManager& core, auto batch, auto values) { core.reorder(batch, values); });
      },
      py::arg("ids"), py::arg("parents"), "ids[i] becomes what ids[parents[i]] was.");
  cls.def(
      "truncate",
      [](const PyManager& self, const py::object& ids, const py::object& lengths) {
        pairwise(self, ids, "lengths", lengths,
                 [](BlockManager& core, auto batch, auto values) { core.truncate(batch, values); });
      },
      py::arg("ids"), py::arg("lengths"), "Keep only the first lengths[i] tokens of ids[i].");
  cls.def(
      "release",
      [](const PyManager& self, const py::object& ids) {
        enter(*self.state, [&](BlockManager& core) { core.release(as_ids(Ints("ids", ids))); });
      },
      py::arg("ids"), "Forget sequences; their published blocks stay as prefix hits.");
  cls.def(
      "clear",
      [](const PyManager& self, const py::object& salt) {
        enter(*self.state, [&](BlockManager& core) { core.clear(salt_argument(salt)); });
      },
      py::arg("salt") = py::none(), "No cached block of this salt, or of any, is a hit any more.");
  cls.def(
      "num_needed",
      [](const PyManager& self, const py::object& ids, const py::object& counts) {
        return enter(*self.state, [&](BlockManager& core) {
          const Ints batch("ids", ids);
          const auto each = Ints::optional("counts", counts);
          return core.num_needed(as_ids(batch), each.value());
        });
      },
      py::arg("ids"), py::arg("counts") = py::none(), "Blocks that append() would take.");
  cls.def(
      "num_freed",
      [](const PyManager& self, const py::object& ids) {
        return enter(*self.state,
                     [&](BlockManager& core) { return core.num_freed(as_ids(Ints("ids", ids))); });
      },
      py::arg("ids"), "Blocks that these sequences alone hold.");
  cls.def("block_table", &block_table, py::arg("id"), "The sequence's blocks, int32.");
  bind_swap(cls);
  // These are for any thread: no command leaves core half way while it holds the GIL.
  cls.def_property_readonly("open_step",
                            [](const PyManager& self) { return self.state->core->open_step(); });
  cls.def(
      "stats", [](const PyManager& self) { return self.state->core->stats(); },
      "Counts now, and totals since the start.");
  cls.def(
      "snapshot", [](const PyManager& self) { return self.state->core->snapshot(); },
      "The whole tree, for pictures and debugging.");
  cls.def(
      "verify",
      [](const PyManager& self) { enter(*self.state, [](BlockManager& core) { core.verify(); }); },
      "Recompute every count from scratch; raises BrokenInvariant on a difference.");
}

}  // namespace pagedkv
