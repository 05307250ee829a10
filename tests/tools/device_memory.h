#pragma once

#include <ggml-backend-impl.h>
#include <ggml-backend.h>

namespace modularbase::testing {

/// While it lives, new memory of the CPU's backend counts as a device's: graphs use it, and the
/// host reads and writes copies.
class DeviceMemory {
 public:
  DeviceMemory() {
    set([](ggml_backend_buffer_type_t) { return false; });
  }
  ~DeviceMemory() { set(before_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

 private:
  using IsHost = bool (*)(ggml_backend_buffer_type_t);
  static void set(IsHost is_host) { ggml_backend_cpu_buffer_type()->iface.is_host = is_host; }
  IsHost before_ = ggml_backend_cpu_buffer_type()->iface.is_host;
};

}  // namespace modularbase::testing
