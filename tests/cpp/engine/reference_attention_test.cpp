// The fused attention against the graph of ggml's ops: the same blocks of all tiers, several
// sequences in one batch, what is seen and what the query windows get.
#include "modularbase/models/reference_attention.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "modularbase/engine/reference_inputs.h"
#include "modularbase/kv/tile_reader.h"

using namespace modularbase;
using kernels::kBlockTokens;

namespace {

// Values near 1. The fused kernel keeps 16 bits of queries and weights in 4-bit tiles (1e-4), both
// sum some hundred terms in F32, and a key of the step itself may fall to the other side in F16.
constexpr double kTolerance = 1e-3;
constexpr int kLayers = 4;  // wide keys; narrow ones; details of all heads; of every other one

struct Shape {
  std::int64_t n_head, n_head_kv, head_dim;
  ggml_type exact = GGML_TYPE_F16;
};

/// Rows of one sequence: so many behind a past of n_past positions and an exact tail.
struct Rows {
  std::int64_t n_past, n_tail, n_rows;
  std::vector<kernels::KvTier> segments;
};

ModelConfig config_of(const Shape& shape) {
  ModelConfig config;
  config.n_head = shape.n_head;
  config.n_head_kv = shape.n_head_kv;
  config.head_dim = shape.head_dim;
  config.rope_dim = shape.head_dim;
  config.n_ctx_train = 4096;
  config.rope_freq_base = 10000.0f;
  return config;
}

RopeTable rope_table(const ModelConfig& config, const std::vector<StepSpan>& spans) {
  RopeTable table;
  for (const StepSpan& span : spans) {
    for (std::int64_t row = 0; row < std::ssize(span.tokens); ++row) {
      for (std::int64_t i = 0; i < config.rope_dim / 2; ++i) {
        const double exponent =
            -2.0 * static_cast<double>(i) / static_cast<double>(config.rope_dim);
        const double angle = static_cast<double>(span.pos0 + row) * std::pow(10000.0, exponent);
        table.cos.push_back(static_cast<float>(std::cos(angle)));
        table.sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
  return table;
}

std::vector<KvHead> detail_heads(std::int64_t n_head_kv) {
  std::vector<KvHead> heads;
  for (int head = 0; head < static_cast<int>(n_head_kv); ++head) {
    heads.push_back({2, head});
    if (head % 2 == 1) heads.push_back({3, head});
  }
  return heads;
}

/// A cache with sequences in it; two with the same seed hold the same numbers, in either order of
/// their 4-bit tiles.
class Context {
 public:
  Context(const Shape& shape, bool in_rows, const std::vector<Rows>& batch, unsigned seed)
      : config_(config_of(shape)),
        backend_("cpu", 2),
        cache_({{.n_layer = kLayers,
                 .n_head_kv = shape.n_head_kv,
                 .head_dim = shape.head_dim,
                 .type = shape.exact},
                std::nullopt},
               {.has_important = true,
                .has_redundant = true,
                .wide_keys = {true, false, false, false},
                .detail_heads = detail_heads(shape.n_head_kv),
                .in_rows = in_rows},
               64, backend_, false),
        inputs_(cache_.lower()),
        random_(seed) {
    sequences_.reserve(batch.size());
    for (const Rows& rows : batch) add(rows);
    inputs_.clear();
    for (const StepSpan& span : spans_) inputs_.add(span, false);
    rope_ = rope_table(config_, spans_);
    inputs_.finish(rope_, config_.n_head);
    qkv_.resize(static_cast<std::size_t>(width() * inputs_.n_rows()));
    for (float& value : qkv_) value = normal();
  }

  ReferenceShape shape() const { return reference_shape(inputs_); }

  /// [head_dim * n_head, n_rows] of a layer.
  std::vector<float> attend(bool is_fused, int layer) {
    Graph graph(512);
    GraphBuilder g(graph);
    const ReferenceInputs inputs = add_reference_inputs(g, cache_.lower(), config_.n_head,
                                                        inputs_.n_rows(), reference_shape(inputs_));
    FusedAttention fused(config_, {inputs_.fused()});
    ReferenceAttention reference(config_, nullptr, {inputs});
    AttentionPath& path = is_fused ? static_cast<AttentionPath&>(fused) : reference;
    Tensor qkv = g.input("qkv", GGML_TYPE_F32, width(), inputs_.n_rows());
    Tensor out =
        g.output(path.attend(g, path.store(g, qkv, nullptr, nullptr, layer), layer), "out");
    graph.allocate(backend_);
    set_input(qkv, qkv_);
    if (!is_fused) fill_reference(inputs, inputs_);
    graph.compute(backend_);
    if (!is_fused) keep_queries(reference.queries(), inputs_);
    std::vector<float> values(static_cast<std::size_t>(ggml_nelements(out)));
    ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
    return values;
  }

  /// Queries and log masses of the rows that were kept, of all sequences.
  std::vector<float> kept_queries(int layer) const {
    std::vector<float> values;
    for (const StepSpan& span : spans_) {
      if (span.window) append_window(span, layer, values);
    }
    return values;
  }

 private:
  void append_window(const StepSpan& span, int layer, std::vector<float>& values) const {
    const kernels::QueryWindow& window = span.window->lower();
    const std::int64_t n = config_.n_head * config_.head_dim;
    for (const auto row : span.window->rows(span.pos0, span.pos0 + std::ssize(span.tokens))) {
      const std::int64_t at = std::int64_t{layer} * window.n_rows + row;
      for (std::int64_t i = at * n; i < (at + 1) * n; ++i) {
        values.push_back(ggml_fp16_to_fp32(window.queries[i]));
      }
      values.insert(values.end(), window.log_mass + at * config_.n_head,
                    window.log_mass + (at + 1) * config_.n_head);
    }
  }

  float normal() { return normal_(random_); }
  std::int64_t width() const { return (config_.n_head + 2 * config_.n_head_kv) * config_.head_dim; }

  std::uint64_t any_mask() {
    const std::uint64_t bits = static_cast<std::uint64_t>(random_()) << 32 | random_();
    const std::uint64_t masks[] = {~std::uint64_t{0}, bits, bits & 0xff, std::uint64_t{1} << 63, 0};
    return masks[random_() % std::size(masks)];
  }

  void fill(kernels::KvTier memory, BlockId block) {
    std::vector<float> rows(static_cast<std::size_t>(kBlockTokens * config_.head_dim));
    for (int layer = 0; layer < kLayers; ++layer) {
      const kernels::KvLayer kv = cache_.lower().layer(layer);
      const kernels::KvTierLayer& tier = kv.tiers[memory];
      for (std::int64_t head = 0; head < kv.n_head_kv; ++head) {
        if (!tier.has(head)) continue;
        const auto write = [&](kernels::TileFormat format, std::byte* tile) {
          for (float& value : rows) value = 0.3f + normal();
          kernels::write_tile(format, rows.data(), kv.head_dim, tile);
        };
        write(tier.k_format, kv.key_tile(memory, block, head));
        write(tier.v_format, kv.value_tile(memory, block, head));
        float* log_weights = kv.log_weights(memory, block, head);
        for (int i = 0; log_weights && i < kBlockTokens; ++i) log_weights[i] = 2 * normal();
      }
    }
  }

  void add(const Rows& rows) {
    KvSequence& kv = sequences_.emplace_back();
    kv.past.n_positions = rows.n_past;
    kv.lower.assign(static_cast<std::size_t>(rows.n_past / kBlockTokens), kNoBlock);
    for (const kernels::KvTier memory : rows.segments) {
      PastBlock block{memory, Tier::kImportant, kNoBlock, kNoBlock, any_mask(), {}};
      REQUIRE(cache_.allocate(block));
      fill(memory, block.lower);
      kv.past.blocks.push_back(std::move(block));
    }
    const std::int64_t pos0 = rows.n_past + rows.n_tail;
    REQUIRE(cache_.reserve(kv, pos0 + rows.n_rows));
    for (const BlockId block : kv.lower) {
      if (block != kNoBlock) fill(kernels::kExactTier, block);
    }
    windows_.push_back(std::make_unique<SequenceWindow>(cache_, config_.n_head));
    tokens_.push_back(std::vector<TokenId>(static_cast<std::size_t>(rows.n_rows)));
    spans_.push_back({.sequence = &kv,
                      .sequence_id = spans_.size(),
                      .pos0 = pos0,
                      .tokens = tokens_.back(),
                      .window = spans_.size() % 2 == 0 ? windows_.back().get() : nullptr});
  }

  ModelConfig config_;
  Backend backend_;
  KvCache cache_;
  AttentionInputs inputs_;
  RopeTable rope_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<KvSequence> sequences_;
  std::vector<std::vector<TokenId>> tokens_;
  std::vector<std::unique_ptr<SequenceWindow>> windows_;
  std::vector<StepSpan> spans_;
  std::vector<float> qkv_;
};

double worst(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  REQUIRE(!found.empty());
  double result = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) return INFINITY;
    result = std::max(result, std::fabs(static_cast<double>(found[i]) - expected[i]));
  }
  return result;
}

constexpr auto kExact = kernels::kExactTier;
constexpr auto kImportant = kernels::kImportantTier;
constexpr auto kSlots = kernels::kRedundantTier;
constexpr auto kDetail = kernels::kDetailTier;

// Of all tiers; more rows than a window keeps; nothing compacted; no tail; decoding.
const std::vector<Rows> kBatch = {
    {256, 70, 5, {kExact, kImportant, kSlots, kDetail, kImportant, kExact, kSlots, kDetail}},
    {64, 0, 20, {kDetail, kSlots}},
    {0, 0, 140, {}},
    {128, 3, 1, {kImportant, kImportant, kImportant}},
    {192, 129, 1, {kSlots, kExact}}};

}  // namespace

TEST_CASE("ggml's ops agree with the fused attention over blocks of all tiers") {
  unsigned seed = 0;
  for (const Shape& shape : {Shape{6, 2, 64}, Shape{4, 4, 32, GGML_TYPE_BF16},
                             Shape{8, 2, 96, GGML_TYPE_Q8_0}, Shape{3, 1, 128}}) {
    CAPTURE(shape.head_dim);
    ++seed;
    Context fused(shape, false, kBatch, seed);
    Context reference(shape, true, kBatch, seed);
    for (int layer = 0; layer < kLayers; ++layer) {
      CAPTURE(layer);
      // Of Q8_0, the kernel does not round keys and values of the rows themselves.
      const double tolerance = shape.exact == GGML_TYPE_Q8_0 ? 5e-2 : kTolerance;
      CHECK(worst(reference.attend(false, layer), fused.attend(true, layer)) < tolerance);
      // A query is an F16 of up to 4: its last place is 2e-3.
      CHECK(worst(reference.kept_queries(layer), fused.kept_queries(layer)) <
            std::max(tolerance, 3e-3));
    }
  }
}

TEST_CASE("without a compacted past the graph has no trace of tiers") {
  const std::vector<Rows> batch = {{0, 70, 5, {}}, {0, 0, 9, {}}};
  Context fused({6, 2, 64}, false, batch, 9);
  Context reference({6, 2, 64}, true, batch, 9);
  CHECK(worst(reference.attend(false, 1), fused.attend(true, 1)) < kTolerance);
}

TEST_CASE("steps that are nearly alike have graphs of one shape") {
  const Shape shape{6, 2, 64};
  const auto shape_of = [&](std::int64_t n_tail, std::size_t n_important) {
    const std::vector<kernels::KvTier> segments(n_important, kImportant);
    Context context(shape, true, {{1024, n_tail, 1, segments}}, 1);
    return context.shape();
  };
  CHECK(shape_of(70, 9) == shape_of(250, 12));
  CHECK(!(shape_of(70, 9) == shape_of(70, 13)));
  CHECK(!(shape_of(70, 9) == shape_of(300, 9)));
}
