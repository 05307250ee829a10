// What steps see comes out of the ring as it is, and never holds the engine up.
#include "modularbase/engine/activation_tap.h"

#include <atomic>
#include <cstring>
#include <map>
#include <set>

#include "cpp/channel/small_channel.h"
#include "cpp/engine/pack_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::int64_t kRoom = 1024;

TapOptions tap_options(const ChannelName& name, int layer, std::int64_t n_records = kRoom) {
  return {std::string(std::string_view(name)), layer, n_records, TensorType::kF32};
}

struct Record {
  RecordHeader from;
  std::vector<float> row;
};

std::vector<Record> take_all(ActivationConsumer& consumer) {
  std::vector<Record> records;
  const auto n_embd = static_cast<std::size_t>(consumer.shape().n_embd);
  while (consumer.n_waiting() > 0) {
    const auto batch = consumer.batch(64);
    const std::size_t n_bytes = consumer.shape().record_bytes();
    for (std::size_t at = 0; at < batch.size(); at += n_bytes) {
      Record record{{}, std::vector<float>(n_embd)};
      std::memcpy(&record.from, batch.data() + at, sizeof record.from);
      std::memcpy(record.row.data(), batch.data() + at + sizeof record.from, n_embd * 4);
      records.push_back(std::move(record));
    }
    consumer.advance(batch.size() / n_bytes);
  }
  return records;
}

Ids tokens_of(const std::vector<Record>& records) {
  Ids ids;
  for (const Record& record : records) ids.push_back(record.from.token);
  return ids;
}

std::vector<float> rows_of(const std::vector<Record>& records) {
  std::vector<float> rows;
  for (const Record& record : records) {
    rows.insert(rows.end(), record.row.begin(), record.row.end());
  }
  return rows;
}

bool counts_up(const std::vector<Record>& records, std::uint32_t first = 0) {
  for (std::size_t i = 0; i < records.size(); ++i) {
    if (records[i].from.position != first + i) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("what enters a layer is what a request for it gives, with token and position") {
  TinyEngine tiny;
  const Ids prompt = random_ids(1, 200);
  for (const int layer : {0, 1}) {
    const auto expected = finished(tiny.engine.submit(hidden_states(prompt, layer))).hidden;
    const ChannelName name;
    const auto tap = tiny.engine.tap(tap_options(name, layer));
    ActivationConsumer consumer(name);
    // Every kind of request goes through the layer, or ends there.
    const std::vector<RequestSpec> specs{hidden_states(prompt, layer), hidden_states(prompt, 3),
                                         scoring(prompt), greedy(prompt, 1)};
    std::set<std::uint64_t> sequences;
    for (const RequestSpec& spec : specs) {
      tiny.engine.forget_prefixes();
      finished(tiny.engine.submit(spec));
      const auto records = take_all(consumer);
      const std::size_t n = spec.kind == RequestKind::kScore ? prompt.size() - 1 : prompt.size();
      REQUIRE(records.size() == n);  // nothing asks for what comes behind a scored text
      CHECK(counts_up(records));
      CHECK(tokens_of(records) == Ids(prompt.begin(), prompt.begin() + std::ptrdiff_t(n)));
      sequences.insert(records[0].from.sequence);
      const auto rows = rows_of(records);
      // Prompts are cut into other batches, whose products round differently.
      float worst = 0.0f;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        worst = std::max(worst, std::abs(rows[i] - expected[i]));
      }
      CHECK(worst < (spec.kind == RequestKind::kHidden ? 1e-9f : 2e-2f));
    }
    CHECK(sequences.size() == specs.size());
    CHECK(tap->n_pushed() == 4 * prompt.size() - 1);
    CHECK(tap->n_dropped() == 0);
    tap->close();
  }
}

TEST_CASE("F16 rows are the rounded F32 ones") {
  TinyEngine tiny;
  const Ids prompt = random_ids(1, 3);
  const auto expected = finished(tiny.engine.submit(hidden_states(prompt, 1))).hidden;
  const ChannelName name;
  TapOptions options = tap_options(name, 1);
  options.row_type = TensorType::kF16;
  const auto tap = tiny.engine.tap(options);
  ActivationConsumer consumer(name);
  finished(tiny.engine.submit(hidden_states(prompt, 1)));
  const auto batch = consumer.batch(3);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::size_t n_embd = TinyShape().n_embd;
    ggml_fp16_t found;
    std::memcpy(&found,
                batch.data() + i / n_embd * consumer.shape().record_bytes() + sizeof(RecordHeader) +
                    i % n_embd * sizeof found,
                sizeof found);
    CHECK(found == ggml_fp32_to_fp16(expected[i]));
  }
}

TEST_CASE("a tap opens at the first site; a step that ends below it gives nothing") {
  EngineOptions options = tiny_options();
  options.first_site = 1;
  TinyEngine tiny(options);
  const ChannelName name;
  const auto tap = tiny.engine.tap(tap_options(name, -1));
  CHECK(tap->layer() == 1);
  finished(tiny.engine.submit(hidden_states(random_ids(1, 9), 0)));
  CHECK(tap->n_pushed() == 0);
  finished(tiny.engine.submit(hidden_states(random_ids(1, 9), 1)));
  CHECK(tap->n_pushed() == 9);
}

TEST_CASE("a known prefix does not come again; rows that restart come where they are computed") {
  PackEngine packs(with_slots(2));
  const GenerationId pack = packs.open(1, {.sites = {1}});
  const Ids prompt = random_ids(1, 100);
  finished(packs.engine.submit(greedy(prompt, 1)));
  const auto run = [&](int layer, const RequestSpec& spec) {
    const ChannelName name;
    const auto tap = packs.engine.tap(tap_options(name, layer));
    ActivationConsumer consumer(name);
    finished(packs.engine.submit(spec));
    auto records = take_all(consumer);
    tap->close();
    return records;
  };
  CHECK(run(1, greedy(prompt, 1)).size() == 1);  // the last row alone
  // For another pack only the layers above the split compute the prompt again.
  auto mid = run(1, with_packs(greedy(prompt, 1), {{pack}}));
  REQUIRE(mid.size() == prompt.size());
  CHECK(counts_up(mid));
  CHECK(tokens_of(mid) == prompt);
  packs.engine.forget_prefixes();
  const auto whole = run(1, with_packs(greedy(prompt, 1), {{pack}}));
  const auto found = rows_of(mid), expected = rows_of(whole);
  float worst = 0.0f;
  for (std::size_t i = 0; i < found.size(); ++i) {
    worst = std::max(worst, std::abs(found[i] - expected[i]));
  }
  CHECK(worst < 2e-2f);  // one rounding of the cache
}

TEST_CASE("requests that run together come with an id each, whole and in order") {
  TinyEngine tiny(threaded());
  const ChannelName name;
  const auto tap = tiny.engine.tap(tap_options(name, 1));
  std::vector<TicketPtr> tickets;
  for (unsigned i = 0; i < 5; ++i) {
    tickets.push_back(tiny.engine.submit(greedy(random_ids(i, 20 + i), 10)));
  }
  std::vector<Ids> expected;
  for (unsigned i = 0; i < 5; ++i) {
    expected.push_back(random_ids(i, 20 + i));
    const Ids ids = ids_of(finished(tickets[i]));
    expected.back().insert(expected.back().end(), ids.begin(),
                           ids.end() - 1);  // the last never ran
  }
  ActivationConsumer consumer(name);
  std::map<std::uint64_t, std::vector<Record>> by_sequence;
  for (Record& record : take_all(consumer)) {
    by_sequence[record.from.sequence].push_back(std::move(record));
  }
  std::vector<Ids> found;
  for (const auto& [id, records] : by_sequence) {
    CHECK(counts_up(records));
    found.push_back(tokens_of(records));
  }
  CHECK(found == expected);  // ids count up in the order of submission
}

TEST_CASE("a full ring drops and counts, and the tokens are the same") {
  TinyEngine tiny;
  const Ids prompt = random_ids(1, 30);
  const Ids expected = ids_of(finished(tiny.engine.submit(greedy(prompt, 20))));
  tiny.engine.forget_prefixes();
  const ChannelName name;
  const auto tap = tiny.engine.tap(tap_options(name, 1, 8));
  CHECK(ids_of(finished(tiny.engine.submit(greedy(prompt, 20)))) == expected);
  CHECK(tap->n_pushed() == 8);
  CHECK(tap->n_dropped() == 30 + 19 - 8);
  CHECK(tap->is_open());
}

TEST_CASE("a ring that somebody shrinks closes the tap; requests go on, and so does another tap") {
  TinyEngine tiny;
  const ChannelName name;
  const auto tap = tiny.engine.tap(tap_options(name, 1));
  name.shrink(0);
  CHECK(finished(tiny.engine.submit(greedy(random_ids(1, 9), 5))).tokens.size() == 5);
  CHECK_FALSE(tap->is_open());
  CHECK(tap->last_error().find("size") != std::string::npos);
  CHECK_FALSE(name.exists());
  const auto next = tiny.engine.tap(tap_options(name, 1));
  finished(tiny.engine.submit(greedy(random_ids(2, 9), 5)));
  CHECK(next->n_pushed() == 9 + 4);
  CHECK(next->last_error().empty());
}

TEST_CASE("taps that cannot be are named errors, and leave no segment") {
  TinyEngine tiny;
  const ChannelName name, other;
  CHECK_THROWS_AS(tiny.engine.tap(tap_options(name, 2)), InvalidRequestError);
  CHECK_THROWS_AS(tiny.engine.tap(tap_options(name, -2)), InvalidRequestError);
  CHECK_THROWS_AS(tiny.engine.tap(tap_options(name, 1, 0)), InvalidRequestError);
  CHECK_THROWS_AS(tiny.engine.tap({"a/b", 1}), InvalidRequestError);
  CHECK_FALSE(name.exists());
  const auto tap = tiny.engine.tap(tap_options(name, 1));
  CHECK(fault_of([&] { (void)tiny.engine.tap(tap_options(name, 1)); }) == "owner");
  CHECK_THROWS_AS(tiny.engine.tap(tap_options(other, 1)), InvalidRequestError);
  CHECK_FALSE(other.exists());
  CHECK(tap->is_open());
  tiny.engine.close();
  CHECK_FALSE(tap->is_open());
  CHECK(tap->last_error().empty());
  CHECK_FALSE(name.exists());
  CHECK_THROWS_AS(tiny.engine.tap(tap_options(other, 1)), CancelledError);
  CHECK_FALSE(other.exists());
}

TEST_CASE("taps open and close, and are asked, while callers generate") {
  TinyEngine tiny(threaded());
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> n_seen{0}, n_wrong{0};
  {
    std::vector<std::jthread> callers;
    for (unsigned caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&, caller] {
        while (!stop) {
          const TicketPtr ticket = tiny.engine.submit(greedy(random_ids(caller, 9), 8));
          if (!ticket->wait_finished(kPatience)) ++n_wrong;
        }
      });
    }
    for (int round = 0; round < 20; ++round) {
      const ChannelName name;
      const auto tap = tiny.engine.tap(tap_options(name, round % 2, 16));
      ActivationConsumer consumer(name);
      while (tap->n_pushed() + tap->n_dropped() < 10) {
        n_wrong += tap->last_error().empty() ? 0 : 1;
        std::this_thread::yield();
      }
      n_seen += consumer.n_waiting();
      tap->close();
    }
    stop = true;
  }
  CHECK(n_wrong == 0);
  CHECK(n_seen > 0);
}
