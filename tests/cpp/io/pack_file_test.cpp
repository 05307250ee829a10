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

TEST_CASE("a profile and a probe are read where the pack has them") {
  GgufWriter writer = tiny_pack_file();
  {
    const TempFile file(writer.image());
    const PackFile pack = PackFile::open(file.path());
    CHECK(pack.profile() == nullptr);
    CHECK(pack.probe_tokens().empty());
    CHECK(pack.probe_effect().empty());
  }
  writer.add_f32_tensor("profile.centroids", {64, 3}, std::vector<float>(192, 0.5f));
  writer.add_array<std::uint32_t>(kPrefix + "probe.tokens", kU32, {0, 49151});
  writer.add_array<float>(kPrefix + "probe.effect", kF32, {0.0f, 0.25f});
  const TempFile file(writer.image());
  const PackFile pack = PackFile::open(file.path());
  REQUIRE(pack.profile() != nullptr);
  CHECK(pack.profile()->ne[1] == 3);
  CHECK(pack.probe_tokens() == std::vector<std::int32_t>{0, 49151});
  CHECK(pack.probe_effect() == std::vector<float>{0.0f, 0.25f});
}

TEST_CASE("a wrong profile is refused by name") {
  const auto with = [](std::vector<std::uint64_t> ne, float value) {
    return refused_field([&](GgufWriter& w) {
      std::uint64_t n = 1;
      for (const std::uint64_t width : ne) n *= width;
      w.add_f32_tensor("profile.centroids", ne, std::vector<float>(n, value));
    });
  };
  CHECK(with({64, 64}, 0.0f) == "accepted");
  CHECK(with({64, 65}, 0.0f) == "profile.centroids shape");
  CHECK(with({32, 2}, 0.0f) == "profile.centroids shape");
  CHECK(with({64, 2, 2}, 0.0f) == "profile.centroids shape");
  CHECK(with({64, 2}, std::numeric_limits<float>::infinity()) == "profile.centroids");
}

TEST_CASE("a wrong probe is refused by name") {
  using Tokens = std::vector<std::int32_t>;
  using Effect = std::vector<float>;
  const auto with = [](const Tokens& tokens, const Effect& effect) {
    return refused_field([&](GgufWriter& w) {
      w.add_array<std::int32_t>(kPrefix + "probe.tokens", kI32, tokens);
      w.add_array<float>(kPrefix + "probe.effect", kF32, effect);
    });
  };
  const std::string tokens = kPrefix + "probe.tokens", effect = kPrefix + "probe.effect";
  CHECK(with(Tokens(64, 1), Effect(64, 0.5f)) == "accepted");
  CHECK(with(Tokens(65, 1), Effect(65, 0.5f)) == tokens);
  CHECK(with({}, {}) == tokens);
  CHECK(with({-1}, {0.5f}) == tokens);
  CHECK(with({1, 2}, {0.5f}) == effect);
  CHECK(with({1}, {-0.5f}) == effect);
  CHECK(with({1}, {std::numeric_limits<float>::quiet_NaN()}) == effect);
  CHECK(refused_field([&](GgufWriter& w) { w.add_array<std::int32_t>(tokens, kI32, {1}); }) ==
        effect);
  CHECK(refused_field([&](GgufWriter& w) { w.add_array<float>(effect, kF32, {0.5f}); }) == tokens);
  CHECK(refused_field([&](GgufWriter& w) { w.add_array<float>(tokens, kF32, {1.0f}); }) == tokens);
}

TEST_CASE("a truncated pack is refused wherever it ends") {
  const Bytes image = tiny_pack_file({.sites = {3}}).image();
  for (std::size_t n = 0; n < image.size(); n += 1 + image.size() / 97) {
    const TempFile file(std::span<const std::byte>(image).first(n));
    CHECK_THROWS_AS(PackFile::open(file.path()), PackFormatError);
  }
}
