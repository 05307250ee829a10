#include "modularbase/kv/host_bytes.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

std::byte* reserve_addresses(std::size_t n_bytes) {
  void* range = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) throw DeviceError("kv: no addresses for copies of a device's memory");
  return static_cast<std::byte*>(range);
}

void discard_pages(std::byte* bytes, std::size_t n_bytes) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(bytes) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(bytes) + n_bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

void HostBytes::Unmap::operator()(std::byte* range) const {
  munmap(range, n_bytes);
}

HostBytes::HostBytes(Tensor pool) : pool_(pool), data_(static_cast<std::byte*>(pool->data)) {
  if (ggml_backend_buffer_is_host(pool->buffer)) return;
  const std::size_t n_bytes = ggml_nbytes(pool);
  copies_ = {reserve_addresses(n_bytes), Unmap{n_bytes}};
  data_ = copies_.get();
}

void HostBytes::download(std::size_t offset, std::size_t n_bytes) const {
  if (copies_ && n_bytes > 0) ggml_backend_tensor_get(pool_, data_ + offset, offset, n_bytes);
}

void HostBytes::upload(std::size_t offset, std::size_t n_bytes) const {
  if (copies_ && n_bytes > 0) ggml_backend_tensor_set(pool_, data_ + offset, offset, n_bytes);
}

void HostBytes::discard(std::size_t offset, std::size_t n_bytes) const {
  discard_pages(data_ + offset, n_bytes);
}

void HostBytes::forget_copies() const {
  if (copies_) discard_pages(data_, copies_.get_deleter().n_bytes);
}

}  // namespace modularbase
