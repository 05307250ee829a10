#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <utility>

namespace modularbase {

/// Lets long work on the side give way. Where every core computes, whoever needs one stalls all
/// threads of a step for as long as the kernel lets it run, some milliseconds: so the work is cut
/// into slices of a fraction of a millisecond, with rests between them.
class Pacer {
 public:
  /// A slice of bytes that are read, hashed or copied: some 0.2 ms.
  static constexpr std::size_t kSliceBytes = 256 * 1024;

  Pacer() = default;  // never rests
  explicit Pacer(std::function<bool()> is_busy) : is_busy_(std::move(is_busy)) {}

  bool is_busy() const { return is_busy_ && is_busy_(); }
  /// Call after each slice: rests for kRest times its length while others need the cores.
  void rest() {
    if (!is_busy_) return;
    if (is_busy()) std::this_thread::sleep_for(kRest * (Clock::now() - begin_));
    begin_ = Clock::now();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kRest = 4;  // a fifth of one core
  std::function<bool()> is_busy_;
  Clock::time_point begin_ = Clock::now();
};

}  // namespace modularbase
