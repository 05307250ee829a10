#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "bindings.h"
#include "modularbase/engine/pack_reader.h"
#include "modularbase/io/quantize.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

void bind_status(py::module_& module) {
  py::enum_<PackState>(module, "PackState")
      .value("known", PackState::kKnown)
      .value("loading", PackState::kLoading)
      .value("resident", PackState::kResident);
  py::class_<PackStatus>(module, "PackStatus")
      .def_readonly("id", &PackStatus::id)
      .def_readonly("name", &PackStatus::name)
      .def_readonly("path", &PackStatus::path)
      .def_readonly("digest", &PackStatus::digest)
      .def_readonly("state", &PackStatus::state)
      .def_readonly("n_bytes", &PackStatus::n_bytes)
      .def_readonly("pool", &PackStatus::pool)
      .def_readonly("slot", &PackStatus::slot)
      .def_readonly("n_leases", &PackStatus::n_leases)
      .def_readonly("is_pinned", &PackStatus::is_pinned)
      .def_readonly("is_retired", &PackStatus::is_retired)
      .def_readonly("n_hits", &PackStatus::n_hits)
      .def_readonly("n_loads", &PackStatus::n_loads)
      .def_readonly("idle_s", &PackStatus::idle_s)
      .def_readonly("verify_us", &PackStatus::verify_us)
      .def_readonly("load_us", &PackStatus::load_us)
      .def_readonly("last_error", &PackStatus::last_error);
  py::class_<ResidencyCounts>(module, "ResidencyCounts")
      .def_readonly("n_loads", &ResidencyCounts::n_loads)
      .def_readonly("n_evictions", &ResidencyCounts::n_evictions)
      .def_readonly("n_failed_loads", &ResidencyCounts::n_failed_loads)
      .def_readonly("n_preloads", &ResidencyCounts::n_preloads)
      .def_readonly("n_preload_hits", &ResidencyCounts::n_preload_hits)
      .def_readonly("n_preload_wastes", &ResidencyCounts::n_preload_wastes);
  py::class_<ResidencyStatus>(module, "ResidencyStatus")
      .def_readonly("budget_bytes", &ResidencyStatus::budget_bytes)
      .def_readonly("used_bytes", &ResidencyStatus::used_bytes)
      .def_readonly("packs", &ResidencyStatus::packs)
      .def_readonly("counts", &ResidencyStatus::counts);
}

using Fields = py::typing::Dict<py::str, py::object>;

std::unique_ptr<PackReader> make_reader(const channel::WeightReader& channel,
                                        const PackResidency& packs, const std::string& name,
                                        const Fields& geometry, float scale) {
  const auto number = [&](const char* field) { return geometry[field].cast<std::int64_t>(); };
  const auto type = [&](const char* field) {
    return weight_type(geometry[field].cast<std::string>());
  };
  const PackGeometry shape{.n_embd = number("n_embd"),
                           .d_inner = number("d_inner"),
                           .d_ff = number("d_ff"),
                           .n_expert = number("n_expert"),
                           .n_expert_used = number("n_expert_used"),
                           .sites = geometry["sites"].cast<std::vector<int>>(),
                           .norm_eps = geometry["norm_eps"].cast<float>(),
                           .adapter_type = type("adapter_type"),
                           .expert_type = type("expert_type")};
  return std::make_unique<PackReader>(channel, ChannelPack{name, shape, scale}, packs.base());
}

void bind_reader(py::module_& module) {
  py::class_<PublishedPack>(module, "PublishedPack")
      .def_readonly("number", &PublishedPack::number)
      .def_readonly("id", &PublishedPack::id);
  py::class_<PackReader>(module, "PackReader")
      .def(py::init(&make_reader), py::arg("channel"), py::arg("packs"), py::arg("name"),
           py::arg("geometry"), py::arg("scale"), py::keep_alive<1, 2>())
      .def("read_into", &PackReader::read_into, py::arg("packs"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_packs(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  bind_status(module);
  py::class_<PackResidency>(module, "PackResidency")
      .def("open", &PackResidency::open, py::arg("path"), py::arg("digest"), py::arg("name"),
           release_gil)
      .def("retire", &PackResidency::retire, py::arg("id"), release_gil)
      .def(
          "load",
          [](PackResidency& packs, GenerationId id, std::int64_t timeout_ms) {
            return packs.load(id, PackClock::now() + std::chrono::milliseconds(timeout_ms));
          },
          py::arg("id"), py::arg("timeout_ms"), release_gil)
      .def("preload", &PackResidency::preload, py::arg("id"), release_gil)
      .def("evict", &PackResidency::evict, py::arg("id"), release_gil)
      .def("pin", &PackResidency::pin, py::arg("id"), release_gil)
      .def("unpin", &PackResidency::unpin, py::arg("id"), release_gil)
      .def("status", py::overload_cast<>(&PackResidency::status, py::const_), release_gil)
      .def("status_of", py::overload_cast<GenerationId>(&PackResidency::status, py::const_),
           py::arg("id"), release_gil);
  bind_reader(module);
}

}  // namespace modularbase::bindings
