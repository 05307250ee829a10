#pragma once

#include <pybind11/pybind11.h>

namespace modularbase::bindings {

/// One function a file; each adds its classes to the module. No logic lives here.
void bind_errors(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_request(pybind11::module_& module);
void bind_packs(pybind11::module_& module);
void bind_channel(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace modularbase::bindings
