#pragma once

#include <ggml.h>

#include <cstring>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

/// Weights of any type that ggml can turn into floats, 256 at a time (which n_in must be a multiple
/// of): for types and CPUs that linear_quantised.h has nothing for.
template <ggml_type kType>
struct DequantisedWeights {
  using Elem = std::uint8_t;
  using XElem = float;
  static constexpr int kStep = 256;  // the largest block
  struct Lane {
    alignas(64) float values[kStep];
  };
  using XLane = const float*;
  static constexpr int kXStepElems = kStep;
  static constexpr int kBlockElems = kType == GGML_TYPE_Q4_K ? 256 : 32;
  static constexpr int kBlockBytes = kType == GGML_TYPE_Q4_K   ? 144
                                     : kType == GGML_TYPE_Q8_0 ? 34
                                                               : 18;  // Q4_0
  static constexpr int kStepElems = kStep / kBlockElems * kBlockBytes;

  static std::int64_t row_elems(std::int64_t n_in) { return n_in / kStep * kStepElems; }
  static Lane load(const Elem* p) {
    static const ggml_to_float_t to_float = ggml_get_type_traits(kType)->to_float;
    Lane lane;
    to_float(p, lane.values, kStep);
    return lane;
  }
  static Lane load_first(const Elem* p, int /*n*/) { return load(p); }
  static XLane load_x(const XElem* p) { return p; }
  static void pack_x(const float* src, int n, XElem* dst) {
    std::memcpy(dst, src, static_cast<std::size_t>(n) * sizeof(float));
  }
  static void pack_x(const float* src, XElem* dst) { pack_x(src, kStep, dst); }
  static simd::Vec multiply_add(const Lane& w, XLane x, simd::Vec sum) {
    for (int i = 0; i < kStep; i += simd::kLanes) {
      sum = simd::fma(simd::load(w.values + i), simd::load(x + i), sum);
    }
    return sum;
  }
};

}  // namespace modularbase::kernels
