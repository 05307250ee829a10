#include "modularbase/kernels/kv_tile_q4.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "modularbase/kernels/hadamard.h"

namespace modularbase::kernels {
namespace {

/// 32 numbers as signed half-bytes times one scale.
struct Q4Numbers {
  std::uint16_t scale;  // F16
  std::int8_t q[kQ4Group];
};

void round_group(const float* x, float inverse_scale, std::int8_t* q) {
  for (int i = 0; i < kQ4Group; ++i) {
    const float rounded = std::nearbyint(x[i] * inverse_scale);
    q[i] = static_cast<std::int8_t>(std::clamp(rounded, -8.0f, 7.0f));
  }
}

/// The scale with the least squared error among some that put the largest number near -8: for the
/// numbers rounded with a candidate, the best scale follows by least squares.
float best_scale(const float* x) {
  float largest = 0.0f;
  for (int i = 0; i < kQ4Group; ++i) {
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  }
  if (largest == 0.0f) return 0.0f;
  float best = largest / -8.0f;
  float most_explained = 0.0f;
  for (const float end : {-6.4f, -6.8f, -7.2f, -7.6f, -8.0f, -8.4f, -8.8f, 6.6f, 7.0f, 7.4f}) {
    std::int8_t q[kQ4Group];
    round_group(x, end / largest, q);
    float xq = 0.0f;
    float qq = 0.0f;
    for (int i = 0; i < kQ4Group; ++i) {
      xq += x[i] * static_cast<float>(q[i]);
      qq += static_cast<float>(q[i] * q[i]);
    }
    const float explained = qq > 0.0f ? xq * xq / qq : 0.0f;  // of the sum of squares
    if (explained > most_explained) {
      most_explained = explained;
      best = xq / qq;
    }
  }
  return best;
}

Q4Numbers round_to_q4(const float* x) {
  Q4Numbers numbers;
  numbers.scale = ggml_fp32_to_fp16(best_scale(x));
  const float scale = ggml_fp16_to_fp32(numbers.scale);
  round_group(x, scale == 0.0f ? 0.0f : 1.0f / scale, numbers.q);
  return numbers;
}

// Where element i of a group lies within its (lane block, group), and in which half of the byte.
std::size_t nibble_byte(std::int64_t lane, int i) {
  return static_cast<std::size_t>(64 * (i % 16 / 4) + 4 * (lane % kQ4Lanes) + i % 4);
}
int nibble_shift(int i) {
  return i < 16 ? 0 : 4;
}

// numbers [n_lanes, n_groups * 32]: element i of lane l at numbers[i * element_stride + l *
// lane_stride].
struct Q4View {
  float* numbers;
  std::int64_t element_stride;
  std::int64_t lane_stride;
  float& at(std::int64_t element, std::int64_t lane) const {
    return numbers[element * element_stride + lane * lane_stride];
  }
};

void write_groups(const Q4Layout& layout, const Q4View& view, std::byte* tile) {
  auto* scales = const_cast<std::uint16_t*>(layout.scales(tile));
  auto* nibbles = const_cast<std::uint8_t*>(layout.nibbles(tile));
  std::fill_n(nibbles, layout.n_groups * layout.n_lanes * kQ4Group / 2, std::uint8_t{0});
  for (std::int64_t lane = 0; lane < layout.n_lanes; ++lane) {
    for (std::int64_t group = 0; group < layout.n_groups; ++group) {
      float x[kQ4Group];
      for (int i = 0; i < kQ4Group; ++i) x[i] = view.at(group * kQ4Group + i, lane);
      const Q4Numbers numbers = round_to_q4(x);
      scales[group * layout.n_lanes + lane] = numbers.scale;
      std::uint8_t* block = nibbles + (lane / kQ4Lanes * layout.n_groups + group) * kQ4BlockBytes;
      for (int i = 0; i < kQ4Group; ++i) {
        block[nibble_byte(lane, i)] |=
            static_cast<std::uint8_t>((numbers.q[i] + kQ4Offset) << nibble_shift(i));
      }
    }
  }
}

void read_groups(const Q4Layout& layout, const std::byte* tile, const Q4View& view) {
  const std::uint16_t* scales = layout.scales(tile);
  for (std::int64_t lane = 0; lane < layout.n_lanes; ++lane) {
    for (std::int64_t group = 0; group < layout.n_groups; ++group) {
      const float scale = ggml_fp16_to_fp32(scales[group * layout.n_lanes + lane]);
      const std::uint8_t* block =
          layout.nibbles(tile) + (lane / kQ4Lanes * layout.n_groups + group) * kQ4BlockBytes;
      for (int i = 0; i < kQ4Group; ++i) {
        const int q = ((block[nibble_byte(lane, i)] >> nibble_shift(i)) & 15) - kQ4Offset;
        view.at(group * kQ4Group + i, lane) = scale * static_cast<float>(q);
      }
    }
  }
}

/// Takes the mean of all rows, rounded to F16, out of them and writes it to the tile.
std::vector<float> centred(const float* rows, std::int64_t head_dim, std::byte* tile) {
  std::vector<float> result(rows, rows + kBlockTokens * head_dim);
  auto* mean = const_cast<std::uint16_t*>(Q4Layout::mean(tile));
  for (std::int64_t d = 0; d < head_dim; ++d) {
    float sum = 0.0f;
    for (int token = 0; token < kBlockTokens; ++token) sum += rows[token * head_dim + d];
    mean[d] = ggml_fp32_to_fp16(sum / kBlockTokens);
    const float rounded = ggml_fp16_to_fp32(mean[d]);
    for (int token = 0; token < kBlockTokens; ++token) {
      result[static_cast<std::size_t>(token * head_dim + d)] -= rounded;
    }
  }
  return result;
}

void add_mean(const std::byte* tile, std::int64_t head_dim, float* rows) {
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  ggml_fp16_to_fp32_row(Q4Layout::mean(tile), mean.data(), head_dim);
  for (int token = 0; token < kBlockTokens; ++token) {
    for (std::int64_t d = 0; d < head_dim; ++d) {
      rows[token * head_dim + d] += mean[static_cast<std::size_t>(d)];
    }
  }
}

}  // namespace

std::size_t q4_tile_bytes(std::int64_t head_dim) {
  const Q4Layout layout = Q4Layout::keys(head_dim);  // that of values has as many of everything
  return static_cast<std::size_t>(2 * (head_dim + layout.n_groups * layout.n_lanes) +
                                  head_dim * kBlockTokens / 2);
}

void read_q4_keys(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_groups(Q4Layout::keys(head_dim), tile, {rows, 1, head_dim});
  for (int token = 0; token < kBlockTokens; ++token) {
    hadamard_rotate(rows + token * head_dim, head_dim);
  }
  add_mean(tile, head_dim, rows);
}

void read_q4_values(const std::byte* tile, std::int64_t head_dim, float* rows) {
  read_groups(Q4Layout::values(head_dim), tile, {rows, head_dim, 1});
  add_mean(tile, head_dim, rows);
}

void write_q4_keys(const float* rows, std::int64_t head_dim, std::byte* tile) {
  std::vector<float> keys = centred(rows, head_dim, tile);
  for (int token = 0; token < kBlockTokens; ++token) {
    hadamard_rotate(keys.data() + token * head_dim, head_dim);
  }
  write_groups(Q4Layout::keys(head_dim), {keys.data(), 1, head_dim}, tile);
}

void write_q4_values(const float* rows, std::int64_t head_dim, std::byte* tile) {
  std::vector<float> values = centred(rows, head_dim, tile);
  write_groups(Q4Layout::values(head_dim), {values.data(), head_dim, 1}, tile);
}

}  // namespace modularbase::kernels
