#include <pybind11/stl.h>

#include "bindings.h"
#include "modularbase/engine/engine.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

void bind_options(py::module_& module) {
  py::class_<EngineOptions>(module, "EngineOptions")
      .def(py::init<>())
      .def_readwrite("dtype", &EngineOptions::dtype)
      .def_readwrite("device", &EngineOptions::device)
      .def_readwrite("kv", &EngineOptions::kv)
      .def_readwrite("kv_window_tokens", &EngineOptions::kv_window_tokens)
      .def_readwrite("kv_detail_heads", &EngineOptions::kv_detail_heads)
      .def_readwrite("n_threads", &EngineOptions::n_threads)
      .def_readwrite("n_ctx", &EngineOptions::n_ctx)
      .def_readwrite("kv_budget_bytes", &EngineOptions::kv_budget_bytes)
      .def_readwrite("pack_budget_bytes", &EngineOptions::pack_budget_bytes)
      .def_readwrite("first_site", &EngineOptions::first_site)
      .def_readwrite("n_batch", &EngineOptions::n_batch)
      .def_readwrite("n_sequences", &EngineOptions::n_sequences)
      .def_readwrite("attention", &EngineOptions::attention)
      .def_readwrite("linear", &EngineOptions::linear)
      .def_readwrite("sites", &EngineOptions::sites)
      .def_readwrite("head", &EngineOptions::head)
      .def_readwrite("prefix_cache", &EngineOptions::prefix_cache);
}

void bind_tap(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ActivationTap, std::shared_ptr<ActivationTap>>(module, "ActivationTap")
      .def_property_readonly("path", &ActivationTap::path)
      .def_property_readonly("notice", &ActivationTap::notice)
      .def_property_readonly("layer", &ActivationTap::layer)
      .def_property_readonly("is_open", &ActivationTap::is_open)
      .def_property_readonly("n_pushed", &ActivationTap::n_pushed)
      .def_property_readonly("n_dropped", &ActivationTap::n_dropped)
      .def("last_error", &ActivationTap::last_error, release_gil)
      .def("close", &ActivationTap::close, release_gil);
}

void bind_info(py::module_& module) {
  py::class_<EngineInfo>(module, "EngineInfo")
      .def_readonly("path", &EngineInfo::path)
      .def_readonly("family", &EngineInfo::family)
      .def_readonly("device", &EngineInfo::device)
      .def_readonly("weight_type", &EngineInfo::weight_type)
      .def_readonly("n_threads", &EngineInfo::n_threads)
      .def_readonly("n_vocab", &EngineInfo::n_vocab)
      .def_readonly("n_ctx", &EngineInfo::n_ctx)
      .def_readonly("n_ctx_train", &EngineInfo::n_ctx_train)
      .def_readonly("n_embd", &EngineInfo::n_embd)
      .def_readonly("n_layer", &EngineInfo::n_layer)
      .def_readonly("n_head", &EngineInfo::n_head)
      .def_readonly("n_head_kv", &EngineInfo::n_head_kv)
      .def_readonly("head_dim", &EngineInfo::head_dim)
      .def_readonly("n_ff", &EngineInfo::n_ff)
      .def_readonly("n_params", &EngineInfo::n_params)
      .def_readonly("weight_bytes", &EngineInfo::weight_bytes)
      .def_readonly("mapped_bytes", &EngineInfo::mapped_bytes)
      .def_readonly("screen_bytes", &EngineInfo::screen_bytes)
      .def_readonly("kv_bytes", &EngineInfo::kv_bytes)
      .def_readonly("kv_in_rows", &EngineInfo::kv_in_rows)
      .def_readonly("n_kv_blocks", &EngineInfo::n_kv_blocks)
      .def_readonly("n_kv_tokens", &EngineInfo::n_kv_tokens)
      .def_readonly("first_site", &EngineInfo::first_site)
      .def_readonly("load_us", &EngineInfo::load_us);
  py::class_<EngineStats>(module, "EngineStats")
      .def_readonly("n_waiting", &EngineStats::n_waiting)
      .def_readonly("n_running", &EngineStats::n_running)
      .def_readonly("n_free_blocks", &EngineStats::n_free_blocks)
      .def_readonly("n_cached_blocks", &EngineStats::n_cached_blocks)
      .def_readonly("graph_bytes", &EngineStats::graph_bytes)
      .def_readonly("n_steps", &EngineStats::n_steps)
      .def_readonly("n_rows", &EngineStats::n_rows)
      .def_readonly("n_mid_rows", &EngineStats::n_mid_rows)
      .def_readonly("n_head_fallbacks", &EngineStats::n_head_fallbacks);
}

}  // namespace

void bind_engine(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  bind_options(module);
  bind_info(module);
  bind_tap(module);
  module.def("cpu_features", &cpu_features, "Instruction sets this build uses on this CPU.");
  py::class_<Engine> engine(module, "Engine");
  bind_context(module, engine);
  engine
      .def(py::init<const std::string&, const EngineOptions&>(), py::arg("path"),
           py::arg("options"), release_gil)
      .def("submit", &Engine::submit, py::arg("spec"), release_gil)
      .def(
          "tap",
          [](Engine& self, std::string channel, int layer, std::int64_t n_records,
             std::uint32_t row_type) {
            return self.tap(
                {std::move(channel), layer, n_records, static_cast<channel::TensorType>(row_type)});
          },
          py::arg("channel"), py::arg("layer"), py::arg("n_records"), py::arg("row_type"),
          release_gil)
      .def("packs", &Engine::packs, py::return_value_policy::reference_internal)
      .def("switch_packs", &Engine::switch_packs, py::arg("name"), py::arg("to"), release_gil)
      .def("forget_prefixes", &Engine::forget_prefixes, release_gil)
      .def("info", &Engine::info)
      .def("stats", &Engine::stats, release_gil)
      .def("close", &Engine::close, release_gil);
}

}  // namespace modularbase::bindings
