#include "modularbase/sampling/row_scan.h"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::size_t kBlock = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BlockScan {
  float max;
  int n_bad;  // NaN or +infinity
};

BlockScan scan_block(const float* x) {
  float max = -kInfinity;
  int n_bad = 0;
#pragma omp simd reduction(max : max) reduction(+ : n_bad)
  for (std::size_t i = 0; i < kBlock; ++i) {
    max = x[i] > max ? x[i] : max;
    n_bad += x[i] < kInfinity ? 0 : 1;
  }
  return {max, n_bad};
}

}  // namespace

void RowScan::scan(std::span<const float> logits) {
  logits_ = logits;
  block_max_.resize((logits.size() + kBlock - 1) / kBlock);
  max_ = -kInfinity;
  int n_bad = 0;
  for (std::size_t block = 0; block < block_max_.size(); ++block) {
    const auto values = logits.subspan(block * kBlock);
    std::array<float, kBlock> tail;
    const float* x = values.data();
    if (values.size() < kBlock) {
      tail.fill(-kInfinity);
      std::copy(values.begin(), values.end(), tail.begin());
      x = tail.data();
    }
    const BlockScan found = scan_block(x);
    block_max_[block] = found.max;
    max_ = std::max(max_, found.max);
    n_bad += found.n_bad;
  }
  if (n_bad > 0) {
    throw Error("logits: " + std::to_string(n_bad) + " of " + std::to_string(logits.size()) +
                " are NaN or +infinity");
  }
  if (max_ == -kInfinity) {
    throw Error("logits: all " + std::to_string(logits.size()) +
                " tokens are ruled out (-infinity)");
  }
}

std::size_t RowScan::argmax() const {
  const auto block = std::find(block_max_.begin(), block_max_.end(), max_) - block_max_.begin();
  const auto first = logits_.begin() + block * static_cast<std::ptrdiff_t>(kBlock);
  return static_cast<std::size_t>(std::find(first, logits_.end(), max_) - logits_.begin());
}

float RowScan::reached_by(std::size_t k) {
  if (k > block_max_.size()) return -kInfinity;
  // k blocks have a largest logit of at least the k-th largest block maximum, so k logits reach it.
  ranked_ = block_max_;
  const auto kth = ranked_.begin() + static_cast<std::ptrdiff_t>(k) - 1;
  std::nth_element(ranked_.begin(), kth, ranked_.end(), std::greater<>());
  return *kth;
}

void RowScan::collect(std::span<const TokenId> ids, float threshold, Candidates& candidates) const {
  candidates.items.clear();
  candidates.sorted = false;
  for (std::size_t block = 0; block < block_max_.size(); ++block) {
    if (block_max_[block] < threshold) continue;
    const std::size_t end = std::min(logits_.size(), (block + 1) * kBlock);
    for (std::size_t i = block * kBlock; i < end; ++i) {
      if (logits_[i] < threshold) continue;
      const TokenId id = ids.empty() ? static_cast<TokenId>(i) : ids[i];
      candidates.items.push_back({id, logits_[i], 0.0f});
    }
  }
}

}  // namespace modularbase
