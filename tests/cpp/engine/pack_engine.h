#pragma once

#include <list>
#include <map>
#include <string>
#include <vector>

#include "cpp/engine/tiny_engine.h"
#include "tools/tiny_pack.h"

namespace modularbase::testing {

/// A random pack for the default tiny base, whose effect is as large as the base's own layers.
struct StrongPack {
  std::vector<std::uint32_t> sites = {0, 1};
  ggml_type expert_type = GGML_TYPE_Q4_0;
  auto operator<=>(const StrongPack&) const = default;
};

inline GgufWriter strong_pack(std::uint32_t seed, const StrongPack& pack = {}) {
  TinyPack shape;
  shape.n_expert = 4;
  shape.sites = pack.sites;
  shape.expert_type = pack.expert_type;
  shape.seed = seed;
  GgufWriter writer = tiny_pack_file(shape);
  writer.remove_entry("modularbase-pack.scale");
  writer.add_f32("modularbase-pack.scale", 6.0f);
  return writer;
}

/// Its file: made once, since random weights take their time.
inline const Bytes& strong_pack_image(std::uint32_t seed, const StrongPack& pack = {}) {
  static std::map<std::pair<std::uint32_t, StrongPack>, Bytes> known;
  Bytes& image = known[{seed, pack}];
  if (image.empty()) image = strong_pack(seed, pack).image();
  return image;
}

inline std::int64_t strong_slot_bytes() {
  const TempFile file(strong_pack_image(1));
  return static_cast<std::int64_t>(SlotLayout(PackFile::open(file.path()).geometry()).slot_bytes);
}

inline EngineOptions with_slots(std::int64_t n, EngineOptions options = tiny_options()) {
  options.pack_budget_bytes = n * strong_slot_bytes();
  return options;
}

/// An engine on a tiny base, and packs for it: the first that is opened is generation 1.
struct PackEngine : TinyEngine {
  using TinyEngine::TinyEngine;
  GenerationId open(std::uint32_t seed, const StrongPack& pack = {}) {
    files.emplace_back(strong_pack_image(seed, pack));
    return engine.packs().open(files.back().path(), "", "pack " + std::to_string(seed));
  }
  /// Keeps a pack in its slot as a running request does.
  std::vector<PackLease> lease(GenerationId id) {
    std::vector<PackLease> leases;
    PackWait wait;
    REQUIRE(engine.packs().load(id, Clock::now() + kPatience));
    REQUIRE(engine.packs().acquire(std::vector{id}, leases, wait) ==
            PackResidency::Acquired::kReady);
    return leases;
  }
  bool has_leases() {
    const ResidencyStatus status = engine.packs().status();
    return std::ranges::any_of(status.packs, [](const auto& pack) { return pack.n_leases > 0; });
  }
  std::list<TempFile> files;
};

inline RequestSpec with_packs(RequestSpec spec, std::vector<PackUse> packs) {
  spec.pack_choices.push_back({std::move(packs)});
  return spec;
}

/// Enough tokens before the first near tie, or comparing them says little.
inline void check_sure(const std::vector<Alone>& alone) {
  std::size_t n_sure = 0, n = 0;
  for (const Alone& one : alone) {
    n_sure += one.n_sure;
    n += one.ids.size();
  }
  CHECK(n_sure * 5 > n * 4);
}

}  // namespace modularbase::testing
