#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/kernels/attention.h"

namespace modularbase {

/// Moves rotated keys to other positions: RoPE's turns add up.
class KeyShift {
 public:
  /// frequencies: [rope_dim / 2], what a pair turns from one position to the next.
  KeyShift(std::vector<float> frequencies, kernels::RopeStyle style);

  /// key: [head_dim], in place; as if it had been `by` positions later.
  void apply(float* key, std::int32_t by);

  const std::vector<float>& frequencies() const { return frequencies_; }
  kernels::RopeStyle style() const { return style_; }

 private:
  const std::vector<float> frequencies_;
  const kernels::RopeStyle style_;
  std::int32_t by_ = 0;  // what the angles are for
  std::vector<float> cos_;
  std::vector<float> sin_;
};

}  // namespace modularbase
