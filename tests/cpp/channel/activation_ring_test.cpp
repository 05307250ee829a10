#include "modularbase/channel/activation_ring.h"

#include <doctest/doctest.h>
#include <signal.h>

#include <array>
#include <cstring>
#include <thread>

#include "cpp/channel/small_channel.h"

using namespace modularbase;
using namespace modularbase::testing;
using std::chrono::milliseconds;

namespace {

constexpr RingShape kShape{5, TensorType::kF32, 4};

bool push(ActivationProducer& producer, std::uint32_t i) {
  std::array<float, 5> row;
  row.fill(static_cast<float>(i));
  const RecordHeader from{7, i, static_cast<std::int32_t>(i * 3)};
  return producer.push(from, std::as_bytes(std::span(row)));
}

/// A record whose parts all say the same number, or -1.
std::int64_t number_of(std::span<const std::byte> record) {
  RecordHeader from;
  std::array<float, 5> row;
  std::memcpy(&from, record.data(), sizeof from);
  std::memcpy(row.data(), record.data() + sizeof from, sizeof row);
  const auto i = static_cast<std::int64_t>(from.position);
  const bool is_whole = from.sequence == 7 && from.token == i * 3 &&
                        std::all_of(row.begin(), row.end(), [&](float x) { return x == float(i); });
  return is_whole ? i : -1;
}

std::vector<std::int64_t> take(ActivationConsumer& consumer, std::size_t max_records) {
  const auto records = consumer.batch(max_records);
  const std::size_t n_bytes = consumer.shape().record_bytes();
  std::vector<std::int64_t> numbers;
  for (std::size_t at = 0; at < records.size(); at += n_bytes) {
    numbers.push_back(number_of(records.subspan(at, n_bytes)));
  }
  consumer.advance(numbers.size());
  return numbers;
}

using Numbers = std::vector<std::int64_t>;

}  // namespace

TEST_CASE("records come out as they went in, in pieces where the ring ends") {
  const ChannelName name;
  ActivationProducer producer(name, kShape);
  ActivationConsumer consumer(name);
  CHECK(consumer.shape().n_embd == 5);
  CHECK(consumer.shape().record_bytes() == 64);
  CHECK(consumer.n_waiting() == 0);
  CHECK(take(consumer, 9).empty());
  for (const std::uint32_t i : {0, 1, 2}) CHECK(push(producer, i));
  CHECK(take(consumer, 2) == Numbers{0, 1});
  for (const std::uint32_t i : {3, 4, 5}) CHECK(push(producer, i));
  CHECK(consumer.n_waiting() == 4);
  CHECK(take(consumer, 9) == Numbers{2, 3});
  CHECK(take(consumer, 9) == Numbers{4, 5});
  CHECK_THROWS_AS(consumer.advance(1), InvalidRequestError);
}

TEST_CASE("a full ring drops whole records, and counts them") {
  const ChannelName name;
  ActivationProducer producer(name, kShape);
  ActivationConsumer consumer(name);
  for (std::uint32_t i = 0; i < 4; ++i) CHECK(push(producer, i));
  CHECK_FALSE(push(producer, 4));
  CHECK_FALSE(push(producer, 5));
  CHECK(producer.n_dropped() == 2);
  CHECK(consumer.n_dropped() == 2);
  CHECK(take(consumer, 1) == Numbers{0});
  CHECK(push(producer, 6));
  CHECK(take(consumer, 9) == Numbers{1, 2, 3});
  CHECK(take(consumer, 9) == Numbers{6});
}

TEST_CASE("one consumer at a time; the next goes on where the last one stopped") {
  const ChannelName name;
  ActivationProducer producer(name, kShape);
  push(producer, 0);
  push(producer, 1);
  {
    ActivationConsumer first(name);
    CHECK(fault_of([&] { const ActivationConsumer second(name); }) == "consumer");
    take(first, 1);
  }
  const int status = in_child([&] {
    ActivationConsumer killed(name);
    (void)killed.batch(1);
    ::kill(::getpid(), SIGKILL);
  });
  CHECK(WIFSIGNALED(status));
  ActivationConsumer next(name);
  CHECK(take(next, 9) == Numbers{1});
}

TEST_CASE("waiting ends with a record, with the producer, or with the time") {
  const ChannelName name;
  auto producer = std::make_unique<ActivationProducer>(name, kShape);
  ActivationConsumer consumer(name);
  CHECK(consumer.wait(milliseconds(5)) == 0);
  std::thread pusher([&] {
    std::this_thread::sleep_for(milliseconds(10));
    push(*producer, 0);
  });
  CHECK(consumer.wait(std::chrono::minutes(1)) == 1);
  pusher.join();
  producer.reset();
  CHECK_FALSE(name.exists());
  CHECK(take(consumer, 9) == Numbers{0});
  CHECK(consumer.wait(std::chrono::minutes(1)) == 0);
}

TEST_CASE(
    "with both sides at work, what comes out is whole, in order, and all that was not dropped") {
  const ChannelName name;
  constexpr std::uint32_t kPushes = 20000;
  ActivationProducer producer(name, {5, TensorType::kF32, 64});
  ActivationConsumer consumer(name);
  std::thread pusher([&] {
    for (std::uint32_t i = 0; i < kPushes; ++i) push(producer, i);
    producer.close();
  });
  std::int64_t last = -1;
  std::uint64_t n_taken = 0, n_wrong = 0;
  while (consumer.wait(std::chrono::minutes(1)) > 0) {
    for (const std::int64_t number : take(consumer, 10)) {
      n_wrong += number <= last ? 1 : 0;
      last = number;
      ++n_taken;
    }
  }
  pusher.join();
  CHECK(n_wrong == 0);
  CHECK(n_taken + consumer.n_dropped() == kPushes);
}

TEST_CASE("shapes, rows and counters that cannot be are named errors") {
  const ChannelName name;
  const auto invalid = [&](const RingShape& shape) {
    CHECK_THROWS_AS(ActivationProducer(name, shape), InvalidRequestError);
  };
  invalid({0, TensorType::kF32, 4});
  invalid({5, TensorType::kQ8_0, 4});
  invalid({5, TensorType::kF32, 0});
  invalid({5, TensorType::kF32, INT64_MAX});
  ActivationProducer producer(name, {8, TensorType::kF16, 4});
  CHECK_THROWS_AS(producer.push({}, std::vector<std::byte>(17)), InvalidRequestError);
  CHECK(producer.push({}, std::vector<std::byte>(16)));

  const auto with = [&](std::size_t offset, auto value, auto right) {
    name.poke(offset, value);
    const std::string fault = fault_of([&] { const ActivationConsumer consumer(name); });
    name.poke(offset, right);
    return fault;
  };
  using U64 = std::uint64_t;
  CHECK(with(0, kWeightMagic, kRingMagic) == "magic");
  CHECK(with(64, U64{5}, U64{1}) == "counters");
  CHECK(with(128, U64{2}, U64{0}) == "counters");
  CHECK(with(192, U64{128}, U64{256}) == "records offset");
  CHECK(with(192, U64{320}, U64{256}) == "records offset");
  CHECK(with(200, U64{32}, U64{64}) == "record bytes");
  CHECK(with(208, U64{5}, U64{4}) == "records offset");
  CHECK(with(208, U64{0}, U64{4}) == "number of records");
  CHECK(with(216, U64{0}, U64{8}) == "n_embd");
  CHECK(with(224, std::uint32_t{30}, std::uint32_t{1}) == "row type");
  name.poke(128, U64{9});
  CHECK(fault_of([&] { producer.push({}, std::vector<std::byte>(16)); }) == "counters");
}

TEST_CASE("a shrunken or closed ring is an error on both sides") {
  const ChannelName name;
  ActivationProducer producer(name, kShape);
  ActivationConsumer consumer(name);
  push(producer, 0);
  name.shrink(0);
  CHECK(fault_of([&] { push(producer, 1); }) == "size");
  CHECK(fault_of([&] { (void)consumer.batch(1); }) == "size");
  CHECK(fault_of([&] { consumer.advance(1); }) == "size");
  CHECK(fault_of([&] { (void)consumer.n_dropped(); }) == "size");
  producer.close();
  CHECK(fault_of([&] { push(producer, 1); }) == "state");
}
