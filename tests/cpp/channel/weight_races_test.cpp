// A writer that never rests, readers that copy meanwhile, and processes that are killed.
#include <doctest/doctest.h>
#include <signal.h>

#include <thread>

#include "cpp/channel/small_channel.h"

using namespace modularbase;
using namespace modularbase::testing;
using std::chrono::milliseconds;

namespace {

constexpr std::uint64_t kGenerations = 1000;
constexpr std::int64_t kValues = 20000;

std::vector<ChannelTensor> patterned() {
  return {{"a", TensorType::kF32, {kValues}}, {"b", TensorType::kF32, {3, kValues}}};
}

std::span<std::uint32_t> words(std::span<std::byte> bytes) {
  return {reinterpret_cast<std::uint32_t*>(bytes.data()), bytes.size() / 4};
}

/// Word i of generation g is g + i.
void publish_pattern(WeightWriter& writer) {
  const auto next = static_cast<std::uint32_t>(writer.generation() + 1);
  for (const PlacedTensor& tensor : writer.tensors()) {
    const auto out = words(writer.buffer(tensor.name));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = next + static_cast<std::uint32_t>(i);
  }
  writer.publish();
}

bool is_pattern(const WeightReader& reader, std::span<std::byte> payload,
                std::uint64_t generation) {
  for (const PlacedTensor& tensor : reader.tensors()) {
    const auto found = words(payload.subspan(tensor.offset, tensor.n_bytes));
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (found[i] != static_cast<std::uint32_t>(generation + i)) return false;
    }
  }
  return true;
}

struct Reads {
  std::atomic<bool> is_open{false};
  int n_whole = 0;
  int n_torn = 0;   // copies that the reader was told to throw away
  int n_mixed = 0;  // copies that it kept, of more than one generation
};

/// One copy in pieces, the first time so slow that the writer overtakes it.
std::uint64_t read_slowly(const WeightReader& reader, std::span<std::byte> payload, Reads& reads) {
  for (int attempt = 0;; ++attempt) {
    const auto snapshot = reader.begin();
    const std::size_t n_first = payload.size() / 2;
    reader.copy(snapshot, 0, payload.first(n_first));
    if (attempt == 0) std::this_thread::sleep_for(milliseconds(1));
    reader.copy(snapshot, n_first, payload.subspan(n_first));
    if (reader.holds(snapshot)) return snapshot.generation;
    ++reads.n_torn;
  }
}

/// Copies until the last generation, all at once and in pieces by turns.
void read_to_the_end(std::string_view name, Reads& reads) {
  const WeightReader reader(name);
  std::vector<std::byte> payload(reader.payload_bytes());
  reads.is_open = true;
  for (std::uint64_t seen = 0; seen < kGenerations;) {
    const std::uint64_t now = reader.wait(seen, std::chrono::minutes(1));
    for (int turn = 0; turn < 2; ++turn) {
      seen = turn == 0 ? reader.read(payload, WeightReader::Verify::kDigest)
                       : read_slowly(reader, payload, reads);
      ++(seen >= now && is_pattern(reader, payload, seen) ? reads.n_whole : reads.n_mixed);
    }
  }
}

/// A process that makes a channel and publishes patterns until it is killed.
::pid_t start_publisher(std::string_view name) {
  const ::pid_t child = ::fork();
  if (child != 0) return child;
  WeightWriter writer(name, patterned(), "{}");
  while (true) publish_pattern(writer);
}

void kill_and_wait(::pid_t child) {
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

}  // namespace

TEST_CASE("every copy is of one generation, whatever the writer does meanwhile") {
  const ChannelName name;
  WeightWriter writer(name, patterned(), "{}");
  Reads reads[2];
  std::vector<std::thread> readers;
  for (Reads& its : reads) readers.emplace_back([&] { read_to_the_end(name, its); });
  while (!reads[0].is_open || !reads[1].is_open) std::this_thread::yield();
  for (std::uint64_t g = 0; g < kGenerations; ++g) publish_pattern(writer);
  for (std::thread& reader : readers) reader.join();
  for (const Reads& its : reads) {
    CHECK(its.n_whole > 2);
    CHECK(its.n_torn > 0);
    CHECK(its.n_mixed == 0);
  }
}

TEST_CASE("a writer that is killed while it fills a buffer leaves the old generation whole") {
  const ChannelName name;
  std::unique_ptr<WeightReader> reader;
  const int status = in_child([&] {
    WeightWriter writer(name, patterned(), "{}");
    publish_pattern(writer);
    publish_pattern(writer);
    const auto half = writer.buffer("a").first(1000);
    std::fill(half.begin(), half.end(), std::byte{0xee});
    ::kill(::getpid(), SIGKILL);
  });
  REQUIRE(WIFSIGNALED(status));
  reader = std::make_unique<WeightReader>(name);
  CHECK_FALSE(reader->is_live());
  std::vector<std::byte> payload(reader->payload_bytes());
  CHECK(reader->read(payload, WeightReader::Verify::kDigest) == 2);
  CHECK(is_pattern(*reader, payload, 2));
  CHECK(reader->wait(2, std::chrono::minutes(1)) == 2);

  WeightWriter next(name, patterned(), "{}");
  CHECK_FALSE(next.notice().empty());
  publish_pattern(next);
  CHECK(reader->read(payload, WeightReader::Verify::kDigest) == 2);  // its segment stays its own
  CHECK(WeightReader(name).generation() == 1);
}

TEST_CASE("killed anywhere, a writer leaves a whole generation") {
  for (int round = 0; round < 20; ++round) {
    const ChannelName name;
    const ::pid_t child = start_publisher(name);
    std::unique_ptr<WeightReader> reader;
    while (!reader) {
      try {
        reader = std::make_unique<WeightReader>(name);
      } catch (const ChannelError&) {  // not there yet
        std::this_thread::sleep_for(milliseconds(1));
      }
    }
    CHECK(reader->wait(2, std::chrono::minutes(1)) > 2);
    std::this_thread::sleep_for(std::chrono::microseconds(137 * round));
    kill_and_wait(child);
    std::vector<std::byte> payload(reader->payload_bytes());
    const std::uint64_t last = reader->read(payload, WeightReader::Verify::kDigest);
    CHECK(last == reader->generation());
    CHECK(is_pattern(*reader, payload, last));
  }
}

TEST_CASE("a reader that is killed disturbs nobody") {
  const ChannelName name;
  WeightWriter writer(name, patterned(), "{}");
  publish_pattern(writer);
  const ::pid_t child = ::fork();
  if (child == 0) {
    const WeightReader reader(name);
    std::vector<std::byte> payload(reader.payload_bytes());
    while (true) reader.read(payload);
  }
  std::this_thread::sleep_for(milliseconds(20));
  publish_pattern(writer);
  kill_and_wait(child);
  publish_pattern(writer);
  const WeightReader reader(name);
  std::vector<std::byte> payload(reader.payload_bytes());
  CHECK(reader.read(payload, WeightReader::Verify::kDigest) == 3);
  CHECK(name.exists());
}
