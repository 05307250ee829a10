#include "modularbase/core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

std::string kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

std::size_t checked_size(int fd, const std::string& path) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) {
    throw BaseLoadError(path, "file", "a readable file", system_error_text(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw BaseLoadError(path, "file", "a regular file", kind_of(status.st_mode));
  }
  if (status.st_size <= 0)
    throw BaseLoadError(path, "file size", "at least 1 byte", "an empty file");
  return static_cast<std::size_t>(status.st_size);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  if (path.find('\0') != std::string::npos) {
    throw BaseLoadError(path, "path", "no NUL character", "one");
  }
  // Non-blocking, so that the path of a pipe is refused below instead of waiting for its writer.
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) throw BaseLoadError(path, "file", "a readable file", system_error_text(errno));
  const std::size_t n_bytes = checked_size(fd.get(), path);
  void* const data = ::mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) {
    throw BaseLoadError(path, "file", "a file that can be mapped", system_error_text(errno));
  }
  data_ = static_cast<const std::byte*>(data);
  size_ = n_bytes;
  descriptor_ = fd.release();
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (descriptor_ >= 0) ::close(descriptor_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void MappedFile::read(std::size_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ::ssize_t n = ::pread(descriptor_, out.data(), out.size(), static_cast<::off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw BaseLoadError(path_, "file", "bytes that can be read", system_error_text(errno));
    if (n == 0) {
      throw BaseLoadError(path_, "file size", std::to_string(size_), std::to_string(offset));
    }
    offset += static_cast<std::size_t>(n);
    out = out.subspan(static_cast<std::size_t>(n));
  }
}

FileStamp MappedFile::stamp() const {
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0) {
    throw BaseLoadError(path_, "file", "a readable file", system_error_text(errno));
  }
  return {status.st_size, status.st_mtim.tv_sec, status.st_mtim.tv_nsec};
}

void MappedFile::will_need(std::size_t offset, std::size_t n_bytes) const {
  if (offset >= size_) return;
  const std::size_t begin = offset / page_size() * page_size();
  const std::size_t end = offset + std::min(n_bytes, size_ - offset);
  if (begin < end) {
    ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_WILLNEED);
  }
}

void MappedFile::release_pages(std::size_t offset, std::size_t n_bytes) const {
  if (offset >= size_) return;
  // Whole pages only: what a neighbour shares with this range stays. The file's last page has no
  // neighbour.
  const std::size_t end = offset + std::min(n_bytes, size_ - offset);
  const std::size_t first = (offset + page_size() - 1) / page_size() * page_size();
  const std::size_t last = end == size_ ? end : end / page_size() * page_size();
  if (first < last) {
    ::madvise(const_cast<std::byte*>(data_) + first, last - first, MADV_DONTNEED);
  }
}

}  // namespace modularbase
