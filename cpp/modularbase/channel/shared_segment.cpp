#include "modularbase/channel/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/core/log.h"

namespace modularbase::channel {
namespace {

constexpr int kMaxAttempts = 100;  // of creating, against others who create and remove the name

std::string hex(std::uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "0x";
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[value >> shift & 15];
  return text;
}

struct ::flock lock_of(SharedSegment::Role role) {
  struct ::flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<::off_t>(role);
  lock.l_len = 1;
  return lock;
}

}  // namespace

std::string segment_path(std::string_view name) {
  const auto is_allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  if (name.empty() || name.size() > 64 || !std::all_of(name.begin(), name.end(), is_allowed)) {
    throw InvalidRequestError("channel name", "1 to 64 of A-Z a-z 0-9 . _ -", name);
  }
  return "/modularbase-" + std::to_string(::geteuid()) + "-" + std::string(name);
}

SharedSegment::SharedSegment(std::string path, int descriptor)
    : path_(std::move(path)), descriptor_(descriptor) {}

SharedSegment::~SharedSegment() {
  close();
  if (data_ != nullptr) ::munmap(data_, n_bytes_);
  ::close(descriptor_);
}

std::shared_ptr<SharedSegment> SharedSegment::create(std::string_view name, std::size_t n_bytes) {
  const std::string path = segment_path(name);
  std::string notice;
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    const int made = ::shm_open(path.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (made >= 0) {
      std::shared_ptr<SharedSegment> segment(new SharedSegment(path, made));
      segment->wait_for_lock(Role::kOwner);
      // Between the two calls another may have taken it for one that was left behind.
      if (segment->is_unlinked()) continue;
      segment->is_owner_ = true;
      segment->owner_ = ProcessIdentity::self();
      segment->notice_ = notice;
      segment->reserve(n_bytes);
      segment->map(n_bytes, Access::kReadWrite);
      segment->fill_header();
      return segment;
    }
    if (errno != EEXIST) {
      throw ChannelError(path, "file", "a segment that can be made", system_error_text(errno));
    }
    const int existing = ::shm_open(path.c_str(), O_RDWR | O_NONBLOCK, 0);
    if (existing < 0 && errno == ENOENT) continue;
    if (existing < 0) {
      throw ChannelError(path, "owner", "user " + std::to_string(::geteuid()),
                         system_error_text(errno));
    }
    const SharedSegment left(path, existing);
    if (auto removed = left.take_over()) {
      notice = *std::move(removed);
      log(LogLevel::kWarning, notice);
    }
  }
  throw ChannelError(path, "file", "a name that others leave alone", "one that comes and goes");
}

std::shared_ptr<SharedSegment> SharedSegment::open(std::string_view name, std::uint64_t magic,
                                                   Access access) {
  const std::string path = segment_path(name);
  const int flags = (access == Access::kRead ? O_RDONLY : O_RDWR) | O_NONBLOCK;
  const int descriptor = ::shm_open(path.c_str(), flags, 0);
  if (descriptor < 0) {
    throw ChannelError(path, "file", "a segment that can be opened", system_error_text(errno));
  }
  std::shared_ptr<SharedSegment> segment(new SharedSegment(path, descriptor));
  segment->check_origin();
  const std::size_t n_bytes = segment->size_on_disk();
  if (n_bytes < sizeof(SegmentHeader)) {
    throw ChannelError(path, "size", "at least " + std::to_string(sizeof(SegmentHeader)) + " bytes",
                       std::to_string(n_bytes));
  }
  SegmentHeader header;
  segment->read(0, std::as_writable_bytes(std::span(&header, 1)));
  segment->check_header(header, magic);
  if (header.segment_bytes != n_bytes) {
    throw ChannelError(path, "size", std::to_string(header.segment_bytes) + " bytes",
                       std::to_string(n_bytes));
  }
  segment->owner_ = {header.owner_pid, header.owner_start};
  segment->map(n_bytes, access);
  return segment;
}

/// Removes a segment that nobody owns any more; says so. Nothing when it was gone already.
std::optional<std::string> SharedSegment::take_over() const {
  check_origin();
  SegmentHeader header{};
  if (size_on_disk() >= sizeof header) read(0, std::as_writable_bytes(std::span(&header, 1)));
  const ProcessIdentity owner{header.owner_pid, header.owner_start};
  const auto held = [&] {
    return ChannelError(path_, "owner", "no other writer",
                        owner.pid == 0 ? "one that begins" : owner.text());
  };
  if (!try_lock(Role::kOwner)) {
    if (is_unlinked()) return {};
    throw held();
  }
  if (is_unlinked()) return {};
  if (header.magic != 0 && header.magic != kWeightMagic && header.magic != kRingMagic) {
    throw ChannelError(path_, "magic", "a segment of ModularBase", hex(header.magic));
  }
  if (owner.is_running()) throw held();
  ::shm_unlink(path_.c_str());
  return "removed the shared-memory segment " + path_ + ", which " +
         (owner.pid == 0 ? "a process" : owner.text()) + " left behind when it ended";
}

void SharedSegment::check_origin() const {
  struct ::stat status{};
  if (::fstat(descriptor_, &status) != 0) {
    throw ChannelError(path_, "file", "a segment that can be read", system_error_text(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw ChannelError(path_, "file", "a shared-memory segment", "another kind of file");
  }
  if (status.st_uid != ::geteuid()) {
    throw ChannelError(path_, "owner", "user " + std::to_string(::geteuid()),
                       "user " + std::to_string(status.st_uid));
  }
  if ((status.st_mode & 077) != 0) {
    throw ChannelError(path_, "mode", "access for its owner alone", "access for others");
  }
}

void SharedSegment::check_header(const SegmentHeader& found, std::uint64_t magic) const {
  if (found.magic == 0) throw ChannelError(path_, "state", "a segment", "one that is being made");
  if (found.magic != magic) throw ChannelError(path_, "magic", hex(magic), hex(found.magic));
  if (found.byte_order != kByteOrderMark) {
    throw ChannelError(path_, "byte order", hex(kByteOrderMark), hex(found.byte_order));
  }
  if (found.layout_version != kLayoutVersion) {
    throw ChannelError(path_, "layout version", std::to_string(kLayoutVersion),
                       std::to_string(found.layout_version));
  }
  if (found.state != static_cast<std::uint32_t>(State::kOpen) &&
      found.state != static_cast<std::uint32_t>(State::kClosed)) {
    throw ChannelError(path_, "state", "1 (open) or 2 (closed)", std::to_string(found.state));
  }
}

void SharedSegment::reserve(std::size_t n_bytes) {
  ::fchmod(descriptor_, 0600);  // whatever the umask took away
  struct ::statvfs volume{};
  const std::string expected = std::to_string(n_bytes) + " free bytes of shared memory";
  // A volume without blocks has no limit.
  if (::fstatvfs(descriptor_, &volume) == 0 && volume.f_blocks > 0) {
    const std::uint64_t n_free = std::uint64_t{volume.f_bavail} * volume.f_frsize;
    if (n_free < n_bytes) throw ChannelError(path_, "size", expected, std::to_string(n_free));
  }
  // Without this a full volume would be a signal at the first touch of a page.
  int failure = 0;
  do {
    failure = ::posix_fallocate(descriptor_, 0, static_cast<::off_t>(n_bytes));
  } while (failure == EINTR);
  if (failure != 0) throw ChannelError(path_, "size", expected, system_error_text(failure));
}

void SharedSegment::map(std::size_t n_bytes, Access access) {
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = ::mmap(nullptr, n_bytes, protection, MAP_SHARED, descriptor_, 0);
  if (data == MAP_FAILED) {
    throw ChannelError(path_, "file", "a segment that can be mapped", system_error_text(errno));
  }
  data_ = static_cast<std::byte*>(data);
  n_bytes_ = n_bytes;
}

void SharedSegment::fill_header() {
  SegmentHeader& start = header();
  start.layout_version = kLayoutVersion;
  start.byte_order = kByteOrderMark;
  start.segment_bytes = n_bytes_;
  start.owner_pid = owner_.pid;
  start.owner_start = owner_.start;
  start.state = static_cast<std::uint32_t>(State::kMaking);
}

void SharedSegment::publish_header(std::uint64_t magic) {
  std::atomic_ref(header().state).store(static_cast<std::uint32_t>(State::kOpen));
  std::atomic_ref(header().magic).store(magic, std::memory_order_release);
}

State SharedSegment::state() const {
  std::uint32_t state = 0;
  read(offsetof(SegmentHeader, state), std::as_writable_bytes(std::span(&state, 1)));
  return static_cast<State>(state);
}

bool SharedSegment::is_live() const {
  return state() == State::kOpen && owner_.is_running();
}

std::size_t SharedSegment::size_on_disk() const {
  struct ::stat status{};
  return ::fstat(descriptor_, &status) == 0 ? static_cast<std::size_t>(status.st_size) : 0;
}

bool SharedSegment::is_unlinked() const {
  struct ::stat status{};
  return ::fstat(descriptor_, &status) == 0 && status.st_nlink == 0;
}

void SharedSegment::check_size() const {
  const std::size_t n_bytes = size_on_disk();
  if (n_bytes < n_bytes_) {
    throw ChannelError(path_, "size", std::to_string(n_bytes_) + " bytes, as when it was mapped",
                       std::to_string(n_bytes));
  }
}

void SharedSegment::check_writable() const {
  if (!is_owner_) throw ChannelError(path_, "state", "an open segment", "one that was closed");
  if (owner_.pid != static_cast<std::uint64_t>(::getpid())) {
    throw ChannelError(path_, "owner", "this process", owner_.text());
  }
  check_size();
}

void SharedSegment::read(std::size_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ::ssize_t n = ::pread(descriptor_, out.data(), out.size(), static_cast<::off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw ChannelError(path_, "file", "bytes that can be read", system_error_text(errno));
    if (n == 0) {
      throw ChannelError(path_, "size", "more than " + std::to_string(offset) + " bytes",
                         std::to_string(size_on_disk()));
    }
    offset += static_cast<std::size_t>(n);
    out = out.subspan(static_cast<std::size_t>(n));
  }
}

bool SharedSegment::try_lock(Role role) const {
  // Of the open file, not of the process: another descriptor of this process cannot give it away.
  struct ::flock lock = lock_of(role);
  return ::fcntl(descriptor_, F_OFD_SETLK, &lock) == 0;
}

void SharedSegment::wait_for_lock(Role role) const {
  struct ::flock lock = lock_of(role);
  while (::fcntl(descriptor_, F_OFD_SETLKW, &lock) != 0) {
    if (errno == EINTR) continue;
    throw ChannelError(path_, "owner", "a segment that can be locked", system_error_text(errno));
  }
}

void SharedSegment::become_consumer() const {
  if (!try_lock(Role::kConsumer)) throw ChannelError(path_, "consumer", "no other", "another");
}

void SharedSegment::close() noexcept {
  if (!is_owner_ || owner_.pid != static_cast<std::uint64_t>(::getpid())) return;
  is_owner_ = false;
  if (data_ != nullptr && size_on_disk() >= n_bytes_) {
    std::atomic_ref(header().state).store(static_cast<std::uint32_t>(State::kClosed));
  }
  if (!is_unlinked()) ::shm_unlink(path_.c_str());
}

}  // namespace modularbase::channel
