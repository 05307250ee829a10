#include "modularbase/channel/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace modularbase::channel {

// Little-endian, so the low half lies at the counter's own address. Not FUTEX_PRIVATE: the two
// sides are in different processes.

void wait_for_change(const std::uint64_t* counter, std::uint64_t seen,
                     std::chrono::nanoseconds timeout) {
  constexpr std::int64_t kSecond = 1'000'000'000;
  const ::timespec time{timeout.count() / kSecond, timeout.count() % kSecond};
  ::syscall(SYS_futex, counter, FUTEX_WAIT, static_cast<std::uint32_t>(seen), &time, nullptr, 0);
}

void wake_waiting(const std::uint64_t* counter) {
  ::syscall(SYS_futex, counter, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace modularbase::channel
