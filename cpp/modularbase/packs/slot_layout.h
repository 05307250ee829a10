#pragma once

#include <cstddef>
#include <vector>

#include "modularbase/io/pack_file.h"

namespace modularbase {

/// Where the tensors of packs of one geometry lie in a slot: one run of bytes, so that a load is
/// one copy and an eviction one call. Matrices of experts are expert_bytes apart, and slots a
/// multiple of it, so that expert e of slot s is matrix experts_per_slot * s + e of one tensor.
struct SlotLayout {
  explicit SlotLayout(const PackGeometry& geometry);

  /// Byte offsets of one site's tensors, named as in docs/pack-format.md.
  struct Site {
    std::size_t in, norm, router, token_gate, token_bias;
    std::size_t expert_gate, expert_up, expert_down, out;
  };
  std::vector<Site> sites;
  std::size_t expert_bytes = 0;
  std::size_t slot_bytes = 0;

  std::size_t experts_per_slot() const { return slot_bytes / expert_bytes; }
};

}  // namespace modularbase
