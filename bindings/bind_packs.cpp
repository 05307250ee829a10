#include <pybind11/stl.h>

#include "bindings.h"
#include "modularbase/packs/residency.h"

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
}

}  // namespace modularbase::bindings
