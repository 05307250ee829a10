#include "modularbase/engine/reference_inputs.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "modularbase/kernels/attention_types.h"
#include "modularbase/kernels/hadamard.h"

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;
constexpr std::int64_t kKvStep = 256;   // exact tokens
constexpr std::int64_t kBlockStep = 4;  // blocks of a tier
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The next multiple of step, or of an eighth of n where that is more.
std::int64_t padded(std::int64_t n, std::int64_t step) {
  const auto eighth = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(n)) / 8);
  step = std::max(step, eighth);
  return (n + step - 1) / step * step;
}

std::span<const kernels::KvSegment> segments_of(const kernels::AttentionSpan& span) {
  return {span.segments, static_cast<std::size_t>(span.n_segments)};
}

/// A row whose query is kept, and where.
struct WindowRow {
  const kernels::QueryWindow* window;
  std::int64_t place;  // among its rows
  std::int32_t row;    // in the batch
};

std::vector<WindowRow> window_rows(const AttentionInputs& step) {
  std::vector<WindowRow> rows;
  for (const kernels::AttentionSpan& span : step.spans()) {
    for (std::int32_t row = 0; row < span.n_rows; ++row) {
      const std::int64_t place = kernels::window_row(span, 0, row);
      if (place >= 0) rows.push_back({span.window, place, span.row0 + row});
    }
  }
  return rows;
}

/// Gathers which rows of the cache a step reads and writes, and who sees what.
class Filler {
 public:
  Filler(const ReferenceInputs& inputs, const AttentionInputs& step)
      : inputs_(inputs),
        geometry_(step.group().memory().geometry()),
        n_kv_(inputs.mask->ne[0]),
        n_rows_(step.n_rows()),
        read_rows_(static_cast<std::size_t>(n_kv_ * geometry_.n_head_kv)),
        mask_(static_cast<std::size_t>(n_kv_ * n_rows_), kHidden) {
    for (const kernels::AttentionSpan& span : step.spans()) add(span);
    // Padding reads a row that is written, so that masked garbage is never NaN.
    for (; n_read_ < n_kv_; ++n_read_)
      read_at(n_read_, cache_row(step.spans()[0], step.spans()[0].pos0));
  }

  void set() const {
    set_input(inputs_.positions, positions_);
    set_input(inputs_.write_rows, write_rows_);
    set_input(inputs_.read_rows, read_rows_);
    set_input(inputs_.mask, mask_);
  }

 private:
  // Of head 0; the next head's is a block's tokens later.
  std::int64_t cache_row(std::int64_t block, std::int64_t token) const {
    return block * geometry_.block_rows() + token;
  }
  std::int64_t cache_row(const kernels::AttentionSpan& span, std::int64_t position) const {
    return cache_row(span.block_table[position / kBlock], position % kBlock);
  }

  void read_at(std::int64_t at, std::int64_t row) {
    for (std::int64_t head = 0; head < geometry_.n_head_kv; ++head) {
      read_rows_[static_cast<std::size_t>(head * n_kv_ + at)] =
          static_cast<std::int32_t>(row + head * kBlock);
    }
  }

  void show(std::int64_t first_row, std::int64_t end_row) {
    for (std::int64_t row = first_row; row < end_row; ++row) {
      mask_[static_cast<std::size_t>(row * n_kv_ + n_read_)] = 0.0f;
    }
  }

  void add(const kernels::AttentionSpan& span) {
    const std::int64_t end_row = span.row0 + span.n_rows;
    for (const kernels::KvSegment& segment : segments_of(span)) {
      if (segment.tier != kernels::kExactTier) continue;
      for (std::int64_t token = 0; token < kBlock; ++token) {
        if ((segment.visible >> token & 1) == 0) continue;
        read_at(n_read_, cache_row(segment.block, token));
        show(span.row0, end_row);
        ++n_read_;
      }
    }
    for (std::int64_t p = span.first; p < span.pos0 + span.n_rows; ++p, ++n_read_) {
      read_at(n_read_, cache_row(span, p));
      show(span.row0 + std::max<std::int64_t>(0, p - span.pos0), end_row);
    }
    for (std::int64_t p = span.pos0; p < span.pos0 + span.n_rows; ++p) {
      positions_.push_back(static_cast<std::int32_t>(p));
      for (std::int64_t head = 0; head < geometry_.n_head_kv; ++head) {
        write_rows_.push_back(cache_row(span, p) + head * kBlock);
      }
    }
  }

  const ReferenceInputs& inputs_;
  const KvGeometry& geometry_;
  const std::int64_t n_kv_;
  const std::int64_t n_rows_;
  std::int64_t n_read_ = 0;
  std::vector<std::int32_t> positions_;
  std::vector<std::int64_t> write_rows_;
  std::vector<std::int32_t> read_rows_;
  std::vector<float> mask_;
};

void fill_tier(const ReferenceTier& tier, int index, const AttentionInputs& step) {
  const std::int64_t n_blocks = tier.blocks->ne[0];
  std::vector<std::int32_t> blocks;
  std::vector<float> mask(static_cast<std::size_t>(n_blocks * kBlock * step.n_rows()), kHidden);
  for (const kernels::AttentionSpan& span : step.spans()) {
    for (const kernels::KvSegment& segment : segments_of(span)) {
      if (segment.tier != index) continue;
      for (std::int64_t row = span.row0; row < span.row0 + span.n_rows; ++row) {
        float* of_block = mask.data() + row * n_blocks * kBlock + std::ssize(blocks) * kBlock;
        for (std::int64_t i = 0; i < kBlock; ++i) {
          if ((segment.visible >> i & 1) != 0) of_block[i] = 0.0f;
        }
      }
      blocks.push_back(segment.block);
    }
  }
  // Padding reads a block that is there, so that masked garbage is never NaN.
  blocks.resize(static_cast<std::size_t>(n_blocks), blocks.empty() ? 0 : blocks[0]);
  std::vector<std::int32_t> of_heads;
  for (std::int64_t head = 0; head < tier.blocks->ne[1]; ++head) {
    of_heads.insert(of_heads.end(), blocks.begin(), blocks.end());
  }
  set_input(tier.blocks, of_heads);
  set_input(tier.mask, mask);
}

// Sylvester's matrix over sqrt(n).
std::vector<float> hadamard_matrix(std::int64_t n) {
  std::vector<float> matrix(static_cast<std::size_t>(n * n));
  const float size = 1.0f / std::sqrt(static_cast<float>(n));
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    const std::size_t both = i / static_cast<std::size_t>(n) & i % static_cast<std::size_t>(n);
    matrix[i] = std::popcount(both) % 2 == 0 ? size : -size;
  }
  return matrix;
}

void fill_windows(const ReferenceInputs& inputs, const AttentionInputs& step) {
  std::vector<std::int32_t> rows;
  for (const WindowRow& wanted : window_rows(step)) rows.push_back(wanted.row);
  rows.resize(static_cast<std::size_t>(inputs.window_rows->ne[0]), 0);
  std::vector<std::int32_t> of_heads;
  for (std::int64_t head = 0; head < inputs.window_rows->ne[1]; ++head) {
    of_heads.insert(of_heads.end(), rows.begin(), rows.end());
  }
  set_input(inputs.window_rows, of_heads);
}

std::vector<float> floats_of(Tensor tensor) {
  std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
  ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
  return values;
}

}  // namespace

ReferenceShape reference_shape(const AttentionInputs& step) {
  ReferenceShape shape;
  for (const kernels::AttentionSpan& span : step.spans()) {
    shape.n_kv += span.pos0 + span.n_rows - span.first;
    for (const kernels::KvSegment& segment : segments_of(span)) {
      if (segment.tier == kernels::kExactTier) {
        shape.n_kv += std::popcount(segment.visible);
      } else {
        ++shape.n_blocks[static_cast<std::size_t>(segment.tier)];
      }
    }
  }
  shape.n_kv = padded(shape.n_kv, kKvStep);
  for (std::int64_t& n : shape.n_blocks) n = padded(n, kBlockStep);
  const std::size_t n_window = window_rows(step).size();
  shape.n_window = n_window == 0 ? 0 : static_cast<std::int64_t>(std::bit_ceil(n_window));
  return shape;
}

ReferenceInputs add_reference_inputs(GraphBuilder& g, const KvGroup& group, std::int64_t n_head,
                                     std::int64_t n_rows, const ReferenceShape& shape) {
  ReferenceInputs inputs{.group = &group};
  if (n_rows == 0) return inputs;
  const KvGeometry& geometry = group.memory().geometry();
  const std::int64_t n_head_kv = geometry.n_head_kv;
  inputs.positions = g.input("positions", GGML_TYPE_I32, n_rows);
  inputs.write_rows = g.input("write_rows", GGML_TYPE_I64, n_head_kv * n_rows);
  inputs.read_rows = g.input("read_rows", GGML_TYPE_I32, shape.n_kv * n_head_kv);
  inputs.mask = g.input("mask", GGML_TYPE_F32, shape.n_kv, n_rows);
  bool is_rotated = geometry.type == GGML_TYPE_Q8_0;
  for (std::size_t i = 0; i < shape.n_blocks.size(); ++i) {
    const std::int64_t n_blocks = shape.n_blocks[i];
    if (n_blocks == 0) continue;
    inputs.tiers[i] = {g.input("tier_blocks", GGML_TYPE_I32, n_blocks, n_head_kv),
                       g.input("tier_mask", GGML_TYPE_F32, kBlock * n_blocks, n_rows)};
    is_rotated = true;
  }
  if (is_rotated) {
    const std::int64_t n = kernels::hadamard_size(geometry.head_dim);
    inputs.hadamard = g.input("hadamard", GGML_TYPE_F32, n, n);
  }
  if (shape.n_window > 0) {
    inputs.window_rows = g.input("window_rows", GGML_TYPE_I32, shape.n_window, n_head);
  }
  return inputs;
}

void fill_reference(const ReferenceInputs& inputs, const AttentionInputs& step) {
  if (!inputs.mask) return;
  Filler(inputs, step).set();
  for (int i = 0; i < kernels::kNKvTiers; ++i) {
    if (inputs.tiers[i].blocks) fill_tier(inputs.tiers[i], i, step);
  }
  if (inputs.hadamard) set_input(inputs.hadamard, hadamard_matrix(inputs.hadamard->ne[0]));
  if (inputs.window_rows) fill_windows(inputs, step);
}

void keep_queries(const std::vector<ReferenceQueries>& queries, const AttentionInputs& step) {
  const std::vector<WindowRow> rows = window_rows(step);
  if (rows.empty()) return;
  const KvGeometry& geometry = step.group().memory().geometry();
  for (const ReferenceQueries& of_layer : queries) {
    if (!geometry.holds(of_layer.layer)) continue;
    const std::vector<float> all = floats_of(of_layer.queries);
    const std::vector<float> log_mass = floats_of(of_layer.log_mass);
    const std::int64_t width = of_layer.queries->ne[0];
    const std::int64_t n_window = of_layer.log_mass->ne[1];
    const std::int64_t n_head = of_layer.log_mass->ne[2];
    const auto in_group = static_cast<std::int64_t>(step.group().index_of(of_layer.layer));
    for (std::int64_t i = 0; i < std::ssize(rows); ++i) {
      const kernels::QueryWindow& window = *rows[static_cast<std::size_t>(i)].window;
      const std::int64_t at = in_group * window.n_rows + rows[static_cast<std::size_t>(i)].place;
      ggml_fp32_to_fp16_row(all.data() + i * width, window.queries + at * width, width);
      for (std::int64_t head = 0; head < n_head; ++head) {
        window.log_mass[at * n_head + head] =
            log_mass[static_cast<std::size_t>(head * n_window + i)];
      }
    }
  }
}

}  // namespace modularbase
