#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cpp/channel/small_channel.h"
#include "modularbase/engine/pack_reader.h"
#include "tools/temp_file.h"
#include "tools/tiny_pack.h"

namespace modularbase::testing {

inline std::vector<ChannelTensor> channel_tensors(const GgufWriter& pack) {
  std::vector<ChannelTensor> tensors;
  for (const Tensor& tensor : pack.tensors) {
    tensors.push_back({tensor.name, static_cast<TensorType>(tensor.type),
                       std::vector<std::int64_t>(tensor.ne.begin(), tensor.ne.end())});
  }
  return tensors;
}

/// Publishes what lies in a pack file; returns the generation.
inline std::uint64_t publish(WeightWriter& writer, const GgufWriter& pack) {
  for (const Tensor& tensor : pack.tensors) {
    const auto place = writer.buffer(tensor.name);
    REQUIRE(place.size() == tensor.data.size());
    std::memcpy(place.data(), tensor.data.data(), place.size());
  }
  return writer.publish();
}

/// What a channel would say of a pack file, of which the pack's types are taken.
inline ChannelPack channel_pack(const GgufWriter& file) {
  const TempFile temp(file.image());
  const PackFile pack = PackFile::open(temp.path());
  return {"published", pack.geometry(), pack.scale()};
}

/// The bytes of a leased slot.
inline Bytes slot_of(const PackLease& lease) {
  const SlotPool& pool = lease.pool();
  const std::size_t n_bytes = pool.layout().slot_bytes;
  const auto* first = static_cast<const std::byte*>(pool.site(0).in->data) -
                      pool.layout().sites[0].in + n_bytes * static_cast<std::size_t>(lease.slot());
  return {first, first + n_bytes};
}

/// Packs of a base of width 64.
struct SmallResidency {
  Backend backend{"cpu", 1};
  PackResidency packs{64 << 20, {.n_embd = 64, .n_layer = 4}, backend, [] {}};

  Bytes slot(GenerationId id) {
    REQUIRE(packs.load(id, PackClock::now() + std::chrono::minutes(2)));
    return slot_of(packs.try_lease(id).value());
  }
  /// What the file of a pack looks like in a slot.
  Bytes slot(const GgufWriter& file) {
    const TempFile temp(file.image());
    return slot(packs.open(temp.path(), "", "from a file"));
  }
};

}  // namespace modularbase::testing
