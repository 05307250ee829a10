#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/kv/key_shift.h"
#include "modularbase/kv/span_fitter.h"

namespace modularbase {

/// A span that did not become slots, and the error that was found (infinite: no fit could be made).
struct RefusedSpan {
  SlotSpan span;
  float error = 0.0f;
};

/// Builds a sequence's new past beside the old one, a layer at a time, so that it can be put off,
/// or given up, between any two. The sequence's past must not change meanwhile; tokens may be
/// added. Engine thread only.
class Compaction {
 public:
  /// shift: for a plan that moves tokens; outlives it.
  Compaction(KvCache& cache, const KvSequence& sequence, PastPlan plan, FitQueries queries,
             std::int64_t n_head, KeyShift* shift = nullptr);
  /// Gives back what was not committed.
  ~Compaction();
  Compaction(const Compaction&) = delete;
  Compaction& operator=(const Compaction&) = delete;

  enum class Progress {
    kMore,
    kReady,  // to be committed
    kShort,  // no memory for the new blocks: nothing comes of it
  };
  /// Does one layer's share of the work.
  Progress work();
  /// Gives the sequence its new past, and its old blocks back.
  void commit(KvSequence& sequence);
  const std::vector<RefusedSpan>& refused() const { return refused_; }

 private:
  void decide();
  bool allocate();
  void build(const LayerView& layer);
  void fill(const NewPastBlock& made, const LayerView& layer, std::int64_t head,
            TileReader& reader);
  void load(const PastSource& source, const LayerView& layer, std::int64_t head, TileReader& reader,
            std::size_t at);

  KvCache& cache_;
  const KvSequence& sequence_;
  const PastPlan plan_;
  const FitQueries queries_;
  KeyShift* const shift_;
  const LocatedPast located_;
  SpanFitter fitter_;
  std::vector<LayerView> layers_;
  std::size_t next_layer_ = 0;
  NewPast past_;
  bool is_decided_ = false;      // past_ is known, since the fits are
  std::size_t n_allocated_ = 0;  // of its blocks
  std::vector<RefusedSpan> refused_;
  std::vector<float> keys_;         // [head_dim, 64] of a new block
  std::vector<float> values_;       // the same
  std::vector<float> log_weights_;  // [64]
};

}  // namespace modularbase
