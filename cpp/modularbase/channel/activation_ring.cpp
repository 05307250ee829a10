#include "modularbase/channel/activation_ring.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "modularbase/core/errors.h"

namespace modularbase::channel {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kMaxEmbd = std::int64_t{1} << 20;
constexpr std::int64_t kMaxRecords = std::int64_t{1} << 24;
constexpr std::chrono::milliseconds kNap{2};  // of a consumer that waits: about one decode step

/// The name of what cannot be in a shape; empty where all can.
std::string find_fault(const RingShape& shape) {
  if (shape.row_type != TensorType::kF32 && shape.row_type != TensorType::kF16) return "row type";
  if (shape.n_embd < 1 || shape.n_embd > kMaxEmbd) return "n_embd";
  if (shape.n_records < 1 || shape.n_records > kMaxRecords) return "number of records";
  return {};
}

constexpr char kPossible[] = "F32 or F16 rows of 1 to 2^20 numbers, 1 to 2^24 records";

std::string text_of(const RingShape& shape) {
  return "type " + std::to_string(static_cast<std::uint32_t>(shape.row_type)) + ", " +
         std::to_string(shape.n_embd) + " numbers, " + std::to_string(shape.n_records) + " records";
}

/// \throws ChannelError: each side must be sure of the other's counter before it trusts a place.
std::size_t count_waiting(const SharedSegment& segment, const RingShape& shape, std::uint64_t head,
                          std::uint64_t tail) {
  const std::uint64_t n_waiting = head - tail;
  if (n_waiting > static_cast<std::uint64_t>(shape.n_records)) {
    throw ChannelError(segment.path(), "counters",
                       "at most " + std::to_string(shape.n_records) + " records in the ring",
                       "head " + std::to_string(head) + ", tail " + std::to_string(tail));
  }
  return n_waiting;
}

}  // namespace

std::size_t RingShape::row_bytes() const {
  return static_cast<std::size_t>(n_embd * block_size(row_type).n_bytes);
}

ActivationProducer::ActivationProducer(std::string_view name, const RingShape& shape)
    : shape_(shape) {
  const std::string fault = find_fault(shape);
  if (!fault.empty()) throw InvalidRequestError(fault, kPossible, text_of(shape));
  const auto n_records = static_cast<std::size_t>(shape.n_records);
  segment_ = SharedSegment::create(name, sizeof(RingHeader) + n_records * shape.record_bytes());
  header().records_offset = sizeof(RingHeader);
  header().record_bytes = shape.record_bytes();
  header().n_records = n_records;
  header().n_embd = static_cast<std::uint64_t>(shape.n_embd);
  header().row_type = static_cast<std::uint32_t>(shape.row_type);
  segment_->publish_header(kRingMagic);
}

bool ActivationProducer::push(const RecordHeader& from, std::span<const std::byte> row) {
  if (row.size() != shape_.row_bytes()) {
    throw InvalidRequestError("row", std::to_string(shape_.row_bytes()) + " bytes",
                              std::to_string(row.size()));
  }
  segment_->check_writable();
  const auto n_records = static_cast<std::size_t>(shape_.n_records);
  // Acquire: the consumer has read what was at the places that it gave back.
  const auto tail = std::atomic_ref(header().tail).load(std::memory_order_acquire);
  if (count_waiting(*segment_, shape_, head_, tail) == n_records) {
    std::atomic_ref(header().n_dropped).store(++n_dropped_, std::memory_order_relaxed);
    return false;
  }
  std::byte* const to =
      segment_->data() + sizeof(RingHeader) + head_ % n_records * shape_.record_bytes();
  std::memcpy(to, &from, sizeof from);
  std::memcpy(to + sizeof from, row.data(), row.size());
  std::atomic_ref(header().head).store(++head_, std::memory_order_release);
  return true;
}

ActivationConsumer::ActivationConsumer(std::string_view name)
    : segment_(SharedSegment::open(name, kRingMagic, SharedSegment::Access::kReadWrite)) {
  read_header();
  segment_->become_consumer();
  (void)n_waiting();
}

void ActivationConsumer::read_header() {
  RingHeader found;
  if (segment_->n_bytes() < sizeof found) {
    throw ChannelError(path(), "size", "at least " + std::to_string(sizeof found) + " bytes",
                       std::to_string(segment_->n_bytes()));
  }
  segment_->read(0, std::as_writable_bytes(std::span(&found, 1)));
  shape_ = {static_cast<std::int64_t>(found.n_embd), static_cast<TensorType>(found.row_type),
            static_cast<std::int64_t>(found.n_records)};
  const std::string fault = find_fault(shape_);
  if (!fault.empty()) throw ChannelError(path(), fault, kPossible, text_of(shape_));
  if (found.record_bytes != shape_.record_bytes()) {
    throw ChannelError(path(), "record bytes", std::to_string(shape_.record_bytes()),
                       std::to_string(found.record_bytes));
  }
  const std::uint64_t n_bytes = found.n_records * found.record_bytes;
  if (found.records_offset < sizeof found || found.records_offset % kAlignment != 0 ||
      found.records_offset > segment_->n_bytes() ||
      n_bytes > segment_->n_bytes() - found.records_offset) {
    throw ChannelError(path(), "records offset",
                       "a multiple of 64 with " + std::to_string(n_bytes) + " bytes behind it",
                       std::to_string(found.records_offset));
  }
  records_offset_ = found.records_offset;
}

std::uint64_t ActivationConsumer::n_dropped() const {
  segment_->check_size();
  return std::atomic_ref(header().n_dropped).load(std::memory_order_relaxed);
}

std::size_t ActivationConsumer::n_waiting() const {
  segment_->check_size();
  const auto head = std::atomic_ref(header().head).load(std::memory_order_acquire);
  const auto tail = std::atomic_ref(header().tail).load(std::memory_order_relaxed);
  return count_waiting(*segment_, shape_, head, tail);
}

std::size_t ActivationConsumer::wait(std::chrono::milliseconds timeout) const {
  const Clock::time_point end = Clock::now() + timeout;
  while (true) {
    const bool is_over = !is_live();  // asked first: what it put in before is seen below
    const std::size_t n = n_waiting();
    const auto left = std::chrono::nanoseconds(end - Clock::now());
    if (n > 0 || is_over || left.count() <= 0) return n;
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(left, kNap));
  }
}

std::span<const std::byte> ActivationConsumer::batch(std::size_t max_records) const {
  const std::size_t n = std::min(n_waiting(), max_records);
  const auto n_records = static_cast<std::size_t>(shape_.n_records);
  const std::size_t first =
      std::atomic_ref(header().tail).load(std::memory_order_relaxed) % n_records;
  return {segment_->data() + records_offset_ + first * shape_.record_bytes(),
          std::min(n, n_records - first) * shape_.record_bytes()};
}

void ActivationConsumer::advance(std::size_t n_records) {
  const std::size_t n = n_waiting();
  if (n_records > n) {
    throw InvalidRequestError("records", "at most " + std::to_string(n), std::to_string(n_records));
  }
  const auto tail = std::atomic_ref(header().tail).load(std::memory_order_relaxed);
  std::atomic_ref(header().tail).store(tail + n_records, std::memory_order_release);
}

}  // namespace modularbase::channel
