#pragma once

#include <cstddef>
#include <memory>

#include "modularbase/graph/graph_builder.h"

namespace modularbase {

/// The memory of a pool of blocks as this process reads and writes it: on the host, the memory
/// itself. What a device has is copied a run at a time, to and from the same offsets in a range of
/// addresses that takes memory only where it is used.
class HostBytes {
 public:
  /// The pool has its memory, and outlives this.
  explicit HostBytes(Tensor pool);

  std::byte* data() const { return data_; }
  /// Runs of the pool, so that both see the same; nothing to do on the host.
  void download(std::size_t offset, std::size_t n_bytes) const;
  void upload(std::size_t offset, std::size_t n_bytes) const;
  /// Gives back the memory of whole pages in a run that nobody needs; it comes again when written.
  void discard(std::size_t offset, std::size_t n_bytes) const;
  /// Gives back the memory of all copies.
  void forget_copies() const;

 private:
  struct Unmap {
    std::size_t n_bytes;
    void operator()(std::byte* range) const;
  };

  Tensor pool_;
  std::unique_ptr<std::byte, Unmap> copies_;  // null on the host
  std::byte* data_;
};

}  // namespace modularbase
