#include "modularbase/kernels/kv_tile_q4.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "modularbase/kernels/hadamard.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

constexpr int kGroupVecs = kQ4Group / simd::kLanes;

simd::Vec rounded(simd::Vec x, float inverse_scale) {
  return simd::round(
      simd::min(simd::max(x * simd::set1(inverse_scale), simd::set1(-8.0f)), simd::set1(7.0f)));
}

/// x . q and q . q of a group whose numbers are rounded with a scale.
struct Fit {
  simd::Vec xq = simd::zero();
  simd::Vec qq = simd::zero();

  Fit(const simd::Vec* x, float inverse_scale) {
    for (int i = 0; i < kGroupVecs; ++i) {
      const simd::Vec q = rounded(x[i], inverse_scale);
      xq = simd::fma(x[i], q, xq);
      qq = simd::fma(q, q, qq);
    }
  }
};

float largest_of(const float* x) {
  float largest = 0.0f;
  for (int i = 0; i < kQ4Group; ++i) {
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  }
  return largest;
}

/// The scale with the least squared error among some that put the largest number near -8: for the
/// numbers as rounded with a candidate, the best scale follows by least squares.
float best_scale(const simd::Vec* x, float largest) {
  float best = largest / -8.0f;
  float most_explained = 0.0f;  // of the sum of squares
  for (int i = 0; i < 4; ++i) {
    const float end = 7.0f + 0.6f * static_cast<float>(i);
    const Fit a(x, -end / largest);
    const Fit b(x, -(end + 0.3f) / largest);
    float sums[4];
    simd::sum_lanes4(a.xq, a.qq, b.xq, b.qq, sums);
    for (const float* sum : {sums, sums + 2}) {
      const float explained = sum[0] * sum[0] / sum[1];
      if (explained <= most_explained) continue;
      most_explained = explained;
      best = sum[0] / sum[1];
    }
  }
  return best;
}

/// Rounds 32 numbers to half-bytes times the scale that is returned, an F16.
std::uint16_t round_to_q4(const float* x, std::uint8_t* half_bytes) {
  simd::Vec numbers[kGroupVecs];
  for (int i = 0; i < kGroupVecs; ++i) numbers[i] = simd::load(x + i * simd::kLanes);
  const float largest = largest_of(x);
  const std::uint16_t scale =
      ggml_fp32_to_fp16(largest == 0.0f ? 0.0f : best_scale(numbers, largest));
  const float as_f16 = ggml_fp16_to_fp32(scale);
  const float inverse = as_f16 == 0.0f ? 0.0f : 1.0f / as_f16;
  float q[kQ4Group];
  for (int i = 0; i < kGroupVecs; ++i) {
    simd::store(q + i * simd::kLanes, rounded(numbers[i], inverse));
  }
  for (int i = 0; i < kQ4Group; ++i) {
    half_bytes[i] = static_cast<std::uint8_t>(static_cast<int>(q[i]) + kQ4Offset);
  }
  return scale;
}

/// Where a number of a tile lies: its byte among the nibbles, and which half of it.
struct NibblePlace {
  std::size_t byte;
  int shift;
};

NibblePlace place_in_run(std::int64_t run, std::int64_t lane, std::int64_t i, std::int64_t n) {
  const std::int64_t in_half = i % (n / 2);
  const std::int64_t byte =
      run * n * kQ4Lanes / 2 + 64 * (in_half / 4) + 4 * (lane % kQ4Lanes) + in_half % 4;
  return {static_cast<std::size_t>(byte), i < n / 2 ? 0 : 4};
}

NibblePlace key_place(std::int64_t head_dim, std::int64_t token, std::int64_t d) {
  const std::int64_t run = token / kQ4Lanes * (head_dim / kQ4Group) + d / kQ4Group;
  return place_in_run(run, token, d % kQ4Group, kQ4Group);
}

NibblePlace value_place(std::int64_t /*head_dim*/, std::int64_t token, std::int64_t d) {
  return place_in_run(d / kQ4Lanes, d, token, kBlockTokens);
}

using PlaceOf = NibblePlace (*)(std::int64_t head_dim, std::int64_t token, std::int64_t d);

template <PlaceOf place_of>
void write_groups(const Q4Layout& layout, const float* rows, std::byte* tile) {
  auto* scales = reinterpret_cast<std::uint16_t*>(tile + layout.scales());
  auto* nibbles = reinterpret_cast<std::uint8_t*>(tile + layout.nibbles());
  std::memset(nibbles, 0, static_cast<std::size_t>(layout.bytes() - layout.nibbles()));
  for (std::int64_t token = 0; token < kBlockTokens; ++token) {
    for (std::int64_t group = 0; group < layout.n_groups(); ++group) {
      const std::int64_t d0 = group * kQ4Group;
      std::uint8_t half_bytes[kQ4Group];
      scales[group * kBlockTokens + token] =
          round_to_q4(rows + token * layout.head_dim + d0, half_bytes);
      for (int i = 0; i < kQ4Group; ++i) {
        const NibblePlace place = place_of(layout.head_dim, token, d0 + i);
        nibbles[place.byte] |= static_cast<std::uint8_t>(half_bytes[i] << place.shift);
      }
    }
  }
}

template <PlaceOf place_of>
void read_groups(const Q4Layout& layout, const std::byte* tile, float* rows) {
  const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + layout.scales());
  const auto* nibbles = reinterpret_cast<const std::uint8_t*>(tile + layout.nibbles());
  for (std::int64_t token = 0; token < kBlockTokens; ++token) {
    float* row = rows + token * layout.head_dim;
    for (std::int64_t d = 0; d < layout.head_dim; ++d) {
      const NibblePlace place = place_of(layout.head_dim, token, d);
      row[d] = static_cast<float>(((nibbles[place.byte] >> place.shift) & 15) - kQ4Offset);
    }
    for (std::int64_t group = 0; group < layout.n_groups(); ++group) {
      const float scale = ggml_fp16_to_fp32(scales[group * kBlockTokens + token]);
      for (int i = 0; i < kQ4Group; ++i) row[group * kQ4Group + i] *= scale;
    }
    hadamard_rotate(row, layout.head_dim);
  }
}

/// Writes the mean of all rows to the tile; mean [head_dim] is what it became in F16.
std::vector<float> write_mean(const float* rows, std::int64_t head_dim, std::byte* tile) {
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  for (int token = 0; token < kBlockTokens; ++token, rows += head_dim) {
    for (std::size_t d = 0; d < mean.size(); ++d) mean[d] += rows[d] / kBlockTokens;
  }
  auto* written = reinterpret_cast<std::uint16_t*>(tile);
  ggml_fp32_to_fp16_row(mean.data(), written, head_dim);
  ggml_fp16_to_fp32_row(written, mean.data(), head_dim);
  return mean;
}

}  // namespace

void read_q4_keys(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_groups<key_place>(Q4Layout::keys(head_dim), tile, rows);
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  ggml_fp16_to_fp32_row(reinterpret_cast<const std::uint16_t*>(tile), mean.data(), head_dim);
  for (int token = 0; token < kBlockTokens; ++token, rows += head_dim) {
    for (std::size_t d = 0; d < mean.size(); ++d) rows[d] += mean[d];
  }
}

void read_q4_values(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_groups<value_place>(Q4Layout::values(head_dim), tile, rows);
}

void write_q4_keys(const float* rows, std::int64_t head_dim, std::byte* tile) {
  const std::vector<float> mean = write_mean(rows, head_dim, tile);
  std::vector<float> keys(rows, rows + kBlockTokens * head_dim);
  for (int token = 0; token < kBlockTokens; ++token) {
    float* key = keys.data() + token * head_dim;
    for (std::size_t d = 0; d < mean.size(); ++d) key[d] -= mean[d];
    hadamard_rotate(key, head_dim);
  }
  write_groups<key_place>(Q4Layout::keys(head_dim), keys.data(), tile);
}

void write_q4_values(const float* rows, std::int64_t head_dim, std::byte* tile) {
  std::vector<float> values(rows, rows + kBlockTokens * head_dim);
  for (int token = 0; token < kBlockTokens; ++token) {
    hadamard_rotate(values.data() + token * head_dim, head_dim);
  }
  write_groups<value_place>(Q4Layout::values(head_dim), values.data(), tile);
}

}  // namespace modularbase::kernels
