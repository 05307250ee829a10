#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "modularbase/channel/shared_segment.h"
#include "modularbase/channel/tensor_directory.h"

namespace modularbase::channel {

/// Publishes generations of weights, one whole set of tensors after another, in two buffers that
/// take turns. One thread at a time. After publish() the other buffer is the idle one; spans of
/// before point into what readers may be copying.
class WeightWriter {
 public:
  /// \param json says what the tensors are for; readers get it as it is.
  /// \throws InvalidRequestError for names or shapes; ChannelError, see SharedSegment::create().
  WeightWriter(std::string_view name, std::span<const ChannelTensor> tensors,
               std::string_view json);
  ~WeightWriter() { close(); }
  WeightWriter(const WeightWriter&) = delete;
  WeightWriter& operator=(const WeightWriter&) = delete;

  const std::string& path() const { return segment_->path(); }
  /// What an earlier writer left behind and this one removed; empty when nothing.
  const std::string& notice() const { return segment_->notice(); }
  const std::vector<PlacedTensor>& tensors() const { return tensors_; }
  std::uint64_t generation() const { return generation_; }
  /// Keeps the mapping, and so all spans, alive.
  std::shared_ptr<const void> mapping() const { return segment_; }

  /// A tensor's bytes in the idle buffer, which holds what was published two generations ago.
  /// \throws InvalidRequestError for another name; ChannelError when closed or shrunken.
  std::span<std::byte> buffer(std::string_view tensor);
  /// Shows the idle buffer to readers; returns its generation. \throws ChannelError as buffer().
  std::uint64_t publish();
  /// Removes the name; readers keep the last generation. Idempotent.
  void close() noexcept;

 private:
  WeightHeader& header() const { return *reinterpret_cast<WeightHeader*>(segment_->data()); }
  std::span<std::byte> idle_buffer();

  std::vector<PlacedTensor> tensors_;
  std::shared_ptr<SharedSegment> segment_;
  std::uint64_t generation_ = 0;
};

/// Copies what a writer in another process publishes. Any thread; reads only through the
/// descriptor, so nothing that happens to the segment is worse than an error.
class WeightReader {
 public:
  /// \throws ChannelError, see SharedSegment::open(); also for a directory that cannot be.
  explicit WeightReader(std::string_view name);

  const std::string& path() const { return segment_->path(); }
  const std::vector<PlacedTensor>& tensors() const { return tensors_; }
  const std::string& json() const { return json_; }
  std::size_t payload_bytes() const { return fixed_.payload_bytes; }
  /// Whether the writer may still publish.
  bool is_live() const { return segment_->is_live(); }
  /// Whether the writer has said that it will not; one that was killed has not.
  bool is_closed() const { return segment_->state() == State::kClosed; }
  /// The newest that is published; 0 before the first. \throws ChannelError when shrunken.
  std::uint64_t generation() const;
  /// Waits for a generation newer than that, at most so long; earlier where the writer ends.
  /// Returns generation().
  std::uint64_t wait(std::uint64_t newer_than, std::chrono::milliseconds timeout) const;

  enum class Verify { kNo, kDigest };
  /// Copies the newest generation into `into` [payload_bytes] and returns its number; 0, and
  /// copies nothing, before the first. Repeats a copy that the writer overtook.
  /// \throws ChannelError when the digest is another, the segment shrunken, or the writer overtakes
  /// copies for seconds.
  std::uint64_t read(std::span<std::byte> into, Verify verify = Verify::kNo) const;

  /// For a copy in pieces: what a generation's bytes are, until holds() says that the writer has
  /// begun to write over them, and what was copied must be thrown away.
  struct Snapshot {
    std::uint64_t generation = 0;
    std::uint64_t digest = 0;
  };
  Snapshot begin() const;
  void copy(const Snapshot& snapshot, std::size_t offset, std::span<std::byte> out) const;
  bool holds(const Snapshot& snapshot) const;

 private:
  void read_header();
  void copy_on_two_cores(const Snapshot& snapshot, std::span<std::byte> out) const;

  std::shared_ptr<SharedSegment> segment_;
  WeightHeader fixed_{};  // of which only what never changes is used
  std::vector<PlacedTensor> tensors_;
  std::string json_;
};

}  // namespace modularbase::channel
