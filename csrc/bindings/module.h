// One function per room of the module; module.cpp is the table of contents.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // here, so that values cross alike wherever files are compiled apart

namespace pagedkv {

void bind_errors(pybind11::module_& m);
void bind_values(pybind11::module_& m);
void bind_step_plan(pybind11::module_& m);
void bind_transfer_plan(pybind11::module_& m);
void bind_manager(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_pools(pybind11::module_& m);
void bind_layer_writer(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void make_all_whole(pybind11::module_& m);  // after the classes are bound

}  // namespace pagedkv
