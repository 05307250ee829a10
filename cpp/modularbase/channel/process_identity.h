#pragma once

#include <cstdint>
#include <string>

namespace modularbase::channel {

/// A process, told apart from a later one that got the same number.
struct ProcessIdentity {
  std::uint64_t pid = 0;
  std::uint64_t start = 0;  // clock ticks since the system started

  static ProcessIdentity self();
  /// False when it has ended, also while its parent has not taken notice yet.
  bool is_running() const;
  /// For people: "process 123".
  std::string text() const { return "process " + std::to_string(pid); }
};

}  // namespace modularbase::channel
