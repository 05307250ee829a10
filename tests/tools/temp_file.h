#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <span>
#include <stdexcept>
#include <string>

namespace modularbase::testing {

/// A file with the given content that is gone at the end of the scope.
class TempFile {
 public:
  explicit TempFile(std::span<const std::byte> content) {
    const char* folder = ::getenv("TMPDIR");
    path_ = std::string(folder != nullptr ? folder : "/tmp") + "/modularbase-test-XXXXXX";
    const int fd = ::mkstemp(path_.data());
    if (fd < 0) throw std::runtime_error("cannot create " + path_);
    std::FILE* file = ::fdopen(fd, "wb");
    const bool written =  // fwrite wants a pointer even for no bytes
        content.empty() || std::fwrite(content.data(), 1, content.size(), file) == content.size();
    if (std::fclose(file) != 0 || !written) throw std::runtime_error("cannot write " + path_);
  }
  ~TempFile() { ::unlink(path_.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace modularbase::testing
