// No instance without its C++ value: what __new__ gives has been through __init__, and what cannot
// be pickled says so, where pickle's oldest protocols would make one of pybind11's base class.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/module.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

// pybind11's own gives an instance that holds nothing yet, whose attributes read any memory. Here
// __init__ runs at once; that which Python calls next finds a value, and does nothing.
PyObject* make_whole(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  auto self = py::reinterpret_steal<py::object>(py::detail::make_new_instance(type));
  if (type->tp_init(self.ptr(), args, kwargs) != 0) return nullptr;
  auto* instance = reinterpret_cast<py::detail::instance*>(self.ptr());
  if (instance->get_value_and_holder().holder_constructed()) return self.release().ptr();
  PyErr_Format(PyExc_TypeError, "%s.__init__() does not call that of its base", type->tp_name);
  return nullptr;
}

}  // namespace

void make_all_whole(py::module_& m) {
  const py::cpp_function refuse(
      [](const py::object& self) {
        const auto name = py::type::of(self).attr("__name__").cast<std::string>();
        throw py::type_error("a " + name + " cannot be copied or pickled");
      },
      py::is_method(py::none()));
  for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(m.attr("__dict__"))) {
    if (!PyType_Check(value.ptr())) continue;
    auto* type = reinterpret_cast<PyTypeObject*>(value.ptr());
    if (!value.attr("__dict__").contains("__reduce__")) py::setattr(value, "__reduce__", refuse);
    type->tp_new = &make_whole;
    type->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;  // an instance does not become one of another class
    PyType_Modified(type);
  }
}

}  // namespace pagedkv
