// Packs out of a weight channel: what lies in the slot is what a file of the same pack gives.
#include "modularbase/engine/pack_reader.h"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>

#include "cpp/engine/published_pack.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

TinyPack small(ggml_type adapter = GGML_TYPE_F16, ggml_type expert = GGML_TYPE_Q4_0) {
  TinyPack shape;
  shape.n_expert = 2;
  shape.sites = {1, 2};
  shape.adapter_type = adapter;
  shape.expert_type = expert;
  return shape;
}

bool is_matrix(const testing::Tensor& tensor) {
  return tensor.name.find("expert") != std::string::npos || tensor.name.ends_with(".in.weight") ||
         tensor.name.ends_with(".out.weight");
}

Bytes in_type(std::span<const float> values, ggml_type type, std::uint64_t n_per_row) {
  const auto n = static_cast<std::int64_t>(n_per_row);
  const auto n_rows = static_cast<std::int64_t>(values.size()) / n;
  Bytes bytes(ggml_row_size(type, n) * static_cast<std::size_t>(n_rows));
  ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_rows, n, nullptr);
  return bytes;
}

std::vector<float> floats_of(const testing::Tensor& tensor) {
  const auto type = static_cast<ggml_type>(tensor.type);
  std::vector<float> values(tensor.data.size() / ggml_type_size(type) *
                            static_cast<std::size_t>(ggml_blck_size(type)));
  if (type == GGML_TYPE_F32) {
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  } else {
    ggml_get_type_traits(type)->to_float(tensor.data.data(), values.data(),
                                         static_cast<std::int64_t>(values.size()));
  }
  return values;
}

/// The pack with its matrices in another type, rounded from what they are.
GgufWriter with_matrices(GgufWriter pack, ggml_type adapter, ggml_type expert) {
  for (testing::Tensor& tensor : pack.tensors) {
    if (!is_matrix(tensor)) continue;
    const ggml_type type = tensor.name.find("expert") == std::string::npos ? adapter : expert;
    tensor.data = in_type(floats_of(tensor), type, tensor.ne[0]);
    tensor.type = static_cast<std::uint32_t>(type);
  }
  return pack;
}

std::string fault_of_reading(const GgufWriter& published, const ChannelPack& pack) {
  const ChannelName name;
  WeightWriter writer(name, channel_tensors(published), "{}");
  publish(writer, published);
  SmallResidency small;
  const WeightReader channel(name);
  return fault_of([&] { PackReader(channel, pack, small.packs.base()).read_into(small.packs); });
}

}  // namespace

TEST_CASE("a published pack lies in its slot as one from a file does") {
  for (const ggml_type adapter : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
    for (const ggml_type expert : {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
      CAPTURE(ggml_type_name(adapter));
      CAPTURE(ggml_type_name(expert));
      const GgufWriter file = tiny_pack_file(small(adapter, expert));
      const ChannelName name;
      WeightWriter writer(name, channel_tensors(file), "{}");
      SmallResidency small;
      const WeightReader channel(name);
      PackReader reader(channel, channel_pack(file), small.packs.base());
      CHECK(reader.read_into(small.packs).number == 0);
      publish(writer, file);
      const PublishedPack published = reader.read_into(small.packs);
      CHECK(published.number == 1);
      CHECK(small.slot(published.id) == small.slot(file));
      const PackStatus status = small.packs.status(published.id);
      CHECK(status.name == "published");
      CHECK(status.path == name.path());
      CHECK(status.digest.starts_with("xxh64:"));
    }
  }
}

TEST_CASE("plain numbers are rounded to the types of the slot, as ggml rounds them") {
  // Experts are rounded apart from adapters, so each type once is enough.
  const std::pair<ggml_type, ggml_type> kinds[] = {{GGML_TYPE_Q4_K, GGML_TYPE_F16},
                                                   {GGML_TYPE_Q4_0, GGML_TYPE_BF16},
                                                   {GGML_TYPE_Q8_0, GGML_TYPE_F32},
                                                   {GGML_TYPE_F16, GGML_TYPE_F16}};
  for (const ggml_type source : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) {
    const GgufWriter published =
        with_matrices(tiny_pack_file(small(GGML_TYPE_F32, GGML_TYPE_F16)), source, source);
    for (const auto& [expert, adapter] : kinds) {
      CAPTURE(ggml_type_name(source));
      CAPTURE(ggml_type_name(expert));
      CAPTURE(ggml_type_name(adapter));
      const GgufWriter file = with_matrices(published, adapter, expert);
      const ChannelName name;
      WeightWriter writer(name, channel_tensors(published), "{}");
      publish(writer, published);
      SmallResidency small;
      const WeightReader channel(name);
      PackReader reader(channel, channel_pack(file), small.packs.base());
      CHECK(small.slot(reader.read_into(small.packs).id) == small.slot(file));
    }
  }
}

TEST_CASE("equal content is one generation; other numbers, or another scale, are another") {
  GgufWriter file = tiny_pack_file(small());
  const ChannelName name;
  WeightWriter writer(name, channel_tensors(file), "{}");
  SmallResidency small;
  const WeightReader channel(name);
  ChannelPack pack = channel_pack(file);
  PackReader reader(channel, pack, small.packs.base());
  publish(writer, file);
  const PublishedPack first = reader.read_into(small.packs);
  publish(writer, file);
  const PublishedPack again = reader.read_into(small.packs);
  CHECK(again.number == 2);
  CHECK(again.id == first.id);
  pack.scale *= 2;
  CHECK(PackReader(channel, pack, small.packs.base()).read_into(small.packs).id != first.id);
  file.tensors.back().data[0] ^= std::byte{1};
  publish(writer, file);
  CHECK(reader.read_into(small.packs).id != first.id);
}

TEST_CASE("a published pack can be loaded again after it was evicted") {
  const GgufWriter file = tiny_pack_file(small());
  const ChannelName name;
  SmallResidency small;
  GenerationId id = 0;
  {
    WeightWriter writer(name, channel_tensors(file), "{}");
    publish(writer, file);
    const WeightReader channel(name);
    id = PackReader(channel, channel_pack(file), small.packs.base()).read_into(small.packs).id;
  }
  const Bytes before = small.slot(id);
  small.packs.evict(id);
  CHECK(small.slot(id) == before);
  CHECK(small.packs.status(id).n_loads == 2);
}

TEST_CASE("tensors that are not those of the pack are refused by name") {
  const GgufWriter file = tiny_pack_file(small());
  const ChannelPack pack = channel_pack(file);
  const auto refused = [&](auto spoil) {
    GgufWriter spoiled = file;
    spoil(spoiled);
    return fault_of_reading(spoiled, pack);
  };
  CHECK(refused([](GgufWriter&) {}) == "no error");
  CHECK(refused([](GgufWriter& f) { f.remove_tensor("site.1.out.weight"); }) ==
        "site.1.out.weight");
  CHECK(refused([](GgufWriter& f) { f.tensor("site.0.in.weight").ne = {128, 128}; }) ==
        "site.0.in.weight shape");
  CHECK(refused([](GgufWriter& f) { f.tensor("site.1.router.weight").name = "other"; }) ==
        "site.1.router.weight");
  CHECK(refused([](GgufWriter& f) { f.add_f32_tensor("other", {1}, std::vector{1.0f}); }) ==
        "other");
  CHECK(refused([](GgufWriter& f) { f.remove_tensor("site.0.token_gate.bias"); }) ==
        "site.0.token_gate.bias");
  CHECK(refused([](GgufWriter& f) {
          f.tensor("site.0.norm.weight").type = GGML_TYPE_F16;
          f.tensor("site.0.norm.weight").data.resize(512);
        }) == "site.0.norm.weight type");
  CHECK(refused([](GgufWriter& f) {
          testing::Tensor& experts = f.tensor("site.0.expert_up.weight");
          experts.data = in_type(floats_of(experts), GGML_TYPE_Q8_0, 256);
          experts.type = GGML_TYPE_Q8_0;
        }) == "site.0.expert_up.weight type");
}

TEST_CASE("a pack for another base is refused by name") {
  const GgufWriter file = tiny_pack_file(small());
  const ChannelName name;
  const WeightWriter writer(name, channel_tensors(file), "{}");
  const WeightReader channel(name);
  CHECK_THROWS_AS(PackReader(channel, channel_pack(file), {.n_embd = 32, .n_layer = 4}),
                  PackIncompatibleError);
  CHECK_THROWS_AS(PackReader(channel, channel_pack(file), {.n_embd = 64, .n_layer = 2}),
                  PackIncompatibleError);
}

TEST_CASE("numbers that are not finite, or do not fit, are refused by their tensor's name") {
  const GgufWriter file = tiny_pack_file(small());
  const ChannelPack pack = channel_pack(file);
  const GgufWriter plain = with_matrices(file, GGML_TYPE_F32, GGML_TYPE_F32);
  const auto fault = [&](const GgufWriter& from, const std::string& tensor, float value) {
    GgufWriter spoiled = from;
    std::memcpy(spoiled.tensor(tensor).data.data() + 64, &value, sizeof value);
    return fault_of_reading(spoiled, pack);
  };
  for (const char* name : {"site.1.norm.weight", "site.0.in.weight", "site.1.expert_down.weight"}) {
    CHECK(fault(plain, name, NAN) == name);
    CHECK(fault(plain, name, -INFINITY) == name);
    CHECK(fault(plain, name, 1.0f) == "no error");
  }
  CHECK(fault(plain, "site.0.out.weight", 1e6f) == "site.0.out.weight");  // of F16
  CHECK(fault(file, "site.0.in.weight", -NAN) == "site.0.in.weight");     // two F16 that are NaN
}

TEST_CASE("a buffer that was changed after it was published is refused") {
  const GgufWriter file = tiny_pack_file(small());
  const ChannelName name;
  WeightWriter writer(name, channel_tensors(file), "{}");
  const auto published = writer.buffer("site.0.norm.weight");
  publish(writer, file);
  published[3] ^= std::byte{1};
  SmallResidency small;
  const WeightReader channel(name);
  PackReader reader(channel, channel_pack(file), small.packs.base());
  CHECK(fault_of([&] { reader.read_into(small.packs); }) == "digest of generation 1");
  publish(writer, file);
  CHECK(reader.read_into(small.packs).number == 2);
}

TEST_CASE("a writer that never stops is read whole, or not at all") {
  GgufWriter file = tiny_pack_file(small(GGML_TYPE_F32));
  const ChannelName name;
  WeightWriter writer(name, channel_tensors(file), "{}");
  const auto publish_marked = [&](float mark) {
    for (const char* tensor : {"site.0.in.weight", "site.1.out.weight"}) {
      std::memcpy(file.tensor(tensor).data.data(), &mark, sizeof mark);
    }
    publish(writer, file);
  };
  publish_marked(0);
  SmallResidency small;
  const WeightReader channel(name);
  PackReader reader(channel, channel_pack(file), small.packs.base());
  std::atomic<bool> stop{false};
  std::jthread publisher([&] {
    for (float mark = 1; !stop; ++mark) {
      publish_marked(mark);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  std::uint64_t last = 0;
  for (int i = 0; i < 10; ++i) {
    const PublishedPack read = reader.read_into(small.packs);
    CHECK(read.number >= last);
    last = read.number;
    const Bytes slot = small.slot(read.id);
    const SlotLayout layout(channel_pack(tiny_pack_file(::small(GGML_TYPE_F32))).geometry);
    CHECK(std::memcmp(&slot[layout.sites[0].in], &slot[layout.sites[1].out], sizeof(float)) == 0);
    small.packs.retire(read.id);
  }
  stop = true;
}
