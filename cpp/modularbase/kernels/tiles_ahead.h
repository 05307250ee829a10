#pragma once

#include <algorithm>
#include <cstddef>

#include "modularbase/kernels/attention_types.h"

namespace modularbase::kernels {

/// Fetches bytes that are read later, a step at a time while others are computed: the memory never
/// rests.
class Prefetch {
 public:
  Prefetch(const std::byte* begin, std::ptrdiff_t n_bytes, std::int64_t n_steps)
      : at_(begin),
        end_(n_bytes > 0 ? begin + n_bytes : begin),
        step_bytes_(n_bytes / n_steps / kLine * kLine + kLine) {}

  void step() {
    const std::byte* stop = at_ + std::min(step_bytes_, end_ - at_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, kIntoL2);
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64;
  static constexpr int kIntoL2 = 2;
  const std::byte* at_;
  const std::byte* end_;
  std::ptrdiff_t step_bytes_;
};

/// The tiles that a thread reads after those it is computing.
class TilesAhead {
 public:
  void add(const std::byte* tile, std::size_t n_bytes) {
    tiles_[n_tiles_++] = {tile, static_cast<std::ptrdiff_t>(n_bytes)};
    n_bytes_ += static_cast<float>(n_bytes);
  }
  /// Everything is to be fetched in the time of so many computed bytes.
  void spread(std::size_t n_bytes) { share_ = n_bytes_ / static_cast<float>(n_bytes); }

  /// What to fetch, in so many steps, while a tile of n_bytes is computed.
  Prefetch take(std::int64_t n_bytes, std::int64_t n_steps) {
    due_ += share_ * static_cast<float>(n_bytes);
    if (next_ == n_tiles_) return Prefetch(nullptr, 0, 1);
    Tile& tile = tiles_[next_];
    const Tile part = {tile.begin, std::min(static_cast<std::ptrdiff_t>(due_), tile.n_bytes)};
    due_ -= static_cast<float>(part.n_bytes);
    tile = {tile.begin + part.n_bytes, tile.n_bytes - part.n_bytes};
    if (tile.n_bytes == 0) ++next_;
    return Prefetch(part.begin, part.n_bytes, n_steps);
  }

 private:
  struct Tile {
    const std::byte* begin;
    std::ptrdiff_t n_bytes;
  };
  Tile tiles_[2 * 2 * kMaxPages];  // keys and values of two items
  int n_tiles_ = 0;
  int next_ = 0;
  float n_bytes_ = 0.0f;
  float share_ = 0.0f;
  float due_ = 0.0f;
};

/// What is read after an item is fetched while the item's rows are computed; a thread's first item
/// has been fetched by nobody.
TilesAhead tiles_ahead(const AttentionArgs& args, const AttentionItem& item,
                       const PartOrder& order);

}  // namespace modularbase::kernels
