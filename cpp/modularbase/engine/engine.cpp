#include "modularbase/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "modularbase/core/errors.h"
#include "modularbase/engine/engine_errand.h"
#include "modularbase/engine/kv_room.h"
#include "modularbase/models/rope_frequencies.h"

namespace modularbase {
namespace {

constexpr std::int64_t kMaxDefaultCtx = 32768;
constexpr std::int64_t kBlock = kernels::kBlockTokens;

double micros(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

std::int64_t resolve_n_ctx(std::int64_t requested, std::int64_t n_ctx_train) {
  if (requested == 0) return std::min(n_ctx_train, kMaxDefaultCtx);
  if (requested < 1 || requested > n_ctx_train) {
    throw InvalidRequestError("n_ctx",
                              "1.." + std::to_string(n_ctx_train) + " (the trained context)",
                              std::to_string(requested));
  }
  return requested;
}

int resolve_first_site(int requested, std::int64_t n_layer) {
  if (requested == -1) return static_cast<int>(n_layer / 2);
  if (requested < 0 || requested >= n_layer) {
    throw InvalidRequestError("first_site",
                              "0.." + std::to_string(n_layer - 1) + ", or -1 for the middle layer",
                              std::to_string(requested));
  }
  return requested;
}

std::int64_t count_parameters(const GgufFile& file) {
  std::int64_t n = 0;
  for (const GgufTensor& tensor : file.tensors())
    n += tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3];
  return n;
}

EngineInfo describe(const GgufFile& file, const Model& model, const Backend& backend) {
  const ModelConfig& c = model.config;
  EngineInfo info;
  info.path = file.path();
  info.family = c.family;
  info.device = backend.name();
  info.weight_type = ggml_type_name(model.layers[0].feed_forward.up.weight->type);
  info.n_threads = backend.n_threads();
  info.n_vocab = c.n_vocab;
  info.n_ctx_train = c.n_ctx_train;
  info.n_embd = c.n_embd;
  info.n_layer = c.n_layer;
  info.n_head = c.n_head;
  info.n_head_kv = c.n_head_kv;
  info.head_dim = c.head_dim;
  info.n_ff = c.n_ff;
  info.n_params = count_parameters(file);
  info.weight_bytes = model.memory.n_bytes;
  info.mapped_bytes = model.memory.n_bytes_mapped;
  return info;
}

}  // namespace

Engine::Engine(const std::string& path, const EngineOptions& options)
    : options_(resolve_options(options)),
      file_(GgufFile::open(path)),
      backend_(options.device, options_.n_threads) {
  const auto started_at = Clock::now();
  model_ = load_model(file_, backend_, parse_dtype(options.dtype));
  info_ = describe(file_, *model_, backend_);
  info_.n_ctx = resolve_n_ctx(options.n_ctx, info_.n_ctx_train);
  const bool has_packs = options_.pack_budget_bytes > 0;
  const int first_site = resolve_first_site(options.first_site, info_.n_layer);
  info_.first_site = has_packs ? first_site : -1;
  const KvTiers tiers = resolve_tiers(options_, *model_, backend_);
  info_.kv_in_rows = tiers.in_rows;
  const KvGeometry geometry{.n_layer = info_.n_layer,
                            .n_head_kv = info_.n_head_kv,
                            .head_dim = info_.head_dim,
                            .type = options_.kv_type};
  const KvGroups groups = has_packs ? split_groups(geometry, first_site, info_.n_embd)
                                    : KvGroups{geometry, std::nullopt};
  info_.n_kv_blocks = resolve_n_blocks(options.kv_budget_bytes, groups.block_bytes(), info_.n_ctx);
  info_.kv_bytes = static_cast<std::size_t>(info_.n_kv_blocks) * groups.block_bytes();
  info_.n_kv_tokens = n_kv_tokens(groups, tiers, info_.n_kv_blocks, options_);
  cache_ =
      std::make_unique<KvCache>(groups, tiers, info_.n_kv_blocks, backend_, options_.prefix_cache);
  runner_ = std::make_unique<ModelRunner>(*model_, backend_, *cache_, options_);
  info_.screen_bytes = runner_->screen_bytes();
  if (has_packs) {
    packs_ = std::make_unique<PackResidency>(
        options_.pack_budget_bytes, PackBase{info_.n_embd, info_.n_layer}, backend_, [this] {
          const std::lock_guard lock(mutex_);
          packs_changed_ = true;
          wake_.notify_all();
        });
  }
  tiers_ = std::make_unique<ContextTiers>(
      *cache_, options_.tiers, info_.n_head,
      KeyShift(rope_frequencies(*model_), model_->config.rope_style));
  scheduler_ =
      std::make_unique<Scheduler>(*cache_, *tiers_, PackAdmission(packs_.get(), first_site),
                                  SchedulerLimits{options_.n_batch, options_.n_sequences});
  publish_stats();
  info_.load_us = micros(Clock::now() - started_at);
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() {
  close();
}

void Engine::close() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  // Several callers may close at once; each returns when the thread has ended.
  std::call_once(joined_, [&] {
    if (thread_.joinable()) thread_.join();
    if (tap_) tap_->close();
  });
}

int Engine::tap_layer(const TapOptions& options) const {
  if (options.layer == -1) return resolve_first_site(info_.first_site, info_.n_layer);
  if (options.layer < 0 || options.layer >= info_.n_layer) {
    throw InvalidRequestError("layer", "0.." + std::to_string(info_.n_layer - 1),
                              std::to_string(options.layer));
  }
  return options.layer;
}

std::shared_ptr<ActivationTap> Engine::tap(const TapOptions& options) {
  // Made before the lock is taken: reserving its memory may take a while.
  auto tap = std::make_shared<ActivationTap>(options, tap_layer(options), info_.n_embd);
  const std::lock_guard lock(mutex_);
  if (stopping_) throw CancelledError("the engine is closed");
  if (tap_ && tap_->is_open()) {
    throw InvalidRequestError("tap", "one at a time", tap_->path() + " is open");
  }
  tap_ = tap;
  return tap;
}

void Engine::forget_prefixes() {
  const std::lock_guard lock(mutex_);
  forget_prefixes_ = true;
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

PackResidency& Engine::packs() {
  if (!packs_) throw InvalidRequestError("packs", "an engine with pack_budget_bytes > 0", "0");
  return *packs_;
}

std::int64_t Engine::switch_packs(const std::string& name, GenerationId to) {
  packs();  // there are any
  return on_engine_thread([&] { return scheduler_->switch_packs({name, to}); });
}

void Engine::check_packs(const RequestSpec& spec) const {
  for (const PackChoice& choice : spec.pack_choices) {
    if (!choice.packs.empty() && !packs_) {
      throw InvalidRequestError("packs", "none: the engine has pack_budget_bytes 0", "some");
    }
    if (choice.packs.size() > kMaxPacksPerRow) {
      throw InvalidRequestError("packs", "at most " + std::to_string(kMaxPacksPerRow),
                                std::to_string(choice.packs.size()));
    }
    float total = 0.0f;
    std::set<GenerationId> seen;
    for (const PackUse& use : choice.packs) {
      if (!std::isfinite(use.weight) || use.weight < 0.0f) {
        throw InvalidRequestError("packs weight", "a number from 0 on", std::to_string(use.weight));
      }
      total += use.weight;
      if (!seen.insert(use.generation).second) {
        throw InvalidRequestError("packs", "each pack once", "one twice");
      }
    }
    if (!std::isfinite(total)) {
      throw InvalidRequestError("packs weight", "a finite sum", std::to_string(total));
    }
    const bool is_blend = spec.policy == kernels::MergePolicy::kBlend;
    const bool is_fused = backend_.is_cpu() && options_.sites == KernelPath::kFused;
    if (choice.packs.size() > 1 && !is_blend && !is_fused) {
      throw InvalidRequestError("policy", "blend (others need the fused sites)", "another");
    }
  }
  if (spec.activation == Activation::kFromHere && spec.kind != RequestKind::kGenerate) {
    throw InvalidRequestError("activation", "prompt (there is nothing behind the prompt)",
                              "from_here");
  }
}

void Engine::check(const RequestSpec& spec) const {
  check_packs(spec);
  check_context(spec);
  const auto n_prompt = static_cast<std::int64_t>(spec.prompt.size());
  const std::int64_t n_least = spec.kind == RequestKind::kScore ? 2 : 1;
  if (n_prompt < n_least) {
    throw InvalidRequestError("prompt", "at least " + std::to_string(n_least) + " token(s)",
                              std::to_string(n_prompt));
  }
  for (const TokenId token : spec.prompt) {
    if (token < 0 || token >= info_.n_vocab) {
      throw InvalidRequestError("prompt", "token ids in 0.." + std::to_string(info_.n_vocab - 1),
                                std::to_string(token));
    }
  }
  std::int64_t n_total = n_prompt;
  if (spec.kind == RequestKind::kGenerate) {
    if (spec.max_tokens == 0 || spec.max_tokens < -1) {
      throw InvalidRequestError("max_tokens", "at least 1, or -1 for no limit",
                                std::to_string(spec.max_tokens));
    }
    if (spec.n_draft < 0 || spec.n_draft > 64) {
      throw InvalidRequestError("n_draft", "0..64", std::to_string(spec.n_draft));
    }
    if (spec.n_logprobs < -1 || spec.n_logprobs > info_.n_vocab) {
      throw InvalidRequestError("n_logprobs", "-1.." + std::to_string(info_.n_vocab),
                                std::to_string(spec.n_logprobs));
    }
    n_total += std::max<std::int64_t>(1, spec.max_tokens);
  }
  if (spec.kind == RequestKind::kHidden && (spec.layer < 0 || spec.layer > info_.n_layer + 1)) {
    throw InvalidRequestError("layer", "0.." + std::to_string(info_.n_layer + 1),
                              std::to_string(spec.layer));
  }
  const bool has_states = spec.kind == RequestKind::kHidden && spec.layer > info_.n_layer;
  if (spec.n_rows_beside < 0 || (spec.n_rows_beside > 0 && !has_states)) {
    throw InvalidRequestError("n_rows_beside", "0, or rows of states after the output norm",
                              std::to_string(spec.n_rows_beside));
  }
  if (n_total > info_.n_ctx) throw ContextLengthError(n_total, info_.n_ctx);
  check_memory(spec, n_total);
}

void Engine::check_memory(const RequestSpec& spec, std::int64_t n_total) const {
  const bool grows = spec.kind == RequestKind::kGenerate;
  const std::int64_t n_room = grows ? info_.n_kv_tokens : info_.n_kv_blocks * kBlock;
  const std::int64_t n_blocks = (n_total + 1 + kBlock - 1) / kBlock;
  if (n_blocks * kBlock > n_room) {
    const auto n_bytes = static_cast<std::int64_t>(info_.kv_bytes);
    throw KvCacheFullError(n_bytes / (n_room / kBlock) * n_blocks, n_bytes);
  }
}

void Engine::check_context(const RequestSpec& spec) const {
  if (spec.tiers.size() > spec.prompt.size()) {
    throw InvalidRequestError("tiers", "at most one a token of the prompt",
                              std::to_string(spec.tiers.size()));
  }
  const bool leaves_layers_out = spec.kind == RequestKind::kHidden && spec.layer <= info_.n_layer;
  if (spec.conversation != 0 && leaves_layers_out) {
    throw InvalidRequestError("layer", "all layers, where a conversation keeps what they give",
                              std::to_string(spec.layer));
  }
}

TicketPtr Engine::submit(RequestSpec spec) {
  check(spec);
  auto ticket = std::make_shared<Ticket>();
  const auto n_prompt = static_cast<std::int64_t>(spec.prompt.size());
  ticket->update([&](RequestResult& result) { result.n_prompt = n_prompt; });
  auto sequence = std::make_unique<Sequence>(std::move(spec), ticket, info_.n_vocab);
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw CancelledError("the engine is closed");
    sequence->id = n_submitted_++;
    inbox_.push_back(std::move(sequence));
  }
  wake_.notify_all();
  return ticket;
}

}  // namespace modularbase
