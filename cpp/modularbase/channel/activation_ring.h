#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "modularbase/channel/shared_segment.h"
#include "modularbase/channel/tensor_directory.h"

namespace modularbase::channel {

/// What a ring holds: rows of the residual stream, each with where it comes from.
struct RingShape {
  std::int64_t n_embd = 0;
  TensorType row_type = TensorType::kF32;  // or kF16
  std::int64_t n_records = 0;

  std::size_t row_bytes() const;
  /// From one record to the next.
  std::size_t record_bytes() const { return aligned(sizeof(RecordHeader) + row_bytes()); }
};

/// Puts records into a ring of its own, and never waits for who takes them out. One thread.
class ActivationProducer {
 public:
  /// \throws InvalidRequestError for the name or shape; ChannelError, see SharedSegment::create().
  ActivationProducer(std::string_view name, const RingShape& shape);
  ~ActivationProducer() { close(); }
  ActivationProducer(const ActivationProducer&) = delete;
  ActivationProducer& operator=(const ActivationProducer&) = delete;

  const std::string& path() const { return segment_->path(); }
  const std::string& notice() const { return segment_->notice(); }
  const RingShape& shape() const { return shape_; }
  std::uint64_t n_dropped() const { return n_dropped_; }

  /// \param row in the ring's type [n_embd].
  /// \return false when the ring is full: the record is dropped whole, and counted.
  /// \throws InvalidRequestError for a row of another size; ChannelError when closed, shrunken, or
  /// when the consumer's counter cannot be.
  bool push(const RecordHeader& from, std::span<const std::byte> row);
  /// Removes the name; the consumer may take out what is in. Idempotent.
  void close() noexcept { segment_->close(); }

 private:
  RingHeader& header() const { return *reinterpret_cast<RingHeader*>(segment_->data()); }

  RingShape shape_;
  std::shared_ptr<SharedSegment> segment_;
  std::uint64_t head_ = 0;
  std::uint64_t n_dropped_ = 0;
};

/// Takes records out of another process's ring; one at a time per ring, one thread.
class ActivationConsumer {
 public:
  /// \throws ChannelError, see SharedSegment::open(); also for a header that cannot be, or when
  /// another consumer has the ring.
  explicit ActivationConsumer(std::string_view name);

  const std::string& path() const { return segment_->path(); }
  const RingShape& shape() const { return shape_; }
  /// Whether the producer may still put records in.
  bool is_live() const { return segment_->is_live(); }
  std::uint64_t n_dropped() const;
  /// Records that wait. \throws ChannelError when shrunken, or when the counters cannot be.
  std::size_t n_waiting() const;
  /// Waits until there is one, at most so long; less when the producer ends. Returns n_waiting().
  std::size_t wait(std::chrono::milliseconds timeout) const;

  /// The oldest records, record_bytes() apart, in the ring itself: as many as lie in one piece, at
  /// most `max_records`. They stay until advance(). \throws ChannelError as n_waiting().
  std::span<const std::byte> batch(std::size_t max_records) const;
  /// Gives the places of the oldest records back. \throws InvalidRequestError for more than wait.
  void advance(std::size_t n_records);
  /// Keeps the mapping, and so all batches, alive.
  std::shared_ptr<const void> mapping() const { return segment_; }

 private:
  RingHeader& header() const { return *reinterpret_cast<RingHeader*>(segment_->data()); }
  void read_header();

  std::shared_ptr<SharedSegment> segment_;
  RingShape shape_;
  std::size_t records_offset_ = 0;
};

}  // namespace modularbase::channel
