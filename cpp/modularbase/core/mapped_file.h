#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace modularbase {

/// What changes when somebody writes to a file.
struct FileStamp {
  std::int64_t n_bytes = 0;
  std::int64_t modified_s = 0;
  std::int64_t modified_ns = 0;
  bool operator==(const FileStamp&) const = default;
};

/// A whole file mapped read-only and shared. Move-only; unmapped and closed on destruction.
class MappedFile {
 public:
  /// \throws BaseLoadError when the file is missing, unreadable, empty or not a regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

  /// Reads bytes through the descriptor: where the file got shorter meanwhile, touching the mapping
  /// would end the process. \throws BaseLoadError.
  void read(std::size_t offset, std::span<std::byte> out) const;
  /// \throws BaseLoadError when the file system does not answer.
  FileStamp stamp() const;

  /// Tells the kernel that these bytes will be read soon (sequentially).
  void will_need(std::size_t offset, std::size_t n_bytes) const;
  /// Tells the kernel that these bytes are not needed any more: keeps RSS down after a conversion.
  void release_pages(std::size_t offset, std::size_t n_bytes) const;

 private:
  std::string path_;
  int descriptor_ = -1;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace modularbase
