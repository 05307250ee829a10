#include "modularbase/packs/slot_pool.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <list>

#include "cpp/packs/marked_pack.h"
#include "modularbase/packs/file_pack.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

PackGeometry geometry_of(const TinyPack& shape) {
  const TempFile file(tiny_pack_file(shape).image());
  return PackFile::open(file.path()).geometry();
}

const std::byte* slot_begin(const SlotPool& pool, int slot) {
  const auto* first = static_cast<const std::byte*>(pool.site(0).in->view_src->data);
  return first + static_cast<std::size_t>(slot) * pool.layout().slot_bytes;
}

bool is_zero(const SlotPool& pool, int slot) {
  const std::byte* begin = slot_begin(pool, slot);
  return std::all_of(begin, begin + pool.layout().slot_bytes,
                     [](std::byte b) { return b == std::byte{0}; });
}

/// Matrix `i` of a stack is what a tensor of the file holds.
void check_bytes(modularbase::Tensor view, std::int64_t i, std::span<const std::byte> expected,
                 int dim = 2) {
  REQUIRE(i < view->ne[dim]);
  const auto* found =
      static_cast<const std::byte*>(view->data) + static_cast<std::size_t>(i) * view->nb[dim];
  CHECK(std::equal(expected.begin(), expected.end(), found));
}

void check_site(const SlotPool& pool, int slot, std::size_t i, GgufWriter& writer) {
  const SiteWeights& site = pool.site(i);
  const auto bytes = [&](const std::string& name) -> const Bytes& {
    return writer.tensor("site." + std::to_string(i) + "." + name).data;
  };
  check_bytes(site.in, slot, bytes("in.weight"));
  check_bytes(site.norm, slot, bytes("norm.weight"), 1);
  check_bytes(site.router, slot, bytes("router.weight"));
  check_bytes(site.token_gate, slot, bytes("token_gate.weight"), 1);
  check_bytes(site.token_bias, slot, bytes("token_gate.bias"), 1);
  check_bytes(site.out, slot, bytes("out.weight"));
  const std::int64_t n_expert = pool.geometry().n_expert;
  const auto* ids = static_cast<const std::int32_t*>(site.expert_ids->data) + slot * n_expert;
  for (std::int64_t e = 0; e < n_expert; ++e) {
    const auto n = static_cast<std::size_t>(pool.layout().expert_bytes);
    const auto expert = [&](const std::string& name) {
      return std::span<const std::byte>(bytes(name)).subspan(static_cast<std::size_t>(e) * n, n);
    };
    check_bytes(site.expert_gate, ids[e], expert("expert_gate.weight"));
    check_bytes(site.expert_up, ids[e], expert("expert_up.weight"));
    check_bytes(site.expert_down, ids[e], expert("expert_down.weight"));
  }
}

}  // namespace

TEST_CASE("the stacked tensors show what the files hold, in every slot") {
  for (const ggml_type expert : {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
    TinyPack shape;
    shape.n_expert = 3;
    shape.expert_type = expert;
    const Backend backend("cpu", 1);
    SlotPool pool(geometry_of(shape), 4, backend);
    std::list<GgufWriter> writers;
    for (const int slot : {1, 2, 3}) {
      shape.seed = static_cast<std::uint32_t>(slot);
      writers.push_back(tiny_pack_file(shape));
      const TempFile file(writers.back().image());
      pool.write(slot, *FilePack::open(file.path(), "", "tiny", {64, 4}));
    }
    int slot = 1;
    for (GgufWriter& writer : writers) {
      for (const std::size_t i : {0, 1}) check_site(pool, slot, i, writer);
      ++slot;
    }
    CHECK(is_zero(pool, 0));
    CHECK(pool.site(1).n_expert_used == 2);
    CHECK(pool.site(1).norm_eps == 1e-5f);
  }
}

TEST_CASE("a write leaves the other slots alone, and released memory is zero again") {
  const Backend backend("cpu", 1);
  SlotPool pool(geometry_of(small_shape()), 4, backend);
  const TempFile file(marked_pack(7).image());
  const auto pack = FilePack::open(file.path(), "", "tiny", kSmallBase);
  pool.write(2, *pack);
  CHECK(marker_of(pool, 2) == 7.0f);
  for (const int slot : {0, 1, 3}) CHECK(is_zero(pool, slot));
  pool.write(1, *pack);
  pool.write(3, *pack);
  pool.release_memory(2);
  CHECK(marker_of(pool, 1) == 7.0f);
  CHECK(marker_of(pool, 3) == 7.0f);
  CHECK(is_zero(pool, 0));
  // All but what shares a page with a neighbour.
  const std::byte* begin = slot_begin(pool, 2);
  CHECK(std::all_of(begin + 4096, begin + pool.layout().slot_bytes - 4096,
                    [](std::byte b) { return b == std::byte{0}; }));
  pool.write(2, *pack);
  CHECK(marker_of(pool, 2) == 7.0f);
}

TEST_CASE("sites are found by their layer") {
  const Backend backend("cpu", 1);
  TinyPack shape = small_shape();
  shape.sites = {0, 2, 3};
  const SlotPool pool(geometry_of(shape), 1, backend);
  CHECK(pool.site_of_layer(0) == 0);
  CHECK(pool.site_of_layer(1) == -1);
  CHECK(pool.site_of_layer(2) == 1);
  CHECK(pool.site_of_layer(3) == 2);
  CHECK(pool.site_of_layer(4) == -1);
}
