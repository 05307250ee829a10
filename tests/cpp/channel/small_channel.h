#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "modularbase/channel/weight_channel.h"
#include "modularbase/core/errors.h"

namespace modularbase::testing {

using namespace modularbase::channel;

/// A name no other test has; whatever has it at the end of the scope is removed.
class ChannelName {
 public:
  ChannelName() {
    static std::atomic<int> n_made{0};
    name_ = "test-" + std::to_string(::getpid()) + "-" + std::to_string(n_made++);
  }
  ~ChannelName() { ::shm_unlink(path().c_str()); }
  ChannelName(const ChannelName&) = delete;
  ChannelName& operator=(const ChannelName&) = delete;

  operator std::string_view() const { return name_; }  // NOLINT: stands for the name everywhere
  std::string path() const { return segment_path(name_); }
  bool exists() const { return ::access(("/dev/shm" + path()).c_str(), F_OK) == 0; }
  int open(int flags = O_RDWR) const { return ::shm_open(path().c_str(), flags, 0600); }
  void shrink(std::size_t n_bytes) const {
    const int fd = open();
    if (::ftruncate(fd, static_cast<::off_t>(n_bytes)) != 0) std::abort();
    ::close(fd);
  }
  /// Writes over bytes of the segment, as a process of another make would.
  template <class Value>
  void poke(std::size_t offset, Value value) const {
    const int fd = open();
    const auto at = static_cast<::off_t>(offset);
    if (::pwrite(fd, &value, sizeof value, at) != sizeof value) std::abort();
    ::close(fd);
  }

 private:
  std::string name_;
};

inline std::vector<ChannelTensor> small_tensors() {
  return {{"site.0.in.weight", TensorType::kF16, {64, 3}},
          {"site.0.norm.weight", TensorType::kF32, {5}},
          {"site.0.expert_gate.weight", TensorType::kQ4_K, {256, 2, 2}}};
}

inline void fill(WeightWriter& writer, std::byte value) {
  for (const PlacedTensor& tensor : writer.tensors()) {
    const auto bytes = writer.buffer(tensor.name);
    std::fill(bytes.begin(), bytes.end(), value);
  }
}

/// The field of the ChannelError that `act` ends with; otherwise "no error".
template <class Act>
std::string fault_of(Act&& act) {
  try {
    act();
  } catch (const ChannelError& error) {
    return error.field;
  }
  return "no error";
}

/// Runs `act` in a child and returns how it ended, as waitpid tells.
template <class Act>
int in_child(Act&& act) {
  const ::pid_t child = ::fork();
  if (child == 0) {
    act();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

}  // namespace modularbase::testing
