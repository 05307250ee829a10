#pragma once

#include <cstddef>

namespace modularbase {

/// Bytes that blocks of all kinds and groups may take together. Engine thread only.
class KvBudget {
 public:
  explicit KvBudget(std::size_t n_bytes) : n_bytes_(n_bytes) {}

  /// False, and nothing taken, when they do not fit.
  bool take(std::size_t n) {
    if (n > n_bytes_ - n_used_) return false;
    n_used_ += n;
    return true;
  }
  void give(std::size_t n) { n_used_ -= n; }

  std::size_t n_bytes() const { return n_bytes_; }
  std::size_t n_used() const { return n_used_; }

 private:
  const std::size_t n_bytes_;
  std::size_t n_used_ = 0;
};

}  // namespace modularbase
