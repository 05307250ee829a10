#include "modularbase/kv/key_shift.h"

#include <cmath>
#include <utility>

#include "modularbase/kernels/rope.h"

namespace modularbase {

KeyShift::KeyShift(std::vector<float> frequencies, kernels::RopeStyle style)
    : frequencies_(std::move(frequencies)),
      style_(style),
      cos_(frequencies_.size(), 1.0f),
      sin_(frequencies_.size(), 0.0f) {}

void KeyShift::apply(float* key, std::int32_t by) {
  if (by == 0) return;
  if (by != by_) {
    by_ = by;
    for (std::size_t i = 0; i < frequencies_.size(); ++i) {
      const double angle = static_cast<double>(by) * static_cast<double>(frequencies_[i]);
      cos_[i] = static_cast<float>(std::cos(angle));
      sin_[i] = static_cast<float>(std::sin(angle));
    }
  }
  kernels::rope_rotate(key, cos_.data(), sin_.data(), 2 * std::ssize(frequencies_), style_);
}

}  // namespace modularbase
