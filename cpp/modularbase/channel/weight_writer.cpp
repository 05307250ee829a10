#include <algorithm>
#include <atomic>
#include <cstring>

#include "modularbase/channel/checksum.h"
#include "modularbase/channel/futex.h"
#include "modularbase/channel/weight_channel.h"
#include "modularbase/core/errors.h"
#include "modularbase/core/utf8.h"

namespace modularbase::channel {
namespace {

constexpr std::size_t kPageBytes = 4096;  // of payload buffers, so that none shares a page

/// Where the regions of a segment lie: header, directory, JSON, two payload buffers.
struct Regions {
  Regions(std::span<const PlacedTensor> tensors, std::string_view json) {
    n_payload_bytes = payload_bytes(tensors);
    json_offset = directory_offset + tensors.size() * sizeof(TensorEntry);
    payload_offset[0] = aligned(json_offset + json.size(), kPageBytes);
    payload_offset[1] = aligned(payload_offset[0] + n_payload_bytes, kPageBytes);
    n_bytes = payload_offset[1] + n_payload_bytes;
  }
  std::size_t directory_offset = sizeof(WeightHeader);
  std::size_t json_offset;
  std::size_t n_payload_bytes;
  std::size_t payload_offset[2];
  std::size_t n_bytes;
};

void check_json(std::string_view json) {
  if (json.size() > kMaxJsonBytes) {
    throw InvalidRequestError("JSON", "at most " + std::to_string(kMaxJsonBytes) + " bytes",
                              std::to_string(json.size()));
  }
  if (!is_valid_utf8(json)) throw InvalidRequestError("JSON", "UTF-8", "other bytes");
}

}  // namespace

WeightWriter::WeightWriter(std::string_view name, std::span<const ChannelTensor> tensors,
                           std::string_view json)
    : tensors_(place_tensors(tensors)) {
  check_json(json);
  const Regions regions(tensors_, json);
  segment_ = SharedSegment::create(name, regions.n_bytes);
  WeightHeader& to = header();
  to.directory_offset = regions.directory_offset;
  to.n_tensors = tensors_.size();
  to.json_offset = regions.json_offset;
  to.json_bytes = json.size();
  to.payload_bytes = regions.n_payload_bytes;
  std::copy_n(regions.payload_offset, 2, to.payload_offset);
  const std::vector<TensorEntry> entries = encode_directory(tensors_);
  std::memcpy(segment_->data() + regions.directory_offset, entries.data(),
              entries.size() * sizeof(TensorEntry));
  std::copy(json.begin(), json.end(),
            reinterpret_cast<char*>(segment_->data() + regions.json_offset));
  segment_->publish_header(kWeightMagic);
}

std::span<std::byte> WeightWriter::idle_buffer() {
  segment_->check_writable();
  // Readers of the generation that lies in this buffer must know before the first byte changes.
  std::atomic_ref(header().writing).store(generation_ + 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  const std::size_t offset = header().payload_offset[(generation_ + 1) % 2];
  return {segment_->data() + offset, payload_bytes(tensors_)};
}

std::span<std::byte> WeightWriter::buffer(std::string_view tensor) {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const PlacedTensor& t) { return t.name == tensor; });
  if (found == tensors_.end()) {
    throw InvalidRequestError("tensor", "one of this channel", tensor);
  }
  return idle_buffer().subspan(found->offset, found->n_bytes);
}

std::uint64_t WeightWriter::publish() {
  const std::uint64_t digest = xxh64(idle_buffer());
  const std::uint64_t next = generation_ + 1;
  header().digest[next % 2] = digest;
  std::atomic_ref(header().generation).store(next, std::memory_order_release);
  wake_waiting(&header().generation);
  generation_ = next;
  return next;
}

void WeightWriter::close() noexcept {
  segment_->close();
  wake_waiting(&header().generation);
}

}  // namespace modularbase::channel
