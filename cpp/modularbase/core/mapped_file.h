#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace modularbase {

/// A whole file mapped read-only and shared. Move-only; unmapped on destruction.
class MappedFile {
 public:
  /// \throws BaseLoadError when the file is missing, unreadable, empty or not a regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

  /// Tells the kernel that these bytes will be read soon (sequentially).
  void will_need(std::size_t offset, std::size_t n_bytes) const;
  /// Tells the kernel that these bytes are not needed any more: keeps RSS down after a conversion.
  void release_pages(std::size_t offset, std::size_t n_bytes) const;

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace modularbase
