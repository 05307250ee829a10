#include <pybind11/stl.h>

#include <string_view>

#include "bindings.h"
#include "modularbase/core/errors.h"
#include "modularbase/engine/engine.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

using BlockTuple =
    std::tuple<std::int32_t, int, std::uint64_t, std::vector<std::int32_t>>;  // memory, tier, ...
using SpanTuple = std::tuple<int, int, int>;

std::vector<SpanTuple> span_tuples(const std::vector<SlotSpan>& spans) {
  std::vector<SpanTuple> tuples;
  tuples.reserve(spans.size());
  for (const SlotSpan& span : spans) tuples.emplace_back(span.start, span.n_tokens, span.n_slots);
  return tuples;
}

std::vector<SlotSpan> slot_spans(const std::vector<SpanTuple>& tuples) {
  std::vector<SlotSpan> spans;
  spans.reserve(tuples.size());
  for (const auto& [start, n_tokens, n_slots] : tuples) spans.push_back({start, n_tokens, n_slots});
  return spans;
}

py::bytes tier_codes(const std::vector<Tier>& tiers) {
  std::string codes;
  for (const Tier tier : tiers) codes += static_cast<char>(tier);
  return codes;
}

CompactionReport compact(Engine& engine, ConversationId id, const py::bytes& tiers,
                         const std::vector<SpanTuple>& spans, float max_error) {
  PastPlan plan{.n_positions = 0,
                .tiers = to_tiers(tiers),
                .spans = slot_spans(spans),
                .max_error = max_error};
  const py::gil_scoped_release release;
  return engine.compact(id, std::move(plan));
}

std::vector<SlotSpan> to_spans(const std::vector<std::tuple<int, int>>& pairs) {
  std::vector<SlotSpan> spans;
  spans.reserve(pairs.size());
  for (const auto& [start, n_tokens] : pairs) spans.push_back({start, n_tokens, 0});
  return spans;
}

void bind_reports(py::module_& module) {
  py::class_<ContextState>(module, "ContextState")
      .def_readonly("n_tokens", &ContextState::n_tokens)
      .def_readonly("n_compacted", &ContextState::n_compacted)
      .def_readonly("n_rebuilt", &ContextState::n_rebuilt)
      .def_property_readonly("tiers", [](const ContextState& s) { return tier_codes(s.tiers); })
      .def_property_readonly("spans", [](const ContextState& s) { return span_tuples(s.spans); })
      .def_readonly("key_bytes", &ContextState::key_bytes)
      .def_readonly("important_bytes", &ContextState::important_bytes)
      .def_readonly("redundant_bytes", &ContextState::redundant_bytes)
      .def_readonly("own_bytes", &ContextState::own_bytes)
      .def_property_readonly("total_bytes", &ContextState::total_bytes)
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
                               refused.reserve(report.refused.size());
                               for (const RefusedSpan& r : report.refused) {
                                 refused.emplace_back(r.span.start, r.span.n_tokens, r.error);
                               }
                               return refused;
                             })
      .def_readonly("work_us", &CompactionReport::work_us);
}

std::vector<BlockTuple> block_tuples(const ConversationImage& image) {
  std::vector<BlockTuple> tuples;
  tuples.reserve(image.past.blocks.size());
  for (const PastBlock& block : image.past.blocks) {
    tuples.emplace_back(block.memory, static_cast<int>(block.tier), block.visible, block.positions);
  }
  return tuples;
}

ConversationImage make_image(std::vector<TokenId> tokens, std::int64_t n_valid,
                             std::int64_t n_positions, const py::bytes& tiers,
                             const std::vector<SpanTuple>& spans,
                             const std::vector<BlockTuple>& blocks, const py::buffer& data) {
  ConversationImage image;
  image.tokens = std::move(tokens);
  image.n_valid = n_valid;
  image.past.n_positions = n_positions;
  image.past.tiers = to_tiers(tiers);
  image.past.spans = slot_spans(spans);
  for (const auto& [memory, tier, visible, positions] : blocks) {
    image.past.blocks.push_back({.memory = static_cast<kernels::KvTier>(memory),
                                 .tier = static_cast<Tier>(tier),
                                 .visible = visible,
                                 .positions = positions});
  }
  const py::buffer_info bytes = data.request();
  const auto* first = static_cast<const std::byte*>(bytes.ptr);
  image.data.assign(first, first + bytes.size * bytes.itemsize);
  return image;
}

void bind_image(py::module_& module) {
  py::class_<ConversationImage>(module, "ConversationImage")
      .def(py::init(&make_image), py::arg("tokens"), py::arg("n_valid"), py::arg("n_positions"),
           py::arg("tiers"), py::arg("spans"), py::arg("blocks"), py::arg("data"))
      .def_readonly("tokens", &ConversationImage::tokens)
      .def_readonly("n_valid", &ConversationImage::n_valid)
      .def_property_readonly("n_positions",
                             [](const ConversationImage& i) { return i.past.n_positions; })
      .def_property_readonly("tiers",
                             [](const ConversationImage& i) { return tier_codes(i.past.tiers); })
      .def_property_readonly("spans",
                             [](const ConversationImage& i) { return span_tuples(i.past.spans); })
      .def_property_readonly("blocks", &block_tuples)
      .def_property_readonly("data", [](const ConversationImage& image) {
        return py::bytes(reinterpret_cast<const char*>(image.data.data()), image.data.size());
      });
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
  bind_image(module);
  engine.def("open_conversation", &Engine::open_conversation, release_gil)
      .def("fork_conversation", &Engine::fork_conversation, py::arg("id"), release_gil)
      .def("close_conversation", &Engine::close_conversation, py::arg("id"), release_gil)
      .def("save_conversation", &Engine::save_conversation, py::arg("id"), release_gil)
      .def("load_conversation", &Engine::load_conversation, py::arg("image"), release_gil)
      .def("context_state", &Engine::context_state, py::arg("id"), release_gil)
      .def(
          "attention_received",
          [](Engine& self, ConversationId id, const std::vector<std::tuple<int, int>>& spans,
             int layer) { return self.attention_received(id, to_spans(spans), layer); },
          py::arg("id"), py::arg("spans"), py::arg("layer"), release_gil)
      .def(
          "expected_attention",
          [](Engine& self, ConversationId id, const std::vector<std::tuple<int, int>>& spans,
             int layer) { return self.expected_attention(id, to_spans(spans), layer); },
          py::arg("id"), py::arg("spans"), py::arg("layer"), release_gil)
      .def(
          "forget",
          [](Engine& self, ConversationId id, const std::vector<std::tuple<int, int>>& ranges) {
            std::vector<PositionRange> list;
            list.reserve(ranges.size());
            for (const auto& [start, n_tokens] : ranges) list.push_back({start, n_tokens});
            return self.forget(id, list);
          },
          py::arg("id"), py::arg("ranges"), release_gil)
      .def("compact", &compact, py::arg("id"), py::arg("tiers"), py::arg("spans"),
           py::arg("max_error"));
}

}  // namespace modularbase::bindings
