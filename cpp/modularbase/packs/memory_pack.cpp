#include "modularbase/packs/memory_pack.h"

#include <algorithm>

namespace modularbase {

MemoryPack::MemoryPack(PackFacts facts, std::vector<std::byte> image)
    : Pack(std::move(facts)), image_(std::move(image)) {}

void MemoryPack::copy_to(std::span<std::byte> slot, Pacer pacer) const {
  for (std::size_t at = 0; at < image_.size(); at += Pacer::kSliceBytes) {
    const auto slice =
        std::span(image_).subspan(at).first(std::min(Pacer::kSliceBytes, image_.size() - at));
    std::copy(slice.begin(), slice.end(), slot.begin() + static_cast<std::ptrdiff_t>(at));
    pacer.rest();
  }
}

}  // namespace modularbase
