#include "modularbase/io/pack_file.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "modularbase/core/errors.h"
#include "tools/temp_file.h"
#include "tools/tiny_pack.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

const std::string kPrefix = "modularbase-pack.";

/// The field that a spoiled pack's error names.
std::string refused_field(const std::function<void(GgufWriter&)>& spoil) {
  GgufWriter writer = tiny_pack_file();
  spoil(writer);
  const TempFile file(writer.image());
  try {
    PackFile::open(file.path());
  } catch (const PackFormatError& e) {
    CHECK(e.file == file.path());
    CHECK(!e.expected.empty());
    return e.field;
  }
  return "accepted";
}

}  // namespace

TEST_CASE("a sound pack is read as it was written") {
  for (ggml_type expert : {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
    for (ggml_type adapter : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
      GgufWriter writer =
          tiny_pack_file({.adapter_type = adapter, .expert_type = expert, .has_token_gate = false});
      const TempFile file(writer.image());
      const PackFile pack = PackFile::open(file.path());
      const PackGeometry& geometry = pack.geometry();
      CHECK(geometry.n_embd == 64);
      CHECK(geometry.d_inner == 256);
      CHECK(geometry.d_ff == 256);
      CHECK(geometry.n_expert == 8);
      CHECK(geometry.n_expert_used == 2);
      CHECK(geometry.sites == std::vector<int>{1, 2});
      CHECK(geometry.adapter_type == adapter);
      CHECK(geometry.expert_type == expert);
      CHECK(pack.scale() == 0.5f);
      CHECK(pack.manifest_json() == "{}");
      REQUIRE(pack.sites().size() == 2);
      CHECK(pack.sites()[1].token_gate == nullptr);
      const auto bytes = pack.bytes(*pack.sites()[1].expert_down);
      const Bytes& written = writer.tensor("site.1.expert_down.weight").data;
      CHECK(std::equal(bytes.begin(), bytes.end(), written.begin(), written.end()));
    }
  }
}

TEST_CASE("packs of equal geometry are equal, whatever their weights") {
  const TempFile a(tiny_pack_file().image());
  const TempFile b(tiny_pack_file({.has_token_gate = false}).image());
  const TempFile c(tiny_pack_file({.sites = {1, 3}}).image());
  CHECK(PackFile::open(a.path()).geometry() == PackFile::open(b.path()).geometry());
  CHECK_FALSE(PackFile::open(a.path()).geometry() == PackFile::open(c.path()).geometry());
}

TEST_CASE("wrong metadata is refused by name") {
  for (const char* name : {"format_version", "n_embd", "d_inner", "d_ff", "n_expert",
                           "n_expert_used", "sites", "norm_eps", "scale", "manifest"}) {
    CHECK(refused_field([&](GgufWriter& w) { w.remove_entry(kPrefix + name); }) == kPrefix + name);
  }
  const auto with = [&](const char* name, auto value) {
    return refused_field([&](GgufWriter& w) {
      w.remove_entry(kPrefix + name);
      w.add(kPrefix + name, std::is_same_v<decltype(value), float> ? kF32 : kU32, value);
    });
  };
  CHECK(with("format_version", std::uint32_t{2}) == kPrefix + "format_version");
  CHECK(with("d_inner", std::uint32_t{255}) == kPrefix + "d_inner");
  CHECK(with("d_inner", std::uint32_t{300}) == kPrefix + "d_inner");
  CHECK(with("d_ff", std::uint32_t{1} << 31) == kPrefix + "d_ff");
  CHECK(with("n_expert_used", std::uint32_t{9}) == kPrefix + "n_expert_used");
  CHECK(with("n_expert", std::uint32_t{0}) == kPrefix + "n_expert");
  CHECK(with("scale", std::numeric_limits<float>::infinity()) == kPrefix + "scale");
  CHECK(with("norm_eps", 0.0f) == kPrefix + "norm_eps");
  for (const std::vector<std::uint32_t>& sites :
       {std::vector<std::uint32_t>{}, {2, 1}, {1, 1}, {1, 1u << 31}}) {
    CHECK(refused_field([&](GgufWriter& w) {
            w.remove_entry(kPrefix + "sites");
            w.add_array<std::uint32_t>(kPrefix + "sites", kU32, sites);
          }) == kPrefix + "sites");
  }
  CHECK(refused_field([](GgufWriter& w) {
          w.remove_entry("general.architecture");
          w.add_string("general.architecture", "llama");
        }) == "general.architecture");
}

TEST_CASE("wrong tensors are refused by name") {
  for (const char* name :
       {"in.weight", "norm.weight", "router.weight", "expert_gate.weight", "expert_up.weight",
        "expert_down.weight", "out.weight", "token_gate.bias"}) {
    const std::string full = std::string("site.1.") + name;
    CHECK(refused_field([&](GgufWriter& w) { w.remove_tensor(full); }) == full);
  }
  CHECK(refused_field([](GgufWriter& w) {
          std::swap(w.tensor("site.0.in.weight").ne[0], w.tensor("site.0.in.weight").ne[1]);
        }) == "site.0.in.weight shape");
  CHECK(refused_field([](GgufWriter& w) {
          auto& out = w.tensor("site.1.out.weight");
          out.type = GGML_TYPE_BF16;
        }) == "site.1.out.weight type");
  CHECK(refused_field([](GgufWriter& w) {
          w.add_f32_tensor("site.2.extra", {1}, std::vector<float>{1.0f});
        }) == "site.2.extra");
  CHECK(refused_field([](GgufWriter& w) {
          const float nan = std::numeric_limits<float>::quiet_NaN();
          std::memcpy(w.tensor("site.1.router.weight").data.data() + 400, &nan, sizeof(nan));
        }) == "site.1.router.weight");
  CHECK(refused_field([](GgufWriter& w) {
          const std::uint16_t infinity = 0x7c00;  // a block's scale
          std::memcpy(w.tensor("site.0.expert_up.weight").data.data() + 18, &infinity, 2);
        }) == "site.0.expert_up.weight");
}

TEST_CASE("a truncated pack is refused wherever it ends") {
  const Bytes image = tiny_pack_file({.sites = {3}}).image();
  for (std::size_t n = 0; n < image.size(); n += 1 + image.size() / 97) {
    const TempFile file(std::span<const std::byte>(image).first(n));
    CHECK_THROWS_AS(PackFile::open(file.path()), PackFormatError);
  }
}
