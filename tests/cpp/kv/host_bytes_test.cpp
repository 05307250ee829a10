#include "modularbase/kv/host_bytes.h"

#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "tools/device_memory.h"

using namespace modularbase;
using testing::DeviceMemory;

namespace {

constexpr std::size_t kBytes = 3 << 16;

struct Pool {
  Pool() : backend("cpu", 1), ctx(make_tensor_context(1)) {
    tensor = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, kBytes);
    buffer = backend.allocate(ctx.get(), "a pool");
    std::memset(tensor->data, 1, kBytes);
  }
  const std::byte* memory() const { return static_cast<const std::byte*>(tensor->data); }

  Backend backend;
  ContextPtr ctx;
  Tensor tensor;
  BufferPtr buffer;
};

}  // namespace

TEST_CASE("the host's memory is used as it is") {
  Pool pool;
  const HostBytes bytes(pool.tensor);
  CHECK(bytes.data() == pool.memory());
  bytes.download(0, kBytes);
  bytes.upload(0, kBytes);
  bytes.forget_copies();  // there are none: nothing is lost
  CHECK(bytes.data()[kBytes - 1] == std::byte{1});
}

TEST_CASE("a device's memory is copied run by run, at the same offsets") {
  const DeviceMemory device;
  Pool pool;
  const HostBytes bytes(pool.tensor);
  REQUIRE(bytes.data() != pool.memory());
  bytes.download(70000, 100);
  CHECK(bytes.data()[69999] == std::byte{0});
  CHECK(bytes.data()[70000] == std::byte{1});
  CHECK(bytes.data()[70099] == std::byte{1});
  CHECK(bytes.data()[70100] == std::byte{0});

  bytes.data()[5] = std::byte{7};
  bytes.data()[6] = std::byte{7};
  bytes.upload(5, 1);
  CHECK(pool.memory()[4] == std::byte{1});
  CHECK(pool.memory()[5] == std::byte{7});
  CHECK(pool.memory()[6] == std::byte{1});

  bytes.forget_copies();
  CHECK(bytes.data()[5] == std::byte{0});
  CHECK(pool.memory()[5] == std::byte{7});
  bytes.discard(0, kBytes);  // a block that nobody holds: the device keeps its memory
  CHECK(pool.memory()[5] == std::byte{7});
}
