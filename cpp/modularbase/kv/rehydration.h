#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/kv/kv_cache.h"

namespace modularbase {

/// The spans of a past that begin at one of these positions, neighbours as one, the last first.
std::vector<SlotSpan> rehydration_runs(const KvPast& past, std::span<const std::int32_t> starts);

/// Summarised tokens of a sequence that are computed again, at their own positions, behind what
/// came before them. Until it is committed the sequence stays as it is; its past must not change
/// meanwhile. Engine thread only.
class Rehydration {
 public:
  /// Of spans that follow each other without a gap.
  Rehydration(KvCache& cache, const KvSequence& sequence, const SlotSpan& run);
  /// Gives back what was not committed.
  ~Rehydration();
  Rehydration(const Rehydration&) = delete;
  Rehydration& operator=(const Rehydration&) = delete;

  /// Blocks for its tokens; false where memory is short.
  bool reserve();
  /// The sequence as it was when these tokens were next: as many as are computed are valid.
  const KvSequence& view() const { return view_; }
  std::int64_t n_left() const { return end() - view_.n_tokens; }
  void add_computed(std::int64_t n_tokens) { view_.set_valid(view_.n_tokens + n_tokens); }
  /// The tokens are important from now on, and what stood for them is gone. All are computed.
  void commit(KvSequence& sequence);

 private:
  std::int64_t end() const { return run_.start + run_.n_tokens; }
  void drop_summary(KvSequence& sequence);
  void add_blocks(KvPast& past);

  KvCache& cache_;
  const SlotSpan run_;
  KvSequence view_;  // holds the blocks of its table, not those of its past
};

}  // namespace modularbase
