#include "modularbase/kv/compaction.h"

#include <algorithm>
#include <utility>

namespace modularbase {

using kernels::kBlockTokens;

namespace {

PastPlan with_details(PastPlan plan, const KvCache& cache) {
  plan.has_details = cache.has_details();
  return plan;
}

}  // namespace

Compaction::Compaction(KvCache& cache, const KvSequence& sequence, PastPlan plan,
                       FitQueries queries, std::int64_t n_head, KeyShift* shift)
    : cache_(cache),
      sequence_(sequence),
      plan_(with_details(std::move(plan), cache)),
      queries_(std::move(queries)),
      shift_(shift),
      located_(locate(sequence, plan_)),
      fitter_(plan_, located_, queries_, n_head) {
  const auto add = [&](const KvGroup& group, bool is_upper) {
    const KvGeometry& geometry = group.memory().geometry();
    for (int i = 0; i < geometry.n_layer; ++i) {
      layers_.push_back(
          {group.layer(static_cast<int>(geometry.first_layer) + i), is_upper, i, layers_.size()});
    }
  };
  add(cache.lower(), false);
  if (cache.upper()) add(*cache.upper(), true);
  const auto n = static_cast<std::size_t>(layers_[0].kv.head_dim * kBlockTokens);
  keys_.resize(n);
  values_.resize(n);
  log_weights_.resize(kBlockTokens);
}

Compaction::~Compaction() {
  for (std::size_t i = 0; i < n_allocated_; ++i) cache_.release(past_.blocks[i].block);
}

Compaction::Progress Compaction::work() {
  const std::size_t n_layer = layers_.size();
  const std::size_t n_fits = plan_.spans.empty() ? 0 : n_layer;
  if (next_layer_ < n_fits) {
    const LayerView& layer = layers_[next_layer_++];
    cache_.download(sequence_, plan_.n_positions, static_cast<int>(layer.order));
    fitter_.fit(layer);
    cache_.forget_copies();
    return Progress::kMore;
  }
  if (!is_decided_) {
    decide();
    if (!allocate()) return Progress::kShort;
  }
  if (next_layer_ < n_fits + n_layer) build(layers_[next_layer_++ - n_fits]);
  return next_layer_ < n_fits + n_layer ? Progress::kMore : Progress::kReady;
}

void Compaction::decide() {
  std::vector<std::int32_t> n_slots;
  for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
    const float error = fitter_.error(i);
    const bool is_good = error <= plan_.max_error;
    if (!is_good) refused_.push_back({plan_.spans[i], error});
    n_slots.push_back(is_good ? plan_.spans[i].n_slots : -1);
  }
  is_decided_ = true;
  past_ = arrange(sequence_, located_, plan_, n_slots);
}

bool Compaction::allocate() {
  for (NewPastBlock& made : past_.blocks) {
    if (!cache_.allocate(made.block)) return false;
    ++n_allocated_;
  }
  return true;
}

void Compaction::build(const LayerView& layer) {
  const auto model_layer = static_cast<int>(layer.order);
  cache_.download(sequence_, plan_.n_positions, model_layer);
  TileReader reader(layer.kv);
  for (std::int64_t head = 0; head < layer.kv.n_head_kv; ++head) {
    for (const NewPastBlock& made : past_.blocks) {
      if (layer.kv.tiers[made.block.memory].has(head)) fill(made, layer, head, reader);
    }
  }
  for (const NewPastBlock& made : past_.blocks) cache_.upload(made.block, model_layer);
  cache_.forget_copies();
}

// What a block does not use is zero: nothing reads it, but rounding looks at it.
void Compaction::fill(const NewPastBlock& made, const LayerView& layer, std::int64_t head,
                      TileReader& reader) {
  std::ranges::fill(keys_, 0.0f);
  std::ranges::fill(values_, 0.0f);
  std::ranges::fill(log_weights_, 0.0f);
  for (std::size_t i = 0; i < made.sources.size(); ++i) {
    load(made.sources[i], layer, head, reader, i);
  }
  const BlockId block = layer.is_upper ? made.block.upper : made.block.lower;
  const kernels::KvTier memory = made.block.memory;
  const kernels::KvTierLayer& tier = layer.kv.tiers[memory];
  kernels::write_tile(tier.k_format, keys_.data(), layer.kv.head_dim,
                      layer.kv.key_tile(memory, block, head));
  kernels::write_tile(tier.v_format, values_.data(), layer.kv.head_dim,
                      layer.kv.value_tile(memory, block, head));
  if (float* log_weights = layer.kv.log_weights(memory, block, head)) {
    std::ranges::copy(log_weights_, log_weights);
  }
}

void Compaction::load(const PastSource& source, const LayerView& layer, std::int64_t head,
                      TileReader& reader, std::size_t at) {
  const auto head_dim = static_cast<std::size_t>(layer.kv.head_dim);
  const TokenPlace& place = layer.is_upper ? source.upper : source.lower;
  const float* key = nullptr;
  const float* value = nullptr;
  if (source.span >= 0) {
    const auto index = static_cast<std::size_t>(place.index);
    const kernels::SlotFit& fit =
        fitter_.fitted(static_cast<std::size_t>(source.span), layer, head);
    key = fit.keys.data() + index * head_dim;
    value = fit.values.data() + index * head_dim;
    log_weights_[at] = fit.log_weights[index];
  } else {
    key = reader.key(place, head);
    value = reader.value(place, head);
    if (place.memory == kernels::kRedundantTier) log_weights_[at] = reader.log_weight(place, head);
  }
  std::copy_n(key, head_dim, keys_.data() + at * head_dim);
  if (!plan_.moves.empty()) {
    const std::int32_t to = plan_.moves[static_cast<std::size_t>(source.position)];
    shift_->apply(keys_.data() + at * head_dim, to - source.position);
  }
  std::copy_n(value, head_dim, values_.data() + at * head_dim);
}

void Compaction::commit(KvSequence& sequence) {
  KvPast& past = sequence.past;
  for (const PastBlock& block : past_.kept) cache_.retain(block);
  for (const PastBlock& block : past.blocks) cache_.release(block);
  for (auto p = past.n_positions; p < plan_.n_positions; p += kBlockTokens) {
    cache_.forget_block(sequence, p / kBlockTokens);
  }
  past.n_positions = plan_.n_positions_left();
  past.tiers = std::move(past_.tiers);
  past.spans = std::move(past_.spans);
  past.blocks = std::move(past_.kept);
  for (NewPastBlock& made : past_.blocks) past.blocks.push_back(std::move(made.block));
  n_allocated_ = 0;
  // Whole blocks: there is nothing to be copied, so this cannot fail.
  if (!plan_.moves.empty()) cache_.truncate(sequence, past.n_positions);
}

}  // namespace modularbase
