// Requests under different contexts share the lower layers' KV; what they compute is what they
// would compute alone.
#include <list>

#include "cpp/engine/tiny_engine.h"
#include "modularbase/models/model.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

// Below a tile of rows our kernels give the same bits however the rows are cut into steps.
constexpr int kBitwiseRows = 7;
constexpr KvContext kPackA{.lower = 0, .upper = 1, .from = 0};
constexpr KvContext kPackB{.lower = 0, .upper = 2, .from = 0};
constexpr std::int64_t kSplit = 1;

TinyShape four_layers() {
  TinyShape shape;
  shape.n_layer = 4;
  return shape;
}

struct Logits {
  std::vector<TokenId> ids;
  std::vector<float> values;
  bool operator==(const Logits&) const = default;
};

/// A request under a context, and what each of its steps gave.
struct Request {
  Sequence* sequence;  // null when it has ended
  TicketPtr ticket;
  std::vector<Logits> logits;
  Ids generated;
};

struct Options {
  std::string attention = "fused";
  int n_batch = kBitwiseRows;
  std::int64_t n_blocks = 16;
  std::int64_t split = kSplit;
};

/// What the engine thread does, without the thread: requests are greedy and all have a context.
class ContextEngine {
 public:
  explicit ContextEngine(const Options& options = {})
      : temp_(TinyGguf(four_layers()).writer.image()),
        file_(GgufFile::open(temp_.path())),
        backend_("cpu", 1),
        model_(load_model(file_, backend_, DType::kKeep)),
        cache_(split_groups({4, 2, 32, GGML_TYPE_F16}, options.split, 64), {}, options.n_blocks,
               backend_, true),
        runner_(*model_, backend_, cache_, resolve(options)),
        tiers_(cache_, {}, 4, KeyShift({}, kernels::RopeStyle::kNormal)),
        scheduler_(cache_, tiers_, PackAdmission(nullptr, static_cast<int>(options.split)),
                   {options.n_batch, 8}) {}

  Request& submit(const Ids& prompt, const KvContext& context, std::int64_t max_tokens = 8) {
    auto ticket = std::make_shared<Ticket>();
    auto sequence = std::make_unique<Sequence>(greedy(prompt, max_tokens), ticket, 512);
    sequence->kv_context = context;
    requests_.push_back({sequence.get(), ticket, {}, {}});
    scheduler_.add(std::move(sequence));
    return requests_.back();
  }
  bool step() {
    if (!scheduler_.schedule(plan_)) return false;
    runner_.run(plan_);
    n_rows += plan_.n_rows;
    n_mid_rows += plan_.n_mid_rows;
    n_mixed_steps += plan_.n_rows > 0 && plan_.n_mid_rows > 0 ? 1 : 0;
    const std::vector<Sequence*> planned_mid = scheduler_.planned_mid();
    for (std::size_t i = 0; i < planned_mid.size(); ++i) {
      planned_mid[i]->kv.n_tokens += std::ssize(plan_.mid_spans[i].tokens);
    }
    const std::vector<Sequence*> planned = scheduler_.planned();
    std::size_t n_outputs = 0;
    for (std::size_t i = 0; i < planned.size(); ++i) {
      KvSequence& kv = planned[i]->kv;
      kv.set_valid(kv.n_tokens + std::ssize(plan_.spans[i].tokens));
      if (planned[i]->n_pending() == 0) append(*planned[i], runner_.logits(n_outputs++));
    }
    return true;
  }
  void run() {
    while (step()) {
    }
    CHECK(cache_.n_free_blocks() + cache_.n_cached_blocks() == cache_.n_blocks());
  }
  const Request& run(const Ids& prompt, const KvContext& context, std::int64_t max_tokens = 8) {
    Request& request = submit(prompt, context, max_tokens);
    run();
    return request;
  }
  KvCache& cache() { return cache_; }

  std::int64_t n_rows = 0;
  std::int64_t n_mid_rows = 0;
  std::int64_t n_mixed_steps = 0;

 private:
  static ResolvedOptions resolve(const Options& options) {
    EngineOptions given = tiny_options();
    given.attention = options.attention;
    given.head = "full";  // all logits are there to compare
    return resolve_options(given);
  }
  void append(Sequence& sequence, const LogitsView& view) {
    Request& request = *std::find_if(requests_.begin(), requests_.end(),
                                     [&](const Request& r) { return r.sequence == &sequence; });
    request.logits.push_back(
        {{view.ids.begin(), view.ids.end()}, {view.logits.begin(), view.logits.end()}});
    const auto best = std::max_element(view.logits.begin(), view.logits.end());
    request.generated.push_back(static_cast<TokenId>(best - view.logits.begin()));
    sequence.tokens.push_back(request.generated.back());
    if (std::ssize(request.generated) < sequence.spec.max_tokens) return;
    scheduler_.remove(sequence);
    request.sequence = nullptr;
  }

  TempFile temp_;
  GgufFile file_;
  Backend backend_;
  std::unique_ptr<Model> model_;
  KvCache cache_;
  ModelRunner runner_;
  ContextTiers tiers_;
  Scheduler scheduler_;
  StepPlan plan_;
  std::list<Request> requests_;
};

Request alone(const Ids& prompt, const Options& options = {}) {
  ContextEngine engine(options);
  return engine.run(prompt, {});
}

Ids joined(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

TEST_CASE("a known prompt under another context runs through the upper layers only") {
  const Ids prompt = random_ids(1, 200);
  // ggml's products of several rows sum in another order than those of one.
  for (const Options& options : {Options{}, Options{.attention = "reference", .n_batch = 1}}) {
    CAPTURE(options.attention);
    const Request expected = alone(prompt, options);
    ContextEngine engine(options);
    CHECK(engine.run(prompt, {}).logits == expected.logits);
    const std::int64_t n_before = engine.n_rows;
    CHECK(n_before == 200 + 7);
    CHECK(engine.n_mid_rows == 0);
    const Request& request = engine.run(prompt, kPackA);
    CHECK(request.ticket->result().n_cached == 0);
    CHECK(request.ticket->result().n_cached_lower == 199);
    CHECK(engine.n_mid_rows == 199);
    CHECK(engine.n_rows - n_before == 1 + 7);
    CHECK(request.logits == expected.logits);

    const Request& again = engine.run(prompt, kPackA);
    CHECK(again.ticket->result().n_cached == 199);
    CHECK(again.ticket->result().n_cached_lower == 199);
    CHECK(engine.n_mid_rows == 199);
    CHECK(again.logits == expected.logits);
  }
}

TEST_CASE("each split gives the same; at the last layer there is nothing to run again") {
  const Ids prompt = random_ids(2, 100);
  const Request expected = alone(prompt);
  for (const std::int64_t split : {0, 1, 2, 3}) {
    CAPTURE(split);
    ContextEngine engine({.split = split});
    engine.run(prompt, kPackB);
    const Request& request = engine.run(prompt, kPackA);
    CHECK(request.logits == expected.logits);
    CHECK(request.ticket->result().n_cached_lower == 99);
    CHECK(request.ticket->result().n_cached == (split == 3 ? 99 : 0));
    CHECK(engine.n_mid_rows == (split == 3 ? 0 : 99));
  }
}

TEST_CASE("large chunks of rows that restart agree to rounding") {
  const Ids prompt = random_ids(3, 300);
  const Options options{.n_batch = 512};
  const Request expected = alone(prompt, options);
  ContextEngine engine(options);
  engine.run(prompt, kPackB);
  const Request& request = engine.run(prompt, kPackA);
  CHECK(engine.n_mid_rows == 299);
  float worst = 0.0f;
  for (std::size_t i = 0; i < expected.logits[0].values.size(); ++i) {
    worst = std::max(worst, std::abs(expected.logits[0].values[i] - request.logits[0].values[i]));
  }
  CHECK(worst < kTieGap);
}

TEST_CASE("a context that begins behind a position shares all KV before it") {
  const Ids prompt = random_ids(4, 150);
  const Request expected = alone(prompt);
  ContextEngine engine;
  engine.run(prompt, {});
  const Request& request = engine.run(prompt, {.lower = 0, .upper = 1, .from = 130});
  CHECK(request.ticket->result().n_cached == 130);
  CHECK(request.ticket->result().n_cached_lower == 149);
  CHECK(engine.n_mid_rows == 19);
  CHECK(request.logits == expected.logits);
}

TEST_CASE("a context that reaches below the split shares nothing behind its beginning") {
  const Ids prompt = random_ids(5, 150);
  ContextEngine engine;
  engine.run(prompt, {});
  const Request& request = engine.run(prompt, {.lower = 1, .upper = 1, .from = 70});
  CHECK(request.ticket->result().n_cached == 70);
  CHECK(request.ticket->result().n_cached_lower == 70);
  CHECK(engine.n_mid_rows == 0);
}

TEST_CASE("decoding, restarting and prompt rows in the same steps, each as if alone") {
  const Ids known = random_ids(6, 90);
  const std::vector<Ids> prompts = {random_ids(7, 3), joined(known, random_ids(8, 20)),
                                    random_ids(9, 40), known};
  const std::vector<KvContext> contexts = {{}, kPackA, kPackB, kPackB};
  for (const char* attention : {"fused", "reference"}) {
    CAPTURE(attention);
    // In the reference a row's sums depend on where its sequence lies among the visible positions.
    const bool bitwise = attention == std::string("fused");
    ContextEngine engine({.attention = attention});
    engine.run(known, {});
    std::vector<Request*> requests;
    requests.push_back(&engine.submit(prompts[0], contexts[0], 60));
    engine.step();
    for (std::size_t i = 1; i < prompts.size(); ++i) {
      requests.push_back(&engine.submit(prompts[i], contexts[i]));
    }
    engine.run();
    CHECK(engine.n_mid_rows == 90 + 89);
    CHECK(engine.n_mixed_steps > 20);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      CAPTURE(i);
      const Request expected = alone(prompts[i], {.attention = attention});
      for (std::size_t step = 0; step < expected.logits.size(); ++step) {
        if (bitwise) {
          CHECK(requests[i]->logits[step] == expected.logits[step]);
        } else {
          CHECK(requests[i]->generated[step] == expected.generated[step]);
        }
      }
    }
  }
}

TEST_CASE("who loses its blocks in the middle of restarting goes on with the same answer") {
  const Ids known = random_ids(10, 120);
  const Ids growing = random_ids(11, 60);
  const Request expected = alone(known);
  ContextEngine engine({.n_blocks = 3});
  engine.run(known, {}, 1);
  Request& first = engine.submit(growing, {}, 20);  // takes its second block with 64 tokens,
  Request& second = engine.submit(known, kPackA);   // while this one restarts
  bool was_restarting = false;
  bool was_preempted = false;
  do {
    const std::int64_t n_mid = second.sequence->n_mid_pending();
    const bool holds = !second.sequence->kv.lower.empty();
    was_preempted = was_preempted || (was_restarting && !holds);
    was_restarting = holds && n_mid > 0 && second.sequence->kv.n_tokens > 0;
  } while (second.generated.empty() && engine.step());
  engine.run();
  CHECK(was_preempted);
  CHECK(first.generated.size() == 20);
  CHECK(second.logits == expected.logits);
}
