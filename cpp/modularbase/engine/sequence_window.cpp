#include "modularbase/engine/sequence_window.h"

#include <algorithm>

namespace modularbase {

SequenceWindow::Room SequenceWindow::room_for(const KvGeometry& geometry, std::int64_t n_head) {
  const auto n = static_cast<std::size_t>(n_head * kRows * geometry.n_layer);
  Room room;
  room.queries.resize(n * static_cast<std::size_t>(geometry.head_dim));
  room.log_mass.resize(n);
  room.view = {room.queries.data(), room.log_mass.data(), kRows, kStride};
  return room;
}

SequenceWindow::SequenceWindow(const KvCache& cache, std::int64_t n_head)
    : lower_(room_for(cache.lower().memory().geometry(), n_head)) {
  if (cache.upper()) upper_ = room_for(cache.upper()->memory().geometry(), n_head);
}

std::vector<std::int32_t> SequenceWindow::positions(std::int64_t first,
                                                    std::int64_t n_tokens) const {
  std::vector<std::int32_t> positions;
  first = std::max({first, from_, n_tokens - std::int64_t{kRows} * kStride});
  for (std::int64_t at = (first + kStride - 1) / kStride; at * kStride < n_tokens; ++at) {
    positions.push_back(static_cast<std::int32_t>(at * kStride));
  }
  return positions;
}

std::vector<std::int32_t> SequenceWindow::rows(std::int64_t first, std::int64_t n_tokens) const {
  std::vector<std::int32_t> rows = positions(first, n_tokens);
  for (std::int32_t& row : rows) row = row / kStride % kRows;
  return rows;
}

std::size_t SequenceWindow::n_bytes() const {
  std::size_t n = 0;
  for (const Room* room : {&lower_, &upper_}) {
    n += room->queries.size() * sizeof(std::uint16_t) + room->log_mass.size() * sizeof(float);
  }
  return n;
}

}  // namespace modularbase
