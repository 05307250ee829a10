#include "modularbase/kernels/simd.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

namespace modularbase::kernels {
namespace {

TEST_CASE("simd: silu within 1e-6 of the exact value, and sane far out") {
  double worst = 0.0;
  for (float v = -80.0f; v <= 80.0f; v += 0.0137f) {
    float out[simd::kLanes];
    simd::store(out, simd::silu(simd::set1(v)));
    const double exact = static_cast<double>(v) / (1.0 + std::exp(-static_cast<double>(v)));
    if (v != 0.0f) worst = std::max(worst, std::abs(static_cast<double>(out[0]) / exact - 1.0));
  }
  CHECK(worst < 1e-6);
  for (float v : {-1e30f, -500.0f, -0.0f, 0.0f}) {
    float out[simd::kLanes];
    simd::store(out, simd::silu(simd::set1(v)));
    CHECK(std::abs(out[0]) < 1e-7f * std::max(1.0f, std::abs(v)));
  }
  float out[simd::kLanes];
  simd::store(out, simd::silu(simd::set1(1000.0f)));
  CHECK(out[0] == 1000.0f);
  simd::store(out, simd::silu(simd::set1(std::nanf(""))));
  CHECK(std::isnan(out[0]));
}

}  // namespace
}  // namespace modularbase::kernels
