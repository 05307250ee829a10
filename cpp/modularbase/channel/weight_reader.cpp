#include <algorithm>
#include <atomic>
#include <future>

#include "modularbase/channel/checksum.h"
#include "modularbase/channel/futex.h"
#include "modularbase/channel/weight_channel.h"
#include "modularbase/core/errors.h"
#include "modularbase/core/utf8.h"

namespace modularbase::channel {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLookAtWriter{50};  // while waiting: does it still run?
constexpr std::chrono::seconds kPatience{10};           // with a writer that overtakes copies
constexpr int kMaxUnequalReads = 100000;

/// What changes while others look: bytes 64 to 95 of the header.
struct Changing {
  std::uint64_t generation;
  std::uint64_t writing;
  std::uint64_t digest[2];
  bool operator==(const Changing&) const = default;
};
static_assert(sizeof(Changing) == 32);
static_assert(offsetof(Changing, digest) == offsetof(WeightHeader, digest) - 64);

/// The kernel may copy a counter in pieces while it changes. Each piece only ever goes forward, so
/// two equal copies, one after the other, are whole.
Changing read_changing(const SharedSegment& segment) {
  Changing now{}, before{};
  const auto bytes_of = [](Changing& from) { return std::as_writable_bytes(std::span(&from, 1)); };
  segment.read(offsetof(WeightHeader, generation), bytes_of(now));
  for (int i = 0; i < kMaxUnequalReads; ++i) {
    before = now;
    std::atomic_thread_fence(std::memory_order_acquire);
    segment.read(offsetof(WeightHeader, generation), bytes_of(now));
    if (now == before) return now;
  }
  throw ChannelError(segment.path(), "generation", "a counter", "one that never rests");
}

/// A region's place within the segment, as 64-byte layouts have them.
void check_region(const SharedSegment& segment, const std::string& name, std::uint64_t offset,
                  std::uint64_t n_bytes) {
  const std::uint64_t end = segment.n_bytes();
  if (offset < sizeof(WeightHeader) || offset % kAlignment != 0 || offset > end ||
      n_bytes > end - offset) {
    throw ChannelError(
        segment.path(), name,
        "a multiple of 64 behind the header, and " + std::to_string(n_bytes) + " bytes there",
        "offset " + std::to_string(offset) + " of " + std::to_string(end) + " bytes");
  }
}

void check_count(const SharedSegment& segment, const std::string& name, std::uint64_t n,
                 std::uint64_t least, std::uint64_t most) {
  if (n >= least && n <= most) return;
  throw ChannelError(segment.path(), name, std::to_string(least) + " to " + std::to_string(most),
                     std::to_string(n));
}

void check_apart(const SharedSegment& segment, const WeightHeader& header) {
  const auto [first, second] = std::minmax(header.payload_offset[0], header.payload_offset[1]);
  if (second - first >= header.payload_bytes) return;
  throw ChannelError(segment.path(), "payload offsets",
                     std::to_string(header.payload_bytes) + " bytes apart",
                     std::to_string(second - first));
}

}  // namespace

WeightReader::WeightReader(std::string_view name)
    : segment_(SharedSegment::open(name, kWeightMagic, SharedSegment::Access::kRead)) {
  read_header();
  std::vector<TensorEntry> entries(fixed_.n_tensors);
  segment_->read(fixed_.directory_offset, std::as_writable_bytes(std::span(entries)));
  tensors_ = decode_directory(path(), entries, fixed_.payload_bytes);
  json_.resize(fixed_.json_bytes);
  segment_->read(fixed_.json_offset, std::as_writable_bytes(std::span(json_)));
  if (!is_valid_utf8(json_)) throw ChannelError(path(), "JSON", "UTF-8", "other bytes");
}

void WeightReader::read_header() {
  if (segment_->n_bytes() < sizeof fixed_) {
    throw ChannelError(path(), "size", "at least " + std::to_string(sizeof fixed_) + " bytes",
                       std::to_string(segment_->n_bytes()));
  }
  segment_->read(0, std::as_writable_bytes(std::span(&fixed_, 1)));
  check_count(*segment_, "number of tensors", fixed_.n_tensors, 1, kMaxTensors);
  check_count(*segment_, "JSON bytes", fixed_.json_bytes, 0, kMaxJsonBytes);
  check_count(*segment_, "payload bytes", fixed_.payload_bytes, 1, kMaxSegmentBytes);
  check_region(*segment_, "directory offset", fixed_.directory_offset,
               fixed_.n_tensors * sizeof(TensorEntry));
  check_region(*segment_, "JSON offset", fixed_.json_offset, fixed_.json_bytes);
  for (const std::uint64_t offset : fixed_.payload_offset) {
    check_region(*segment_, "payload offset", offset, fixed_.payload_bytes);
  }
  check_apart(*segment_, fixed_);
}

std::uint64_t WeightReader::generation() const {
  segment_->check_size();
  return read_changing(*segment_).generation;
}

std::uint64_t WeightReader::wait(std::uint64_t newer_than,
                                 std::chrono::milliseconds timeout) const {
  const auto* counter =
      reinterpret_cast<const std::uint64_t*>(segment_->data() + offsetof(WeightHeader, generation));
  const Clock::time_point end = Clock::now() + timeout;
  while (true) {
    // Asked first: what a writer publishes before it ends is seen below.
    const bool is_over = !is_live();
    const std::uint64_t now = generation();
    const auto left = std::chrono::nanoseconds(end - Clock::now());
    if (now > newer_than || is_over || left.count() <= 0) return now;
    wait_for_change(counter, now, std::min<std::chrono::nanoseconds>(left, kLookAtWriter));
  }
}

WeightReader::Snapshot WeightReader::begin() const {
  segment_->check_size();
  const Changing now = read_changing(*segment_);
  std::atomic_thread_fence(std::memory_order_acquire);
  return {now.generation, now.digest[now.generation % 2]};
}

void WeightReader::copy(const Snapshot& snapshot, std::size_t offset,
                        std::span<std::byte> out) const {
  if (offset > payload_bytes() || out.size() > payload_bytes() - offset) {
    throw InvalidRequestError("bytes", "within the payload", std::to_string(offset));
  }
  segment_->read(fixed_.payload_offset[snapshot.generation % 2] + offset, out);
}

// One core copies out of the page cache at less than half the memory's speed.
void WeightReader::copy_on_two_cores(const Snapshot& snapshot, std::span<std::byte> out) const {
  constexpr std::size_t kWorthAThread = 1 << 20;
  const std::size_t n_first = out.size() < kWorthAThread ? out.size() : out.size() / 2;
  std::future<void> second;
  if (n_first < out.size()) {
    second = std::async(std::launch::async, [&] { copy(snapshot, n_first, out.subspan(n_first)); });
  }
  copy(snapshot, 0, out.first(n_first));
  if (second.valid()) second.get();
}

bool WeightReader::holds(const Snapshot& snapshot) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  const Changing now = read_changing(*segment_);
  return now.generation >= snapshot.generation && now.generation - snapshot.generation <= 1 &&
         now.writing <= snapshot.generation + 1;
}

std::uint64_t WeightReader::read(std::span<std::byte> into, Verify verify) const {
  if (into.size() != payload_bytes()) {
    throw InvalidRequestError("into", std::to_string(payload_bytes()) + " bytes",
                              std::to_string(into.size()));
  }
  const Clock::time_point end = Clock::now() + kPatience;
  do {
    const Snapshot snapshot = begin();
    if (snapshot.generation == 0) return 0;
    copy_on_two_cores(snapshot, into);
    if (!holds(snapshot)) continue;
    if (verify == Verify::kDigest && xxh64(into) != snapshot.digest) {
      throw ChannelError(path(), "digest of generation " + std::to_string(snapshot.generation),
                         std::to_string(snapshot.digest), std::to_string(xxh64(into)));
    }
    return snapshot.generation;
  } while (Clock::now() < end);
  throw ChannelError(path(), "copy", "a generation that stays while it is copied",
                     "one that is overwritten each time");
}

}  // namespace modularbase::channel
