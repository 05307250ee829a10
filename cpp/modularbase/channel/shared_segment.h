#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "modularbase/channel/channel_layout.h"
#include "modularbase/channel/process_identity.h"

namespace modularbase::channel {

/// "/modularbase-UID-NAME", as shm_open wants it.
/// \throws InvalidRequestError unless the name is 1 to 64 of A-Z a-z 0-9 . _ -
std::string segment_path(std::string_view name);

/// A POSIX shared-memory segment, mapped whole. Its owner is who made it: the name is gone when the
/// owner is, and where the owner had no time for that, when the next one makes a segment of that
/// name. Touching a mapping that somebody made shorter ends the process, so what another process
/// made is read through the descriptor, and one's own after check_size().
class SharedSegment {
 public:
  enum class Access { kRead, kReadWrite };
  enum class Role : std::uint8_t { kOwner = 0, kConsumer = 1 };  // each for one at a time

  /// Zeros but for the header's start, with all its memory reserved. Nobody can open it before
  /// publish_header().
  /// \throws InvalidRequestError for the name; ChannelError where there is no room, or where the
  /// segment exists and is not one that a process which has ended left behind.
  static std::shared_ptr<SharedSegment> create(std::string_view name, std::size_t n_bytes);
  /// \param magic the kind of segment that is wanted.
  /// \throws ChannelError when there is none, when it is another user's, another kind's or
  /// layout's, still being made, or of another size than it says.
  static std::shared_ptr<SharedSegment> open(std::string_view name, std::uint64_t magic,
                                             Access access);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  const std::string& path() const { return path_; }
  /// What was found and removed when the segment was made; empty when nothing.
  const std::string& notice() const { return notice_; }
  const ProcessIdentity& owner() const { return owner_; }
  std::size_t n_bytes() const { return n_bytes_; }
  /// The mapping; only for reading unless the segment was made here or opened kReadWrite.
  std::byte* data() const { return data_; }
  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(data_); }

  /// Writes the magic: from now on it can be opened.
  void publish_header(std::uint64_t magic);
  State state() const;
  /// Whether the owner still runs and has not closed the segment.
  bool is_live() const;
  /// \throws ChannelError when the segment is shorter than it was.
  void check_size() const;
  /// What an owner asks before it writes. \throws ChannelError as check_size(), when it was closed,
  /// and in a child of the owner: there would be two who write.
  void check_writable() const;
  /// Copies bytes through the descriptor: never a signal. \throws ChannelError as check_size().
  void read(std::size_t offset, std::span<std::byte> out) const;
  /// Until this segment is destroyed, or the process. \throws ChannelError when another is it.
  void become_consumer() const;
  /// What an owner does when it ends: tells readers, and removes the name. In a child of the owner
  /// it does nothing.
  void close() noexcept;

 private:
  SharedSegment(std::string path, int descriptor);
  void map(std::size_t n_bytes, Access access);
  void reserve(std::size_t n_bytes);
  void fill_header();
  void check_origin() const;
  void check_header(const SegmentHeader& found, std::uint64_t magic) const;
  std::size_t size_on_disk() const;
  bool is_unlinked() const;
  bool try_lock(Role role) const;
  void wait_for_lock(Role role) const;
  std::optional<std::string> take_over() const;

  std::string path_;
  std::string notice_;
  int descriptor_ = -1;
  std::byte* data_ = nullptr;
  std::size_t n_bytes_ = 0;
  ProcessIdentity owner_;
  bool is_owner_ = false;  // until it is closed
};

}  // namespace modularbase::channel
