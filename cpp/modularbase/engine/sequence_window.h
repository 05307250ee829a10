#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/kernels/attention.h"
#include "modularbase/kv/kv_cache.h"

namespace modularbase {

/// The last queries of a sequence in all layers, kept while it runs: what its spans are fitted to
/// and graded by. Engine thread only.
class SequenceWindow {
 public:
  static constexpr std::int32_t kRows = 128;
  static constexpr std::int32_t kStride = 1;  // of positions

  SequenceWindow(const KvCache& cache, std::int64_t n_head);
  SequenceWindow(const SequenceWindow&) = delete;
  SequenceWindow& operator=(const SequenceWindow&) = delete;

  const kernels::QueryWindow& lower() const { return lower_.view; }
  const kernels::QueryWindow& upper() const { return upper_.view; }
  /// Rows are written from this position on.
  void begin_at(std::int64_t position) { from_ = position; }
  /// The positions in [first, n_tokens) whose queries are kept.
  std::vector<std::int32_t> positions(std::int64_t first, std::int64_t n_tokens) const;
  /// Their rows.
  std::vector<std::int32_t> rows(std::int64_t first, std::int64_t n_tokens) const;
  std::size_t n_bytes() const;

 private:
  struct Room {
    std::vector<std::uint16_t> queries;  // F16 [head_dim, n_head, kRows, n_layer]
    std::vector<float> log_mass;         // [n_head, kRows, n_layer]
    kernels::QueryWindow view{};
  };
  static Room room_for(const KvGeometry& geometry, std::int64_t n_head);

  Room lower_;
  Room upper_;
  std::int64_t from_ = 0;
};

}  // namespace modularbase
