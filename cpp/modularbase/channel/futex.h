#pragma once

#include <chrono>
#include <cstdint>

namespace modularbase::channel {

/// Sleeps until the low half of a counter differs from `seen`, somebody wakes those who wait, or
/// the time is over. The address may be gone: the kernel looks, not we.
void wait_for_change(const std::uint64_t* counter, std::uint64_t seen,
                     std::chrono::nanoseconds timeout);
void wake_waiting(const std::uint64_t* counter);

}  // namespace modularbase::channel
