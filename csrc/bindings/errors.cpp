// C++ errors become the classes of pagedkv.errors.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings/module.h"
#include "bindings/state.h"
#include "transfer/device.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

template <class... Args>
void raise(const char* name, const Args&... args) {
  const py::object type = py::module_::import("pagedkv.errors").attr(name);
  const py::object error = type(args...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const OutOfBlocks& e) {
      raise("OutOfBlocks", name(e.tier), e.needed, e.available);
    } catch (const NotResident& e) {
      const auto transfer = static_cast<std::int64_t>(e.transfer);
      raise("NotResident", e.what(), transfer == 0 ? py::object(py::none()) : py::int_(transfer));
    } catch (const UnknownSequence& e) {
      raise("UnknownSequence", e.what());
    } catch (const DeviceError& e) {
      raise("DeviceError", e.what());
    } catch (const InvalidSpec& e) {
      raise("InvalidSpec", e.what());
    } catch (const InvalidState& e) {
      raise("InvalidState", e.what());
    } catch (const ConcurrentUse& e) {
      raise("ConcurrentUse", e.what());
    } catch (const BrokenInvariant& e) {
      raise("BrokenInvariant", e.what());
    } catch (const std::length_error& e) {
      raise("InvalidSpec", std::string("a size is past what memory can hold: ") + e.what());
    }
  });
}

}  // namespace pagedkv
