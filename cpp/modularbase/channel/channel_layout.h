#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

/// The bytes of segments that two processes share, as docs/weight-channel.md has them. All numbers
/// are little-endian; what changes while others look is read and written through std::atomic_ref.
namespace modularbase::channel {

static_assert(std::endian::native == std::endian::little, "segments are little-endian");
static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic_ref<std::uint32_t>::is_always_lock_free);

inline constexpr std::uint32_t kLayoutVersion = 1;
inline constexpr std::uint32_t kByteOrderMark = 0x01020304;
inline constexpr std::size_t kAlignment = 64;  // of regions, tensors and records
inline constexpr std::size_t kMaxNameBytes = 63;
inline constexpr std::size_t kMaxDims = 4;
inline constexpr std::size_t kMaxTensors = std::size_t{1} << 16;
inline constexpr std::size_t kMaxJsonBytes = std::size_t{1} << 24;
inline constexpr std::size_t kMaxSegmentBytes = std::size_t{1} << 46;

constexpr std::uint64_t magic_of(std::string_view text) {
  std::uint64_t word = 0;
  for (std::size_t i = 8; i-- > 0;) word = word << 8 | static_cast<unsigned char>(text[i]);
  return word;
}
inline constexpr std::uint64_t kWeightMagic = magic_of("MBWEIGHT");
inline constexpr std::uint64_t kRingMagic = magic_of("MBACTRNG");

enum class State : std::uint32_t { kMaking = 0, kOpen = 1, kClosed = 2 };

constexpr std::size_t aligned(std::size_t n_bytes, std::size_t alignment = kAlignment) {
  return (n_bytes + alignment - 1) / alignment * alignment;
}

/// What every segment begins with; the same in all layout versions, so that any of them can tell
/// whose segment it is.
struct SegmentHeader {
  std::uint64_t magic;  // written last
  std::uint32_t layout_version;
  std::uint32_t byte_order;
  std::uint64_t segment_bytes;
  std::uint64_t owner_pid;
  std::uint64_t owner_start;  // clock ticks since the system started, from /proc/PID/stat
  std::uint32_t state;        // atomic
  std::uint32_t reserved[5];
};
static_assert(sizeof(SegmentHeader) == 64);
static_assert(offsetof(SegmentHeader, layout_version) == 8);
static_assert(offsetof(SegmentHeader, byte_order) == 12);
static_assert(offsetof(SegmentHeader, segment_bytes) == 16);
static_assert(offsetof(SegmentHeader, owner_pid) == 24);
static_assert(offsetof(SegmentHeader, owner_start) == 32);
static_assert(offsetof(SegmentHeader, state) == 40);

/// Generation g lies in payload buffer g % 2.
struct WeightHeader {
  SegmentHeader start;
  std::uint64_t generation;  // atomic: the newest that is published, 0 before the first
  std::uint64_t writing;     // atomic: the newest whose buffer the writer has begun to fill
  std::uint64_t digest[2];   // XXH64, seed 0, of the whole buffer
  std::uint64_t reserved[4];
  std::uint64_t json_offset;
  std::uint64_t json_bytes;
  std::uint64_t directory_offset;
  std::uint64_t n_tensors;
  std::uint64_t payload_bytes;  // of one buffer
  std::uint64_t payload_offset[2];
  std::uint64_t reserved_end[9];
};
static_assert(sizeof(WeightHeader) == 256);
static_assert(offsetof(WeightHeader, generation) == 64);
static_assert(offsetof(WeightHeader, writing) == 72);
static_assert(offsetof(WeightHeader, digest) == 80);
static_assert(offsetof(WeightHeader, json_offset) == 128);
static_assert(offsetof(WeightHeader, directory_offset) == 144);
static_assert(offsetof(WeightHeader, payload_bytes) == 160);
static_assert(offsetof(WeightHeader, payload_offset) == 168);

struct TensorEntry {
  char name[kMaxNameBytes + 1];  // UTF-8, filled up with zeros
  std::uint32_t type;            // ggml's number
  std::uint32_t n_dims;
  std::uint64_t ne[kMaxDims];  // contiguous dimension first; 1 from n_dims on
  std::uint64_t offset;        // from the start of a payload buffer
  std::uint64_t n_bytes;
  std::uint64_t reserved;
};
static_assert(sizeof(TensorEntry) == 128);
static_assert(offsetof(TensorEntry, type) == 64);
static_assert(offsetof(TensorEntry, ne) == 72);
static_assert(offsetof(TensorEntry, offset) == 104);
static_assert(offsetof(TensorEntry, n_bytes) == 112);

/// Record r, counted from the ring's start of life, lies at place r % n_records.
struct RingHeader {
  SegmentHeader start;
  std::uint64_t head;       // atomic: records that the producer has put in
  std::uint64_t n_dropped;  // atomic: records that found no place
  std::uint64_t reserved[6];
  std::uint64_t tail;  // atomic: records that the consumer has taken out
  std::uint64_t reserved_consumer[7];
  std::uint64_t records_offset;
  std::uint64_t record_bytes;  // apart, a multiple of 64
  std::uint64_t n_records;
  std::uint64_t n_embd;
  std::uint32_t row_type;  // ggml's number: F32 or F16
  std::uint32_t reserved_end[7];
};
static_assert(sizeof(RingHeader) == 256);
static_assert(offsetof(RingHeader, head) == 64);
static_assert(offsetof(RingHeader, n_dropped) == 72);
static_assert(offsetof(RingHeader, tail) == 128);
static_assert(offsetof(RingHeader, records_offset) == 192);
static_assert(offsetof(RingHeader, n_embd) == 216);
static_assert(offsetof(RingHeader, row_type) == 224);

/// What a record begins with; its row of n_embd numbers follows.
struct RecordHeader {
  std::uint64_t sequence;  // of one request
  std::uint32_t position;  // in its context, from 0
  std::int32_t token;
};
static_assert(sizeof(RecordHeader) == 16);

}  // namespace modularbase::channel
