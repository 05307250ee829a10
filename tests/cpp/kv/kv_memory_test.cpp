#include "modularbase/kv/kv_memory.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

using namespace modularbase;
using kernels::kBlockTokens;

namespace {

constexpr KvGeometry kGeometry{.n_layer = 2, .n_head_kv = 3, .head_dim = 16, .type = GGML_TYPE_F16};
constexpr std::int64_t kBlocks = 4;

}  // namespace

TEST_CASE("a block's bytes are those of its keys and values in every layer") {
  CHECK(kGeometry.block_bytes() == std::size_t{2 * 2 * 3 * 16 * 2} * kBlockTokens);
  Backend backend("cpu", 1);
  const KvMemory memory(kGeometry, kBlocks, backend);
  CHECK(ggml_nbytes(memory.k(0)) == kBlocks * kGeometry.block_bytes());  // from the first row on
}

TEST_CASE("a (block, head) tile lies where the kernels look for it") {
  Backend backend("cpu", 1);
  const KvMemory memory(kGeometry, kBlocks, backend);
  const auto* pool = static_cast<const std::uint16_t*>(memory.k(0)->data);
  constexpr std::int64_t kTiles = 3 * kBlockTokens * 16;  // elements of the keys of a layer
  for (int layer = 0; layer < 2; ++layer) {
    const kernels::KvLayer view = memory.layer(layer);
    const kernels::KvTierLayer& exact = view.tiers[kernels::kExactTier];
    CHECK(reinterpret_cast<std::uint16_t*>(exact.k) == pool + 2 * layer * kTiles);
    CHECK(reinterpret_cast<std::uint16_t*>(exact.v) == pool + (2 * layer + 1) * kTiles);
    CHECK(static_cast<void*>(exact.k) == memory.k(layer)->data);
    CHECK(static_cast<void*>(exact.v) == memory.v(layer)->data);
    CHECK(exact.k_format == kernels::TileFormat::kF16);
    CHECK(exact.v_format == kernels::TileFormat::kF16);
    CHECK(exact.block_stride == kGeometry.block_bytes());
    CHECK(view.tiers[kernels::kImportantTier].k == nullptr);
    CHECK(view.n_head_kv == 3);
    CHECK(view.head_dim == 16);
  }
}

TEST_CASE("a copy takes the first tokens of every head and layer, and touches nothing else") {
  Backend backend("cpu", 1);
  KvMemory memory(kGeometry, kBlocks, backend);
  auto* pool = static_cast<std::uint16_t*>(memory.k(0)->data);
  std::vector<std::uint16_t> expected(kBlocks * kGeometry.block_bytes() / sizeof(*pool));
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<std::uint16_t>(i * 7);
  std::memcpy(pool, expected.data(), expected.size() * sizeof(*pool));
  constexpr std::size_t kCopied = 37 * 16, kTile = kBlockTokens * 16;
  const std::size_t block = expected.size() / kBlocks;
  for (std::size_t tile = 0; tile < block; tile += kTile) {
    std::copy_n(expected.begin() + static_cast<std::ptrdiff_t>(3 * block + tile), kCopied,
                expected.begin() + static_cast<std::ptrdiff_t>(block + tile));
  }
  memory.copy_tokens(3, 1, 37);
  CHECK(std::equal(expected.begin(), expected.end(), pool));
}

TEST_CASE("a group keeps the model's layer numbers, and its mid rows are copied with the rest") {
  KvGeometry geometry = kGeometry;
  geometry.first_layer = 5;
  geometry.mid_width = 8;
  CHECK(geometry.block_bytes() == kGeometry.block_bytes() + std::size_t{8 * 4} * kBlockTokens);
  CHECK_FALSE(geometry.holds(4));
  CHECK(geometry.holds(5));
  CHECK(geometry.holds(6));
  CHECK_FALSE(geometry.holds(7));
  Backend backend("cpu", 1);
  KvMemory memory(geometry, kBlocks, backend);
  CHECK(static_cast<void*>(memory.layer(6).tiers[kernels::kExactTier].k) == memory.k(6)->data);
  CHECK(static_cast<std::uint16_t*>(memory.k(6)->data) >
        static_cast<std::uint16_t*>(memory.v(5)->data));
  CHECK_THROWS(memory.k(7));
  CHECK(memory.mid()->ne[0] == 8);
  CHECK(memory.mid()->ne[1] == kBlocks * kBlockTokens);
  auto* mid = static_cast<float*>(memory.mid()->data);
  std::vector<float> expected(static_cast<std::size_t>(ggml_nelements(memory.mid())));
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<float>(i);
  std::copy(expected.begin(), expected.end(), mid);
  constexpr std::ptrdiff_t kBlockFloats = kBlockTokens * 8;
  std::copy_n(expected.begin() + 3 * kBlockFloats, 37 * 8, expected.begin() + kBlockFloats);
  memory.copy_tokens(3, 1, 37);
  CHECK(std::equal(expected.begin(), expected.end(), mid));
  CHECK(KvMemory(kGeometry, kBlocks, backend).mid() == nullptr);
}
