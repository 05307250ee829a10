#include "modularbase/sampling/penalty_window.h"

#include <algorithm>

namespace modularbase {

PenaltyWindow::PenaltyWindow(std::size_t last_n) : last_n_(last_n) {
  constexpr std::size_t kUsual = 1024;  // a larger window grows as it fills
  ring_.reserve(std::min(last_n, kUsual));
  counts_.reserve(std::min(last_n, kUsual) + 1);
}

void PenaltyWindow::accept(TokenId token) {
  if (last_n_ == 0) return;
  if (ring_.size() < last_n_) {
    ring_.push_back(token);
  } else {
    const auto leaving = find(ring_[oldest_]);
    if (--leaving->count == 0) counts_.erase(leaving);
    ring_[oldest_] = token;
    oldest_ = (oldest_ + 1) % last_n_;
  }
  const auto place = find(token);
  if (place != counts_.end() && place->id == token) {
    ++place->count;
  } else {
    counts_.insert(place, {token, 1});
  }
}

std::vector<TokenCount>::iterator PenaltyWindow::find(TokenId token) {
  return std::lower_bound(counts_.begin(), counts_.end(), token,
                          [](const TokenCount& entry, TokenId id) { return entry.id < id; });
}

}  // namespace modularbase
