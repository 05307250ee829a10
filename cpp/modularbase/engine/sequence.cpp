#include "modularbase/engine/sequence.h"

namespace modularbase {
namespace {

constexpr int kMinNgram = 2;
constexpr int kMaxNgram = 4;

}  // namespace

Sequence::Sequence(RequestSpec request_spec, TicketPtr request_ticket, std::int64_t n_vocab)
    : spec(std::move(request_spec)),
      ticket(std::move(request_ticket)),
      sampler(spec.sampling, n_vocab),
      tokens(spec.prompt),
      submitted_at(Clock::now()) {
  sampler.accept_prompt(tokens);
  if (spec.n_draft > 0) {
    drafter.emplace(kMinNgram, kMaxNgram, spec.n_draft);
    for (const TokenId token : tokens) drafter->append(token);
  }
}

}  // namespace modularbase
