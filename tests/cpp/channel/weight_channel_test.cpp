#include "modularbase/channel/weight_channel.h"

#include <doctest/doctest.h>

#include <cstring>
#include <thread>

#include "cpp/channel/small_channel.h"
#include "modularbase/channel/checksum.h"

using namespace modularbase;
using namespace modularbase::testing;
using std::chrono::milliseconds;

namespace {

std::string invalid_field(std::vector<ChannelTensor> tensors, std::string_view json = "{}") {
  const ChannelName name;
  try {
    const WeightWriter writer(name, tensors, json);
  } catch (const InvalidRequestError& error) {
    return error.field;
  }
  return "no error";
}

std::string fault_of_opening(std::string_view name) {
  return fault_of([&] { const WeightReader reader(name); });
}

}  // namespace

TEST_CASE("a reader sees what was described, and each generation that is published") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), R"({"pack": "python_code"})");
  const WeightReader reader(name);
  CHECK(reader.json() == R"({"pack": "python_code"})");
  REQUIRE(reader.tensors().size() == 3);
  const PlacedTensor& norm = reader.tensors()[1];
  CHECK(norm.name == "site.0.norm.weight");
  CHECK(norm.type == TensorType::kF32);
  CHECK(norm.ne == std::vector<std::int64_t>{5});
  CHECK(norm.offset == 384);
  CHECK(norm.n_bytes == 20);
  CHECK(reader.tensors()[2].n_bytes == 4 * 144);
  CHECK(reader.payload_bytes() == 384 + 64 + 576);

  std::vector<std::byte> copy(reader.payload_bytes());
  CHECK(reader.generation() == 0);
  CHECK(reader.read(copy) == 0);
  for (int g = 1; g <= 3; ++g) {
    fill(writer, static_cast<std::byte>(g));
    CHECK(reader.generation() == static_cast<std::uint64_t>(g - 1));
    CHECK(writer.publish() == static_cast<std::uint64_t>(g));
    CHECK(reader.read(copy, WeightReader::Verify::kDigest) == static_cast<std::uint64_t>(g));
    CHECK(copy[norm.offset + 19] == static_cast<std::byte>(g));
    CHECK(copy[norm.offset + 20] == std::byte{0});
  }
}

TEST_CASE("the buffers take turns, so that writing never touches what is published") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "");
  const WeightReader reader(name);
  std::vector<std::byte> copy(reader.payload_bytes());
  fill(writer, std::byte{1});
  const std::byte* const first = writer.buffer("site.0.in.weight").data();
  writer.publish();
  fill(writer, std::byte{2});
  CHECK(writer.buffer("site.0.in.weight").data() != first);
  CHECK(reader.read(copy, WeightReader::Verify::kDigest) == 1);
  CHECK(copy[0] == std::byte{1});
  writer.publish();
  CHECK(writer.buffer("site.0.in.weight").data() == first);
}

TEST_CASE("a copy in pieces holds until the writer begins on its buffer again") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "");
  const WeightReader reader(name);
  writer.publish();
  const auto first = reader.begin();
  CHECK(first.generation == 1);
  fill(writer, std::byte{2});
  CHECK(reader.holds(first));
  writer.publish();
  CHECK(reader.holds(first));
  writer.buffer("site.0.norm.weight");
  CHECK_FALSE(reader.holds(first));
  CHECK(reader.holds(reader.begin()));
  std::vector<std::byte> piece(65);
  CHECK_THROWS_AS(reader.copy(first, reader.payload_bytes() - 64, piece), InvalidRequestError);
}

TEST_CASE("whoever writes into a published buffer is found out by its digest") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "");
  const WeightReader reader(name);
  const auto kept = writer.buffer("site.0.in.weight");
  writer.publish();
  kept[3] = std::byte{1};
  std::vector<std::byte> copy(reader.payload_bytes());
  CHECK(reader.read(copy) == 1);
  CHECK(fault_of([&] { reader.read(copy, WeightReader::Verify::kDigest); }) ==
        "digest of generation 1");
}

TEST_CASE("waiting ends with a generation, with the writer, or with the time") {
  const ChannelName name;
  auto writer = std::make_unique<WeightWriter>(name, small_tensors(), "");
  const WeightReader reader(name);
  const auto begin = std::chrono::steady_clock::now();
  CHECK(reader.wait(0, milliseconds(30)) == 0);
  CHECK(std::chrono::steady_clock::now() - begin >= milliseconds(30));
  std::thread publisher([&] {
    std::this_thread::sleep_for(milliseconds(20));
    writer->publish();
  });
  CHECK(reader.wait(0, std::chrono::minutes(1)) == 1);
  publisher.join();
  std::thread closer([&] {
    std::this_thread::sleep_for(milliseconds(20));
    writer.reset();
  });
  CHECK(reader.wait(1, std::chrono::minutes(1)) == 1);
  closer.join();
  CHECK_FALSE(reader.is_live());
  std::vector<std::byte> copy(reader.payload_bytes());
  CHECK(reader.read(copy, WeightReader::Verify::kDigest) == 1);
}

TEST_CASE("spans outlive the writer for whoever keeps the mapping") {
  const ChannelName name;
  auto writer = std::make_unique<WeightWriter>(name, small_tensors(), "");
  const auto mapping = writer->mapping();
  const auto bytes = writer->buffer("site.0.in.weight");
  writer.reset();
  CHECK_FALSE(name.exists());
  bytes[0] = std::byte{1};
}

TEST_CASE("a closed or shrunken channel takes no more") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "");
  const WeightReader reader(name);
  std::vector<std::byte> copy(reader.payload_bytes());
  writer.publish();
  name.shrink(4096 + 100);
  CHECK(fault_of([&] { reader.read(copy); }) == "size");
  CHECK(fault_of([&] { (void)reader.generation(); }) == "size");
  CHECK(fault_of([&] { writer.publish(); }) == "size");
  CHECK(fault_of([&] { writer.buffer("site.0.norm.weight"); }) == "size");
  name.shrink(0);
  CHECK(fault_of([&] { reader.wait(1, milliseconds(5)); }) == "size");
  writer.close();
  writer.close();
  CHECK(fault_of([&] { writer.publish(); }) == "state");
}

TEST_CASE("descriptions that cannot be are refused") {
  const std::vector<std::int64_t> ne{4};
  CHECK(invalid_field({}) == "tensors");
  CHECK(invalid_field({{"", TensorType::kF32, ne}}) == "tensor : name");
  CHECK(invalid_field({{std::string(64, 'a'), TensorType::kF32, ne}}).ends_with(": name"));
  CHECK(invalid_field({{"\xff", TensorType::kF32, ne}}).ends_with(": name"));
  CHECK(invalid_field({{"a", TensorType::kF32, ne}, {"a", TensorType::kF16, ne}}) ==
        "tensor a: name");
  CHECK(invalid_field({{"a", static_cast<TensorType>(3), ne}}) == "tensor a: type");
  CHECK(invalid_field({{"a", TensorType::kF32, {}}}) == "tensor a: number of dimensions");
  CHECK(invalid_field({{"a", TensorType::kF32, {1, 1, 1, 1, 1}}}) ==
        "tensor a: number of dimensions");
  CHECK(invalid_field({{"a", TensorType::kF32, {4, 0}}}) == "tensor a: shape");
  CHECK(invalid_field({{"a", TensorType::kF32, {INT64_MAX, 3}}}) == "tensor a: shape");
  CHECK(invalid_field({{"a", TensorType::kQ8_0, {33}}}) == "tensor a: ne[0]");
  CHECK(invalid_field({{"a", TensorType::kF32, ne}}, "\xff") == "JSON");
  CHECK(invalid_field({{"a", TensorType::kF32, ne}}, std::string(kMaxJsonBytes + 1, ' ')) ==
        "JSON");
  CHECK(invalid_field({{std::string(63, 'a'), TensorType::kF32, {1, 1, 1, 1}}}) == "no error");

  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "");
  CHECK_THROWS_AS(writer.buffer("other"), InvalidRequestError);
  const WeightReader reader(name);
  std::vector<std::byte> copy(reader.payload_bytes() - 1);
  CHECK_THROWS_AS(reader.read(copy), InvalidRequestError);
}

TEST_CASE("headers and directories that another process got wrong are named errors") {
  const ChannelName name;
  WeightWriter writer(name, small_tensors(), "{}");
  std::vector<std::byte> right(1024);
  const int fd = name.open();
  REQUIRE(::pread(fd, right.data(), right.size(), 0) == 1024);
  ::close(fd);
  const auto with = [&](std::size_t offset, auto value) {
    name.poke(offset, value);
    const std::string fault = fault_of_opening(name);
    std::memcpy(&value, right.data() + offset, sizeof value);
    name.poke(offset, value);
    return fault;
  };
  const auto n = [](std::uint64_t value) { return value; };
  CHECK(with(128, n(8)) == "JSON offset");
  CHECK(with(128, n(UINT64_MAX - 63)) == "JSON offset");
  CHECK(with(136, n(1) << 40) == "JSON bytes");
  CHECK(with(144, n(1) << 40) == "directory offset");
  CHECK(with(152, n(0)) == "number of tensors");
  CHECK(with(152, n(1) << 60) == "number of tensors");
  CHECK(with(160, n(1) << 30) == "payload offset");
  CHECK(with(160, n(448)) == "tensor 2 site.0.expert_gate.weight: offset");
  CHECK(with(168, n(4097)) == "payload offset");
  CHECK(with(168, n(8192)) == "payload offsets");
  const std::size_t second = 256 + 128;
  CHECK(with(second, 'x') == "no error");
  CHECK(with(second, '\0') == "tensor 1 : name");
  CHECK(with(second, '\xff').ends_with(": name"));
  CHECK(with(second + 64, std::uint32_t{3}) == "tensor 1 site.0.norm.weight: type");
  CHECK(with(second + 68, std::uint32_t{5}).ends_with(": number of dimensions"));
  CHECK(with(second + 72, n(6)).ends_with(": bytes"));
  CHECK(with(second + 72, n(0)).ends_with(": shape"));
  CHECK(with(second + 72, UINT64_MAX).ends_with(": shape"));
  CHECK(with(second + 104, n(385)).ends_with(": offset"));
  CHECK(with(second + 104, n(320)).ends_with(": offset"));
  CHECK(with(second + 104, UINT64_MAX - 63).ends_with(": offset"));
  CHECK(with(second + 112, n(24)).ends_with(": bytes"));
  for (std::size_t i = 0; i < 64; ++i) name.poke(second + i, right[256 + i]);
  CHECK(fault_of_opening(name) == "tensor 1 site.0.in.weight: name");
}
