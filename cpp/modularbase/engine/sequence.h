#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "modularbase/adapters/pack_batch.h"
#include "modularbase/engine/request.h"
#include "modularbase/engine/sequence_window.h"
#include "modularbase/kv/rehydration.h"
#include "modularbase/packs/residency.h"
#include "modularbase/sampling/ngram_draft.h"
#include "modularbase/sampling/sampler.h"

namespace modularbase {

/// What a name of packs has come to mean.
struct NewMeaning {
  std::string name;
  GenerationId generation = 0;
};

/// A request inside the engine. Engine thread only.
struct Sequence {
  Sequence(RequestSpec request_spec, TicketPtr request_ticket, std::int64_t n_vocab);

  std::uint64_t id = 0;  // unlike that of any other request of this engine
  RequestSpec spec;
  TicketPtr ticket;
  Sampler sampler;
  std::optional<NgramDraft> drafter;
  std::vector<TokenId>
      tokens;  // prompt and what was generated; kv.n_tokens of them are in the cache
  std::vector<TokenId> draft;  // rows of this step behind the last token, not yet accepted
  KvSequence kv;
  KvContext kv_context;
  SequenceWindow* window = nullptr;          // its conversation's
  std::vector<SlotSpan> to_rehydrate;        // runs of summarised spans, the last one first
  std::unique_ptr<Rehydration> rehydration;  // of the first of them, once begun
  bool has_packs = false;                    // what follows is decided
  std::size_t pack_choice = 0;               // of spec.pack_choices: tried next, or taken
  PackWait pack_wait;
  bool waits_for_room = false;
  std::exception_ptr error;          // why its last choice of packs, or memory, could not be had
  std::vector<NewMeaning> meanings;  // that came while it had no packs yet
  std::vector<PackLease> leases;     // one an entry of pack_set
  PackSet pack_set;
  std::vector<double> conflict_sum;  // [n_layer]
  std::vector<std::int64_t> n_conflict;
  bool started = false;
  bool prompt_published = false;
  std::int64_t n_generated = 0;
  std::vector<float> hidden;  // kHidden: rows so far, [n_embd, n]
  Clock::time_point submitted_at;
  Clock::time_point started_at;
  Clock::time_point first_token_at;

  /// Tokens whose KV is not in the cache yet, or not in all layers.
  std::int64_t n_pending() const { return static_cast<std::int64_t>(tokens.size()) - kv.n_tokens; }
  /// Of these, the ones that the lower layers know.
  std::int64_t n_mid_pending() const { return kv.n_lower - kv.n_tokens; }
  /// Output rows of a step that runs so many rows of it.
  std::size_t n_outputs(std::int64_t n_rows) const {
    if (spec.kind != RequestKind::kGenerate) return static_cast<std::size_t>(n_rows);
    if (rehydration) return 0;
    return n_rows == n_pending() ? draft.size() + 1 : 0;
  }
  bool is_decoding() const {
    return spec.kind == RequestKind::kGenerate && n_pending() == 1 && to_rehydrate.empty();
  }
};

}  // namespace modularbase
