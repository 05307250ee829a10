#pragma once

#include <vector>

#include "modularbase/packs/pack.h"

namespace modularbase {

/// A pack without a file: it keeps a slot's bytes in memory, so that it can be loaded again after
/// it was evicted.
class MemoryPack : public Pack {
 public:
  /// \param image [layout().slot_bytes], which whoever made it has checked.
  MemoryPack(PackFacts facts, std::vector<std::byte> image);

  void copy_to(std::span<std::byte> slot, Pacer pacer = {}) const override;

 private:
  const std::vector<std::byte> image_;
};

}  // namespace modularbase
