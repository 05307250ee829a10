#include "cpp/sampling/allocation_count.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<int> n_allocations = 0;
}

int allocation_count() {
  return n_allocations;
}

// A file of its own: inlined into callers, malloc under new looks like a mistake to the compiler.
void* operator new(std::size_t n_bytes) {
  ++n_allocations;
  if (void* memory = std::malloc(n_bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t n_bytes, const std::nothrow_t&) noexcept {
  ++n_allocations;
  return std::malloc(n_bytes);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
