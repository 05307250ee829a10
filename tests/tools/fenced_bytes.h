#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

namespace modularbase::testing {

/// Memory that ends where an inaccessible page begins: one element read too many is a crash.
class FencedBytes {
 public:
  explicit FencedBytes(std::size_t n_bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    n_mapped_ = (n_bytes + page - 1) / page * page + page;
    void* base =
        mmap(nullptr, n_mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(base != MAP_FAILED);
    base_ = static_cast<char*>(base);
    REQUIRE(mprotect(base_ + n_mapped_ - page, page, PROT_NONE) == 0);
    data_ = base_ + n_mapped_ - page - n_bytes;
  }
  ~FencedBytes() { munmap(base_, n_mapped_); }
  FencedBytes(const FencedBytes&) = delete;
  FencedBytes& operator=(const FencedBytes&) = delete;
  void* data() const { return data_; }

 private:
  char* base_;
  char* data_;
  std::size_t n_mapped_;
};

}  // namespace modularbase::testing
