// Many callers at once. What these tests say beyond their checks is said by the thread sanitizer.
#include <atomic>

#include "cpp/engine/tiny_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr int kCallers = 4;
constexpr int kRequestsEach = 6;

/// A stream as callers read it: token by token until the end.
Ids read_stream(Ticket& ticket) {
  Ids ids;
  for (;;) {
    const bool ended = ticket.finished();
    for (const GeneratedToken& token : ticket.wait_tokens(ids.size(), std::chrono::seconds(1))) {
      ids.push_back(token.id);
    }
    if (ended) return ids;
  }
}

RequestSpec request_of(int caller, int i) {
  return greedy(
      random_ids(static_cast<unsigned>(10 * caller + i), 5 + 23 * static_cast<unsigned>(i)), 20);
}

/// What the callers' threads saw; doctest's assertions stay in the main thread.
struct Seen {
  std::atomic<int> n_same{0};
  std::atomic<int> n_cancelled{0};
  std::atomic<int> n_other{0};
};

void call(Engine& engine, int caller, const std::vector<Alone>& alone, Seen& seen) {
  for (int i = 0; i < kRequestsEach; ++i) {
    const TicketPtr ticket = engine.submit(request_of(caller, i));
    const bool cancels = i % 3 == 2;
    std::jthread canceller;
    if (cancels) canceller = std::jthread([ticket] { ticket->cancel(); });
    const Ids ids = read_stream(*ticket);
    const auto reason = ticket->result().finish_reason;
    if (cancels && reason == FinishReason::kCancelled) {
      ++seen.n_cancelled;
    } else if (same_tokens(ids, alone[static_cast<std::size_t>(caller * kRequestsEach + i)])) {
      ++seen.n_same;
    } else {
      ++seen.n_other;
    }
  }
}

/// Reads everything a monitor would, until told to stop; counts what cannot be.
void watch(Engine& engine, const std::atomic<bool>& stop, std::atomic<int>& n_wrong) {
  const std::int64_t n_blocks = engine.info().n_kv_blocks;
  std::int64_t n_steps = 0;
  for (int i = 0; !stop; ++i) {
    const EngineStats stats = engine.stats();
    n_wrong += stats.n_steps < n_steps || stats.n_rows < stats.n_steps;
    n_wrong += stats.n_free_blocks < 0 || stats.n_free_blocks > n_blocks;
    n_wrong += stats.n_cached_blocks + stats.n_free_blocks > n_blocks;
    n_steps = stats.n_steps;
    if (i % 50 == 0) engine.forget_prefixes();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

TEST_CASE("callers stream, cancel and watch at once, with too little KV memory for all") {
  std::vector<Alone> alone;
  {
    TinyEngine tiny;
    for (int caller = 0; caller < kCallers; ++caller) {
      for (int i = 0; i < kRequestsEach; ++i) {
        alone.push_back(run_alone(tiny.engine, request_of(caller, i)));
      }
    }
  }
  EngineOptions options = threaded(with_blocks(6));
  options.n_batch = 64;
  TinyEngine tiny(options);
  Seen seen;
  std::atomic<bool> stop{false};
  std::atomic<int> n_wrong{0};
  {
    std::jthread watcher([&] { watch(tiny.engine, stop, n_wrong); });
    std::vector<std::jthread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&, caller] { call(tiny.engine, caller, alone, seen); });
    }
    callers.clear();
    stop = true;
  }
  CHECK(n_wrong == 0);
  CHECK(seen.n_other == 0);
  CHECK(seen.n_same >= kCallers * kRequestsEach * 2 / 3);  // all that were not cancelled
  CHECK(seen.n_same + seen.n_cancelled == kCallers * kRequestsEach);
  const EngineStats stats = tiny.engine.stats();
  CHECK(stats.n_running == 0);
  CHECK(stats.n_waiting == 0);
  CHECK(stats.n_free_blocks + stats.n_cached_blocks == tiny.engine.info().n_kv_blocks);
}

TEST_CASE("a request of each kind is cancelled while it waits and while it runs") {
  EngineOptions options = threaded();
  options.n_sequences = 1;
  options.n_batch = 1;  // 15,000 steps a prompt: it cannot end before it is cancelled
  TinyEngine tiny(options, {.n_ctx = 16384});
  const Ids prompt = random_ids(1, 15000);
  const std::vector<RequestSpec> specs = {greedy(prompt, 20), scoring(prompt),
                                          hidden_states(prompt, 3)};
  for (std::size_t running = 0; running < specs.size(); ++running) {
    std::vector<TicketPtr> tickets;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      tickets.push_back(tiny.engine.submit(specs[(running + i) % specs.size()]));
    }
    while (tiny.engine.stats().n_running == 0) std::this_thread::yield();
    for (const TicketPtr& ticket : tickets) ticket->cancel();
    for (const TicketPtr& ticket : tickets) {
      CHECK(finished(ticket).finish_reason == FinishReason::kCancelled);
    }
    CHECK(tiny.engine.stats().n_running == 0);
    CHECK(tiny.engine.stats().n_waiting == 0);
  }
}

TEST_CASE("an engine destroyed while requests run ends them all, and wakes who waits") {
  std::vector<TicketPtr> tickets;
  std::vector<std::jthread> waiting;
  std::atomic<int> n_woken{0};
  {
    TinyEngine tiny(threaded());
    for (unsigned i = 0; i < 8; ++i) {
      tickets.push_back(tiny.engine.submit(greedy(random_ids(i, 10), 500)));
      waiting.emplace_back([&, ticket = tickets.back()] {
        if (ticket->wait_finished(kPatience)) ++n_woken;
      });
    }
    tickets[0]->wait_tokens(0, kPatience);
  }
  waiting.clear();
  CHECK(n_woken == 8);
  for (const TicketPtr& ticket : tickets) {
    CHECK(ticket->result().finish_reason == FinishReason::kCancelled);
  }
}

TEST_CASE("callers that submit while the engine closes get an answer or an error, never nothing") {
  TinyEngine tiny;
  std::atomic<int> n_refused{0};
  std::atomic<int> n_ended{0};
  {
    std::vector<std::jthread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&, caller] {
        for (;;) {
          try {
            const TicketPtr ticket = tiny.engine.submit(greedy({caller}, 3));
            if (ticket->wait_finished(kPatience)) ++n_ended;
          } catch (const CancelledError&) {
            ++n_refused;
            return;
          }
        }
      });
    }
    while (n_ended < 10) std::this_thread::yield();
    tiny.engine.close();
  }
  CHECK(n_refused == kCallers);
}
