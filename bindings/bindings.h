#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "modularbase/engine/engine.h"

namespace modularbase::bindings {

/// One function a file; each adds its classes to the module. No logic lives here.
void bind_errors(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_request(pybind11::module_& module);
void bind_packs(pybind11::module_& module);
void bind_channel(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
/// What an engine has to do with conversations.
void bind_context(pybind11::module_& module, pybind11::class_<Engine>& engine);

/// One code a token. \throws InvalidRequestError.
std::vector<Tier> to_tiers(const pybind11::bytes& codes);

}  // namespace modularbase::bindings
