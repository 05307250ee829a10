#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace modularbase::channel {

/// XXH64 with seed 0: finds accidents at the speed of memory, which is all that two processes of
/// one user need.
std::uint64_t xxh64(std::span<const std::byte> bytes);

}  // namespace modularbase::channel
