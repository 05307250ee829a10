#include <pybind11/stl.h>

#include <string_view>

#include "bindings.h"
#include "modularbase/core/errors.h"
#include "modularbase/engine/engine.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

CompactionReport compact(Engine& engine, ConversationId id, const py::bytes& tiers,
                         const std::vector<std::tuple<int, int, int>>& spans, float max_error) {
  PastPlan plan{.n_positions = 0, .tiers = to_tiers(tiers), .spans = {}, .max_error = max_error};
  for (const auto& [start, n_tokens, n_slots] : spans) {
    plan.spans.push_back({start, n_tokens, n_slots});
  }
  const py::gil_scoped_release release;
  return engine.compact(id, std::move(plan));
}

std::vector<SlotSpan> to_spans(const std::vector<std::tuple<int, int>>& pairs) {
  std::vector<SlotSpan> spans;
  for (const auto& [start, n_tokens] : pairs) spans.push_back({start, n_tokens, 0});
  return spans;
}

void bind_reports(py::module_& module) {
  py::class_<ContextState>(module, "ContextState")
      .def_readonly("n_tokens", &ContextState::n_tokens)
      .def_readonly("n_compacted", &ContextState::n_compacted)
      .def_readonly("n_rebuilt", &ContextState::n_rebuilt)
      .def_property_readonly("tiers",
                             [](const ContextState& state) {
                               std::string text;
                               for (const Tier tier : state.tiers) {
                                 text += static_cast<char>(tier);
                               }
                               return py::bytes(text);
                             })
      .def_property_readonly(
          "spans",
          [](const ContextState& state) {
            std::vector<std::tuple<int, int, int>> spans;
            for (const SlotSpan& span : state.spans) {
              spans.emplace_back(span.start, span.n_tokens, span.n_slots);
            }
            return spans;
          })
      .def_readonly("key_bytes", &ContextState::key_bytes)
      .def_readonly("important_bytes", &ContextState::important_bytes)
      .def_readonly("redundant_bytes", &ContextState::redundant_bytes)
      .def_readonly("own_bytes", &ContextState::own_bytes)
      .def_readonly("query_bytes", &ContextState::query_bytes);
  py::enum_<CompactionReport::Outcome>(module, "CompactionOutcome")
      .value("done", CompactionReport::Outcome::kDone)
      .value("cancelled", CompactionReport::Outcome::kCancelled)
      .value("no_room", CompactionReport::Outcome::kNoRoom);
  py::class_<CompactionReport>(module, "CompactionReport")
      .def_readonly("outcome", &CompactionReport::outcome)
      .def_property_readonly("refused",
                             [](const CompactionReport& report) {
                               std::vector<std::tuple<int, int, float>> refused;
                               for (const RefusedSpan& r : report.refused) {
                                 refused.emplace_back(r.span.start, r.span.n_tokens, r.error);
                               }
                               return refused;
                             })
      .def_readonly("work_us", &CompactionReport::work_us);
}

}  // namespace

std::vector<Tier> to_tiers(const py::bytes& codes) {
  std::vector<Tier> tiers;
  for (const char code : std::string_view(codes)) {
    if (code < 0 || code > static_cast<char>(Tier::kRedundant)) {
      throw InvalidRequestError("tiers", "0, 1 or 2 a token", std::to_string(code));
    }
    tiers.push_back(static_cast<Tier>(code));
  }
  return tiers;
}

void bind_context(py::module_& module, py::class_<Engine>& engine) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  bind_reports(module);
  engine.def("open_conversation", &Engine::open_conversation, release_gil)
      .def("close_conversation", &Engine::close_conversation, py::arg("id"), release_gil)
      .def("context_state", &Engine::context_state, py::arg("id"), release_gil)
      .def(
          "attention_received",
          [](Engine& self, ConversationId id, const std::vector<std::tuple<int, int>>& spans,
             int layer) { return self.attention_received(id, to_spans(spans), layer); },
          py::arg("id"), py::arg("spans"), py::arg("layer"), release_gil)
      .def("compact", &compact, py::arg("id"), py::arg("tiers"), py::arg("spans"),
           py::arg("max_error"));
}

}  // namespace modularbase::bindings
