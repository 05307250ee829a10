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

/// A group as ggml's block_q4_0 has it: the scale, then half-bytes, number i in the low half of
/// byte i and number i + 16 in the high one.
struct Q4Row {
  std::uint16_t scale;
  std::uint8_t half_bytes[kQ4Group / 2];
};
static_assert(sizeof(Q4Row) == 18);

void write_q4_rows(const float* rows, std::int64_t head_dim, std::byte* tile) {
  for (std::int64_t at = 0; at < kBlockTokens * head_dim; at += kQ4Group) {
    Q4Row row{};
    std::uint8_t half_bytes[kQ4Group];
    row.scale = round_to_q4(rows + at, half_bytes);
    for (int i = 0; i < kQ4Group / 2; ++i) {
      row.half_bytes[i] =
          static_cast<std::uint8_t>(half_bytes[i] | half_bytes[i + kQ4Group / 2] << 4);
    }
    std::memcpy(tile, &row, sizeof(row));
    tile += sizeof(row);
  }
}

void read_q4_rows(const std::byte* tile, std::int64_t head_dim, float* rows) {
  ggml_get_type_traits(GGML_TYPE_Q4_0)->to_float(tile, rows, kBlockTokens * head_dim);
}

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

/// The low and the high halves of 16 bytes, as two rows of 16 numbers.
struct HalfBytes {
  std::int8_t low[kQ4Lanes];
  std::int8_t high[kQ4Lanes];

  explicit HalfBytes(const std::uint8_t* bytes) {
    for (int i = 0; i < kQ4Lanes; ++i) {
      low[i] = static_cast<std::int8_t>((bytes[i] & 15) - kQ4Offset);
      high[i] = static_cast<std::int8_t>((bytes[i] >> 4) - kQ4Offset);
    }
  }
};

void scale_numbers(const std::int8_t* numbers, std::uint16_t scale, float* to) {
  for (int i = 0; i < kQ4Lanes; i += simd::kLanes) {
    simd::store(to + i, simd::load_s8(numbers + i) * simd::set1_f16(scale));
  }
}

// A run's bytes of one token are 16 dims of a group, and its halves the group.
void read_key_numbers(const std::byte* tile, std::int64_t head_dim, float* rows) {
  const Q4Layout layout = Q4Layout::keys(head_dim);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + layout.scales());
  const auto* run = reinterpret_cast<const std::uint8_t*>(tile + layout.nibbles());
  for (int token0 = 0; token0 < kBlockTokens; token0 += kQ4Lanes) {
    for (std::int64_t group = 0; group < layout.n_groups(); ++group, run += kQ4KeyRunBytes) {
      for (int lane = 0; lane < kQ4Lanes; ++lane) {
        std::uint8_t bytes[kQ4Lanes];
        for (int r = 0; r < 4; ++r) std::memcpy(bytes + 4 * r, run + 64 * r + 4 * lane, 4);
        const HalfBytes numbers(bytes);
        const std::uint16_t scale = scales[group * kBlockTokens + token0 + lane];
        float* to = rows + (token0 + lane) * head_dim + group * kQ4Group;
        scale_numbers(numbers.low, scale, to);
        scale_numbers(numbers.high, scale, to + kQ4Lanes);
      }
    }
  }
}

// A run has 16 dims of all tokens: every fourth byte belongs to one token, and its high half to the
// one that is 32 tokens later.
void read_value_numbers(const std::byte* tile, std::int64_t head_dim, float* rows) {
  const Q4Layout layout = Q4Layout::values(head_dim);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + layout.scales());
  const auto* run = reinterpret_cast<const std::uint8_t*>(tile + layout.nibbles());
  for (std::int64_t d = 0; d < head_dim; d += kQ4Lanes, run += kQ4ValueRunBytes) {
    const std::uint16_t* scale = scales + d / kQ4Group * kBlockTokens;
    for (int token = 0; token < kBlockTokens / 2; ++token) {
      std::uint8_t bytes[kQ4Lanes];
      const std::uint8_t* from = run + token / 4 * 64 + token % 4;
      for (int lane = 0; lane < kQ4Lanes; ++lane) bytes[lane] = from[4 * lane];
      const HalfBytes numbers(bytes);
      const int later = token + kBlockTokens / 2;
      scale_numbers(numbers.low, scale[token], rows + token * head_dim + d);
      scale_numbers(numbers.high, scale[later], rows + later * head_dim + d);
    }
  }
}

/// Writes the mean of all rows; mean [head_dim] is what it became in F16.
std::vector<float> write_mean(const float* rows, std::int64_t head_dim, std::byte* to) {
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  for (int token = 0; token < kBlockTokens; ++token, rows += head_dim) {
    for (std::size_t d = 0; d < mean.size(); ++d) mean[d] += rows[d] / kBlockTokens;
  }
  auto* written = reinterpret_cast<std::uint16_t*>(to);
  ggml_fp32_to_fp16_row(mean.data(), written, head_dim);
  ggml_fp16_to_fp32_row(written, mean.data(), head_dim);
  return mean;
}

/// H (key - mean) of all rows; the mean is written.
std::vector<float> centred_keys(const float* rows, std::int64_t head_dim, std::byte* mean_to) {
  const std::vector<float> mean = write_mean(rows, head_dim, mean_to);
  std::vector<float> keys(rows, rows + kBlockTokens * head_dim);
  for (int token = 0; token < kBlockTokens; ++token) {
    float* key = keys.data() + token * head_dim;
    for (std::size_t d = 0; d < mean.size(); ++d) key[d] -= mean[d];
  }
  hadamard_rotate_rows(keys.data(), kBlockTokens, head_dim);
  return keys;
}

/// Turns what centred_keys() made back into keys.
void uncentre_keys(const std::byte* mean_from, std::int64_t head_dim, float* rows) {
  hadamard_rotate_rows(rows, kBlockTokens, head_dim);
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  ggml_fp16_to_fp32_row(reinterpret_cast<const std::uint16_t*>(mean_from), mean.data(), head_dim);
  for (int token = 0; token < kBlockTokens; ++token, rows += head_dim) {
    for (std::size_t d = 0; d < mean.size(); ++d) rows[d] += mean[d];
  }
}

std::vector<float> rotated_values(const float* rows, std::int64_t head_dim) {
  std::vector<float> values(rows, rows + kBlockTokens * head_dim);
  hadamard_rotate_rows(values.data(), kBlockTokens, head_dim);
  return values;
}

}  // namespace

void read_q4_keys(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_key_numbers(tile, head_dim, rows);
  uncentre_keys(tile, head_dim, rows);
}

void read_q4_values(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_value_numbers(tile, head_dim, rows);
  hadamard_rotate_rows(rows, kBlockTokens, head_dim);
}

void write_q4_keys(const float* rows, std::int64_t head_dim, std::byte* tile) {
  const std::vector<float> keys = centred_keys(rows, head_dim, tile);
  write_groups<key_place>(Q4Layout::keys(head_dim), keys.data(), tile);
}

void write_q4_values(const float* rows, std::int64_t head_dim, std::byte* tile) {
  const std::vector<float> values = rotated_values(rows, head_dim);
  write_groups<value_place>(Q4Layout::values(head_dim), values.data(), tile);
}

void read_q4_key_rows(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_q4_rows(tile, head_dim, rows);
  uncentre_keys(tile + q4_rows_bytes(head_dim), head_dim, rows);
}

void read_q4_value_rows(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_q4_rows(tile, head_dim, rows);
  hadamard_rotate_rows(rows, kBlockTokens, head_dim);
}

void write_q4_key_rows(const float* rows, std::int64_t head_dim, std::byte* tile) {
  const std::vector<float> keys = centred_keys(rows, head_dim, tile + q4_rows_bytes(head_dim));
  write_q4_rows(keys.data(), head_dim, tile);
}

void write_q4_value_rows(const float* rows, std::int64_t head_dim, std::byte* tile) {
  write_q4_rows(rotated_values(rows, head_dim).data(), head_dim, tile);
}

}  // namespace modularbase::kernels
