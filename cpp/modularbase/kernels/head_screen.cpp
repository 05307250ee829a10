#include <ggml-cpu.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include "modularbase/kernels/certified_head.h"
#include "modularbase/kernels/head_columns.h"
#include "modularbase/kernels/head_layout.h"
#include "modularbase/kernels/head_product.h"

namespace modularbase::kernels {
namespace {

constexpr float kEps = 0x1p-24f;  // a float operation's relative error
constexpr float kUnbounded = std::numeric_limits<float>::infinity();
constexpr float kSmallestNorm = 1e-18f;
constexpr std::int64_t kMaxEmbd = 65536;  // 255 * 128 * n_embd stays below 2^31
constexpr int kTilesPerChunk = 16;
constexpr int kLanes = 16;
constexpr int kCodeBlock = 64;

/// The smallest BF16 not below value; not a number counts as infinite.
std::uint16_t bf16_up(float value) {
  if (!(value <= std::numeric_limits<float>::max())) return 0x7f80;
  return static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(value) + 0xffffu) >> 16);
}

/// Sum of squares, in lanes so that the compiler can vectorise it. n is a multiple of kLanes.
float sum_squares(const float* v, std::size_t n) {
  float lanes[kLanes] = {};
  for (std::size_t p = 0; p < n; p += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += v[p + i] * v[p + i];
  }
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

/// Norm of z - scale * code over n places (a multiple of kLanes).
float residual_norm(const float* z, const std::int8_t* code, float scale, std::size_t n) {
  float lanes[kLanes] = {};
  for (std::size_t p = 0; p < n; p += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float e = z[p + i] - scale * static_cast<float>(code[p + i]);
      lanes[i] += e * e;
    }
  }
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return std::sqrt(sum);
}

/// A residual norm rounded up for every operation it took, z's own rounding included: |z| <=
/// residual + coded, and each z and each coded value is off by a few eps of itself. Squares below
/// the smallest float vanish, hence the constant.
float with_rounding(float residual, float coded_norm, std::size_t n) {
  const float growth = 1.0f + static_cast<float>(n + 32) * kEps;
  return (residual + 16.0f * kEps * (residual + 2.0f * coded_norm)) * growth + kSmallestNorm;
}

struct RowBounds {
  float scale = 0.0f;
  float rest_residual = 0.0f;
  float hot_residual = 0.0f;
  float rest_norm = 0.0f;
  float hot_norm = 0.0f;
  float row_norm = 0.0f;
};

/// Codes rows one at a time; owns the buffers for that.
class RowCoder {
 public:
  explicit RowCoder(const HeadScreen::Data& data)
      : data_(data),
        n_hot_(data.n_hot),
        n_rest_(data.n_rest),
        n_padded_(
            static_cast<std::size_t>((data.n_rest + kCodeBlock - 1) / kCodeBlock * kCodeBlock)),
        row_((data.n_embd + kLanes - 1) / kLanes * kLanes),
        z_(n_hot_ + n_padded_),
        fine_(n_hot_ + n_padded_),
        level_(n_padded_),
        code_(n_padded_) {}

  RowBounds code(const HeadWeight& head, std::int64_t i) {
    load_head_row(head, i, row_.data());
    normalise_row(data_.columns, row_.data(), z_.data());
    RowBounds bounds;
    const float square = sum_squares(z_.data(), z_.size());  // padding is zero
    bounds.scale = std::sqrt(square / static_cast<float>(data_.n_embd)) * data_.codebook.unit;
    if (!(bounds.scale < 1e18f))
      bounds.scale = 0.0f;  // the residual then says that this row is not bounded
    bounds.row_norm = std::sqrt(sum_squares(row_.data(), row_.size())) * (1.0f + 1e-4f);
    round_to_fine(bounds.scale);
    code_rest();
    const float hot_scale = bounds.scale * data_.codebook.hot_step;
    bounds.rest_norm = norm_of(level_.data(), n_padded_);
    bounds.hot_norm = norm_of(fine_.data(), n_hot_) * data_.codebook.hot_step * (1.0f + 1e-6f);
    bounds.rest_residual =
        with_rounding(residual_norm(z_.data() + n_hot_, level_.data(), bounds.scale, n_padded_),
                      bounds.scale * bounds.rest_norm, n_padded_);
    bounds.hot_residual = with_rounding(residual_norm(z_.data(), fine_.data(), hot_scale, n_hot_),
                                        bounds.scale * bounds.hot_norm, n_hot_);
    if (!(bounds.row_norm < kUnbounded)) bounds.rest_residual = kUnbounded;
    return bounds;
  }

  /// Writes the codes of the latest row as row r of a tile.
  void store(std::uint8_t* tile, int r) const {
    std::uint8_t* out = tile + 4 * r;
    for (std::size_t p = 0; p < n_hot_; p += 4, out += kVectorBytes) {
      for (int i = 0; i < 4; ++i) out[i] = static_cast<std::uint8_t>(fine_[p + i] + 128);
    }
    for (std::size_t p = 0; p < n_rest_; p += 8, out += kVectorBytes) {
      std::uint32_t low, high;
      std::memcpy(&low, code_.data() + p, 4);
      std::memcpy(&high, code_.data() + p + 4, 4);
      low |= high << 4;
      std::memcpy(out, &low, 4);
    }
  }

 private:
  /// z in units of the row's scale, as 8-bit integers.
  void round_to_fine(float scale) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    round_places(0, n_hot_, inverse / data_.codebook.hot_step);
    round_places(n_hot_, n_hot_ + n_padded_, inverse);
  }

  void round_places(std::size_t begin, std::size_t end, float inverse) {
    const float* z = z_.data();
    std::int8_t* fine = fine_.data();
    for (std::size_t p = begin; p < end; ++p) {
      float v = z[p] * inverse;
      v = v > -127.0f ? v : -127.0f;  // also where v is not a number
      v = v < 127.0f ? v : 127.0f;
      fine[p] = static_cast<std::int8_t>(static_cast<int>(std::rint(v)));
    }
  }

  /// A code counts the bounds that its value exceeds. Blocks of constant size, so that they stay in
  /// registers.
  void code_rest() {
    for (std::size_t p = 0; p < n_padded_; p += kCodeBlock) {
      code_block(fine_.data() + n_hot_ + p, code_.data() + p, level_.data() + p);
    }
    // x is zero on the padding: its codes count for nothing.
    std::fill(level_.begin() + static_cast<std::ptrdiff_t>(n_rest_), level_.end(), std::int8_t{0});
  }

  void code_block(const std::int8_t* fine, std::uint8_t* code_out, std::int8_t* level_out) const {
    std::int8_t value[kCodeBlock], code[kCodeBlock] = {}, level[kCodeBlock];
    for (int i = 0; i < kCodeBlock; ++i) {
      value[i] = fine[i];
      level[i] = data_.codebook.levels[0];
    }
    for (int k = 0; k + 1 < kLevels; ++k) {
      const std::int8_t bound = data_.codebook.bounds[k];
      const auto step =
          static_cast<std::int8_t>(data_.codebook.levels[k + 1] - data_.codebook.levels[k]);
      for (int i = 0; i < kCodeBlock; ++i) {
        const auto above = static_cast<std::int8_t>(-(value[i] > bound));
        code[i] = static_cast<std::int8_t>(code[i] - above);
        level[i] = static_cast<std::int8_t>(level[i] + (above & step));
      }
    }
    for (int i = 0; i < kCodeBlock; ++i) {
      code_out[i] = static_cast<std::uint8_t>(code[i]);
      level_out[i] = level[i];
    }
  }

  static float norm_of(const std::int8_t* code, std::size_t n) {
    std::int32_t sum = 0;
    for (std::size_t p = 0; p < n; ++p) sum += code[p] * code[p];
    return std::sqrt(static_cast<float>(sum)) * (1.0f + 1e-6f);
  }

  const HeadScreen::Data& data_;
  std::size_t n_hot_, n_rest_, n_padded_;
  std::vector<float> row_;          // [n_embd]
  std::vector<float> z_;            // [n_hot + n_padded]
  std::vector<std::int8_t> fine_;   // [n_hot + n_padded]
  std::vector<std::int8_t> level_;  // [n_padded]
  std::vector<std::uint8_t> code_;  // [n_padded]
};

/// The largest value that is a number.
void raise(float& maximum, float value) {
  if (value > maximum && value <= std::numeric_limits<float>::max()) maximum = value;
}

void raise_maxima(HeadScreen::Data& maxima, const RowBounds& row) {
  raise(maxima.max_scale, row.scale);
  raise(maxima.max_residual, std::max(row.rest_residual, row.hot_residual));
  raise(maxima.max_rest_norm, row.rest_norm);
  raise(maxima.max_hot_norm, row.hot_norm);
  raise(maxima.max_row_norm, row.row_norm);
}

void code_tile(const HeadWeight& head, HeadScreen::Data& data, RowCoder& coder, std::int64_t tile,
               HeadScreen::Data& maxima) {
  std::uint8_t* codes = data.codes.get() + tile * data.tile_bytes();
  const std::int64_t first = tile * kTileRows;
  const std::int64_t n = std::min<std::int64_t>(kTileRows, data.n_vocab - first);
  if (n < kTileRows) std::memset(codes, 0, static_cast<std::size_t>(data.tile_bytes()));
  for (std::int64_t r = 0; r < n; ++r) {
    const RowBounds row = coder.code(head, first + r);
    coder.store(codes, static_cast<int>(r));
    data.scale[first + r] = row.scale;
    data.rest_residual[first + r] = bf16_up(row.rest_residual);
    data.hot_residual[first + r] = bf16_up(row.hot_residual);
    raise_maxima(maxima, row);
  }
}

void code_rows(const HeadWeight& head, HeadScreen::Data& data, int n_threads) {
  std::atomic<std::int64_t> next{0};
  std::vector<HeadScreen::Data> maxima(n_threads);
  const auto work = [&](int ith) {
    RowCoder coder(data);
    for (std::int64_t tile; (tile = next.fetch_add(kTilesPerChunk)) < data.n_tiles;) {
      const std::int64_t end = std::min(tile + kTilesPerChunk, data.n_tiles);
      for (; tile < end; ++tile) code_tile(head, data, coder, tile, maxima[ith]);
    }
  };
  std::vector<std::jthread> threads;
  for (int ith = 1; ith < n_threads; ++ith) threads.emplace_back(work, ith);
  work(0);
  threads.clear();
  for (const HeadScreen::Data& part : maxima) {
    raise_maxima(data, {part.max_scale, part.max_residual, part.max_residual, part.max_rest_norm,
                        part.max_hot_norm, part.max_row_norm});
  }
}

}  // namespace

void FreeBytes::operator()(std::uint8_t* bytes) const {
  std::free(bytes);
}

ScreenBytes allocate_bytes(std::size_t n_bytes) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  const std::size_t alignment = n_bytes >= kHugePage ? kHugePage : kVectorBytes;
  const std::size_t rounded =
      (std::max<std::size_t>(n_bytes, 1) + alignment - 1) / alignment * alignment;
  void* bytes = std::aligned_alloc(alignment, rounded);
  if (!bytes) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHugePage)
    madvise(bytes, rounded, MADV_HUGEPAGE);  // a wish; nothing depends on it
#endif
  return ScreenBytes(static_cast<std::uint8_t*>(bytes));
}

void load_head_row(const HeadWeight& head, std::int64_t i, float* row) {
  const char* data = static_cast<const char*>(head.data) +
                     static_cast<std::size_t>(i) * ggml_row_size(head.type, head.n_embd);
  switch (head.type) {
    case GGML_TYPE_F32:
      std::memcpy(row, data, static_cast<std::size_t>(head.n_embd) * sizeof(float));
      break;
    case GGML_TYPE_F16:
      ggml_cpu_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t*>(data), row, head.n_embd);
      break;
    case GGML_TYPE_BF16:
      ggml_cpu_bf16_to_fp32(reinterpret_cast<const ggml_bf16_t*>(data), row, head.n_embd);
      break;
    default:
      ggml_get_type_traits(head.type)->to_float(data, row, head.n_embd);
  }
}

HeadScreen::HeadScreen(std::unique_ptr<Data> data) : data_(std::move(data)) {}
HeadScreen::~HeadScreen() = default;

std::size_t HeadScreen::n_bytes() const {
  const auto n_tiles = static_cast<std::size_t>(data_->n_tiles);
  constexpr std::size_t kRowBytes = sizeof(float) + 2 * sizeof(std::uint16_t);
  return n_tiles * (static_cast<std::size_t>(data_->tile_bytes()) + kTileRows * kRowBytes);
}

std::unique_ptr<HeadScreen> HeadScreen::build(const HeadWeight& head, int n_threads) {
  if (!head_product_supported(head.type) || head.n_vocab < 1 || head.n_embd < 1 ||
      head.n_embd > kMaxEmbd) {
    return nullptr;
  }
  ggml_cpu_init();  // fills the tables that ggml's conversions read
  auto data = std::make_unique<Data>();
  data->n_embd = head.n_embd;
  data->n_vocab = head.n_vocab;
  data->n_tiles = (head.n_vocab + kTileRows - 1) / kTileRows;
  data->columns = choose_columns(head);
  data->codebook = fit_codebook(head, data->columns);
  data->n_hot = data->columns.n_hot;
  data->n_rest = head.n_embd - data->n_hot;
  data->codes = allocate_bytes(static_cast<std::size_t>(data->n_tiles * data->tile_bytes()));
  const auto n_rows = static_cast<std::size_t>(data->n_tiles * kTileRows);
  data->scale.assign(n_rows, 0.0f);
  data->rest_residual.assign(n_rows, 0);
  data->hot_residual.assign(n_rows, 0);
  code_rows(head, *data, std::max(1, n_threads));
  return std::unique_ptr<HeadScreen>(new HeadScreen(std::move(data)));
}

}  // namespace modularbase::kernels
