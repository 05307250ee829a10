#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "modularbase/channel/activation_ring.h"
#include "modularbase/engine/step_plan.h"

namespace modularbase {

/// What a tap is told.
struct TapOptions {
  std::string channel;            // name of the ring it makes
  int layer = -1;                 // whose entering rows it takes; -1: the first site's
  std::int64_t n_records = 4096;  // places in the ring
  channel::TensorType row_type = channel::TensorType::kF16;  // or kF32
};

/// Puts the rows that enter one layer into a ring, step by step. It never waits: a full ring drops
/// rows, and one that cannot be used any more closes the tap. The engine's thread pushes;
/// everything else may be called from any thread.
class ActivationTap {
 public:
  /// \param layer what options.layer stands for.
  /// \throws InvalidRequestError, ChannelError: see ActivationProducer.
  ActivationTap(const TapOptions& options, int layer, std::int64_t n_embd);

  /// The rows of one step [n_embd, n], in the order of the plan's spans and mid_spans.
  void push(const StepPlan& plan, std::span<const float> rows) noexcept;
  /// Removes the ring's name; no row comes after it. Idempotent.
  void close() noexcept;

  const std::string& path() const { return ring_.path(); }
  const std::string& notice() const { return ring_.notice(); }
  int layer() const { return layer_; }
  bool is_open() const { return is_open_.load(std::memory_order_relaxed); }
  /// Rows that were put in.
  std::uint64_t n_pushed() const { return n_pushed_.load(std::memory_order_relaxed); }
  /// Rows that found the ring full.
  std::uint64_t n_dropped() const { return n_dropped_.load(std::memory_order_relaxed); }
  /// Why the tap closed itself; empty where it did not.
  std::string last_error() const;

 private:
  void push_spans(const std::vector<StepSpan>& spans, std::span<const float>& rows);
  void push_row(const channel::RecordHeader& from, std::span<const float> row);

  const int layer_;
  const std::size_t n_embd_;
  mutable std::mutex mutex_;  // guards what follows; held for the rows of one step at most
  channel::ActivationProducer ring_;
  std::vector<std::uint16_t> narrow_;  // a row in F16
  std::string last_error_;
  std::atomic<bool> is_open_{true};
  std::atomic<std::uint64_t> n_pushed_{0};
  std::atomic<std::uint64_t> n_dropped_{0};
};

}  // namespace modularbase
