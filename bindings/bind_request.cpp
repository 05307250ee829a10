#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "modularbase/engine/request.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

py::array_t<float> to_array(const std::vector<float>& values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_enums(py::module_& module) {
  py::enum_<RequestKind>(module, "RequestKind")
      .value("generate", RequestKind::kGenerate)
      .value("score", RequestKind::kScore)
      .value("hidden", RequestKind::kHidden);
  py::enum_<Pooling>(module, "Pooling")
      .value("none", Pooling::kNone)
      .value("mean", Pooling::kMean)
      .value("last", Pooling::kLast);
  py::enum_<kernels::MergePolicy>(module, "MergePolicy")
      .value("blend", kernels::MergePolicy::kBlend)
      .value("best", kernels::MergePolicy::kBest)
      .value("priority", kernels::MergePolicy::kPriority)
      .value("ties", kernels::MergePolicy::kTies);
  py::enum_<Activation>(module, "Activation")
      .value("prompt", Activation::kPrompt)
      .value("from_here", Activation::kFromHere);
  py::enum_<FinishReason>(module, "FinishReason")
      .value("stop", FinishReason::kStop)
      .value("length", FinishReason::kLength)
      .value("cancelled", FinishReason::kCancelled)
      .value("deadline", FinishReason::kDeadline)
      .value("done", FinishReason::kDone);
}

void bind_specs(py::module_& module) {
  py::class_<SamplingParams>(module, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("typical_p", &SamplingParams::typical_p)
      .def_readwrite("repeat_penalty", &SamplingParams::repeat_penalty)
      .def_readwrite("repeat_last_n", &SamplingParams::repeat_last_n)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("seed", &SamplingParams::seed);
  py::class_<RequestSpec>(module, "RequestSpec")
      .def(py::init<>())
      .def_readwrite("kind", &RequestSpec::kind)
      .def_readwrite("prompt", &RequestSpec::prompt)
      .def_readwrite("policy", &RequestSpec::policy)
      .def_readwrite("activation", &RequestSpec::activation)
      .def(
          "add_pack_choice",
          [](RequestSpec& spec,
             const std::vector<std::tuple<GenerationId, float, std::string>>& packs) {
            PackChoice choice;
            for (const auto& [generation, weight, name] : packs) {
              choice.packs.push_back({generation, weight, name});
            }
            spec.pack_choices.push_back(std::move(choice));
          },
          py::arg("packs"))
      .def_readwrite("conversation", &RequestSpec::conversation)
      .def(
          "set_tiers",
          [](RequestSpec& spec, const py::bytes& codes) { spec.tiers = to_tiers(codes); },
          py::arg("codes"))
      .def_readwrite("rehydrate", &RequestSpec::rehydrate)
      .def_readwrite("sampling", &RequestSpec::sampling)
      .def_readwrite("max_tokens", &RequestSpec::max_tokens)
      .def_readwrite("stop_ids", &RequestSpec::stop_ids)
      .def_readwrite("n_logprobs", &RequestSpec::n_logprobs)
      .def_readwrite("n_draft", &RequestSpec::n_draft)
      .def_readwrite("layer", &RequestSpec::layer)
      .def_readwrite("pooling", &RequestSpec::pooling)
      .def_readwrite("n_rows_beside", &RequestSpec::n_rows_beside)
      .def(
          "set_timeout",
          [](RequestSpec& spec, double seconds) {
            spec.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                               std::chrono::duration<double>(seconds));
          },
          py::arg("seconds"));
}

void bind_results(py::module_& module) {
  py::class_<TokenLogprob>(module, "TokenLogprob")
      .def_readonly("id", &TokenLogprob::id)
      .def_readonly("logprob", &TokenLogprob::logprob);
  py::class_<GeneratedToken>(module, "GeneratedToken")
      .def_readonly("id", &GeneratedToken::id)
      .def_readonly("logprob", &GeneratedToken::logprob)
      .def_readonly("top_logprobs", &GeneratedToken::top_logprobs);
  py::class_<RequestTimings>(module, "RequestTimings")
      .def_readonly("queue_us", &RequestTimings::queue_us)
      .def_readonly("prefill_us", &RequestTimings::prefill_us)
      .def_readonly("decode_us", &RequestTimings::decode_us);
  py::class_<PackSwitch>(module, "PackSwitch")
      .def_readonly("n_generated", &PackSwitch::n_generated)
      .def_readonly("from_digest", &PackSwitch::from)
      .def_readonly("to_digest", &PackSwitch::to);
  py::class_<RequestResult>(module, "RequestResult")
      .def_readonly("tokens", &RequestResult::tokens)
      .def_readonly("finish_reason", &RequestResult::finish_reason)
      .def_property_readonly("logprobs",
                             [](const RequestResult& r) { return to_array(r.logprobs); })
      .def_property_readonly("hidden", [](const RequestResult& r) { return to_array(r.hidden); })
      .def_readonly("n_prompt", &RequestResult::n_prompt)
      .def_readonly("n_cached", &RequestResult::n_cached)
      .def_readonly("n_cached_lower", &RequestResult::n_cached_lower)
      .def_readonly("n_rehydrated", &RequestResult::n_rehydrated)
      .def_readonly("n_drafted", &RequestResult::n_drafted)
      .def_readonly("n_accepted", &RequestResult::n_accepted)
      .def_readonly("pack_choice", &RequestResult::pack_choice)
      .def_readonly("pack_errors", &RequestResult::pack_errors)
      .def_readonly("pack_switches", &RequestResult::pack_switches)
      .def_property_readonly("pack_conflict",
                             [](const RequestResult& r) { return to_array(r.pack_conflict); })
      .def_readonly("timings", &RequestResult::timings);
}

void bind_ticket(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Ticket, TicketPtr>(module, "Ticket")
      .def(
          "wait_tokens",
          [](Ticket& ticket, std::size_t n_seen, std::int64_t timeout_ms) {
            return ticket.wait_tokens(n_seen, std::chrono::milliseconds(timeout_ms));
          },
          py::arg("n_seen"), py::arg("timeout_ms"), release_gil)
      .def(
          "wait_finished",
          [](Ticket& ticket, std::int64_t timeout_ms) {
            return ticket.wait_finished(std::chrono::milliseconds(timeout_ms));
          },
          py::arg("timeout_ms"), release_gil)
      .def("finished", &Ticket::finished, release_gil)
      .def("result", &Ticket::result, release_gil)
      .def("cancel", &Ticket::cancel);
}

}  // namespace

void bind_request(py::module_& module) {
  bind_enums(module);
  bind_specs(module);
  bind_results(module);
  bind_ticket(module);
}

}  // namespace modularbase::bindings
