#include "modularbase/io/gguf_parser.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <memory>
#include <random>
#include <string>

#include "modularbase/core/errors.h"
#include "tools/gguf_writer.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

/// Parses a copy of exactly the image's size, so that the address sanitizer sees a read past its
/// end.
GgufContents parse(const Bytes& image) {
  const auto copy = std::make_unique<std::byte[]>(image.size());
  std::copy(image.begin(), image.end(), copy.get());
  return parse_gguf({copy.get(), image.size()}, "test.gguf");
}

std::string error_of(const Bytes& image) {
  try {
    parse(image);
  } catch (const BaseLoadError& error) {
    return error.field + ": " + error.expected + " / " + error.found;
  }
  return "no error";
}

/// The error of the small valid file after `change`.
template <typename Change>
std::string error_after(Change&& change) {
  GgufWriter writer = small_valid_file();
  change(writer);
  return error_of(writer.image());
}

bool starts_with(const std::string& text, const char* start) {
  return text.rfind(start, 0) == 0;
}

}  // namespace

TEST_CASE("valid files of both versions, without tensors, and with another alignment") {
  CHECK(error_after([](GgufWriter&) {}) == "no error");
  CHECK(error_after([](GgufWriter& w) { w.version = 2; }) == "no error");
  CHECK(error_after([](GgufWriter& w) { w.tensors.clear(); }) == "no error");
  CHECK(error_of(GgufWriter{}.image()) == "no error");
  CHECK(error_after([](GgufWriter& w) {
          w.alignment = 64;
          w.add_u32("general.alignment", 64);
        }) == "no error");
}

TEST_CASE("the header's own fields") {
  CHECK(error_of({}) == "magic: 4 bytes at offset 0 / only 0 (the file is truncated)");
  CHECK(error_after([](GgufWriter& w) { w.magic = 0x04034b50; }) ==
        "magic: \"GGUF\" / \"PK\\x03\\x04\" (not a GGUF file)");
  CHECK(error_after([](GgufWriter& w) { w.version = 1; }) == "version: 2 or 3, little-endian / 1");
  CHECK(error_after([](GgufWriter& w) { w.version = 4; }) == "version: 2 or 3, little-endian / 4");
  CHECK(error_after([](GgufWriter& w) { w.version = 0; }) == "version: 2 or 3, little-endian / 0");
  CHECK(error_after([](GgufWriter& w) { w.version = 0x03000000; }) ==
        "version: 2 or 3, little-endian / a big-endian file");
  CHECK(starts_with(error_after([](GgufWriter& w) { w.n_tensors = UINT64_MAX; }),
                    "tensor count: a count of at most "));
  CHECK(starts_with(error_after([](GgufWriter& w) { w.n_entries = std::uint64_t{1} << 40; }),
                    "metadata count: a count of at most "));
}

TEST_CASE("keys") {
  const auto with_key = [](std::string key) {
    return error_after([&](GgufWriter& w) { w.add_u32(key, 1); });
  };
  CHECK(with_key("llama.flag") == "llama.flag: one entry / a second one (metadata entry 10)");
  CHECK(with_key("") == "metadata entry key 10: a key of 1 to 65535 bytes / 0 bytes");
  CHECK(with_key(std::string(65536, 'k')) ==
        "metadata entry key 10: a key of 1 to 65535 bytes / 65536 bytes");
  CHECK(with_key("k\xff") == "metadata entry key 10: valid UTF-8 / k\\xff");
}

TEST_CASE("values") {
  const auto with_entry = [](std::uint32_t type, auto... fields) {
    return error_after([&](GgufWriter& w) {
      Bytes& payload = w.entries.emplace_back(Entry{"k", type, {}}).payload;
      (append(payload, fields), ...);
    });
  };
  CHECK(with_entry(13, 0) == "k type: a GGUF value type (0 to 12) / 13");
  CHECK(with_entry(UINT32_MAX, 0) == "k type: a GGUF value type (0 to 12) / 4294967295");
  CHECK(with_entry(kBool, std::uint8_t{2}) == "k: 0 or 1 (a boolean) / 2");
  CHECK(starts_with(with_entry(kString, UINT64_MAX), "k: a string length of at most "));
  CHECK(with_entry(kArray, std::uint32_t{kArray}, std::uint64_t{0}) ==
        "k element type: a GGUF scalar type / 9 (a nested array)");
  CHECK(with_entry(kArray, std::uint32_t{99}, std::uint64_t{0}) ==
        "k element type: a GGUF scalar type / 99");
  for (const std::uint32_t element : {kU8, kI32, kBool, kString, kU64}) {
    CAPTURE(element);
    CHECK(starts_with(with_entry(kArray, element, std::uint64_t{1} << 62),
                      "k length: a count of at most "));
  }
  CHECK(starts_with(
      with_entry(kArray, std::uint32_t{kString}, std::uint64_t{2}, std::uint64_t{0}, UINT64_MAX),
      "k element 1: a string length of at most "));
  CHECK(with_entry(kArray, std::uint32_t{kBool}, std::uint64_t{2}, std::uint16_t{0x0301}) ==
        "k element 1: 0 or 1 (a boolean) / 3");
}

TEST_CASE("a count may use the whole rest of the file, and no more") {
  const auto with_count = [](std::uint64_t count) {
    GgufWriter writer;
    Bytes& payload = writer.entries.emplace_back(Entry{"k", kArray, {}}).payload;
    append(payload, std::uint32_t{kU8});
    append(payload, count);
    append(payload, std::uint16_t{0});
    return error_of(writer.image());
  };
  CHECK(with_count(2) == "no error");
  CHECK(with_count(3) == "k length: a count of at most 2 (what the rest of the file can hold) / 3");
}

TEST_CASE("alignment") {
  const auto with_alignment = [](std::uint32_t type, auto value) {
    return error_after([&](GgufWriter& w) { w.add("general.alignment", type, value); });
  };
  const std::string wrong = "general.alignment: a power of two from 8 to 1073741824 / ";
  CHECK(with_alignment(kU32, std::uint32_t{0}) == wrong + "0");
  CHECK(with_alignment(kU32, std::uint32_t{48}) == wrong + "48");
  CHECK(with_alignment(kU32, std::uint32_t{4}) == wrong + "4");
  CHECK(with_alignment(kU64, std::uint64_t{1} << 63) == wrong + "9223372036854775808");
  CHECK(with_alignment(kF32, 32.0f) == "general.alignment: an unsigned integer / another type");
}

TEST_CASE("tensor names") {
  const auto with_name = [](std::string name) {
    return error_after([&](GgufWriter& w) { w.tensors[1].name = name; });
  };
  CHECK(with_name("") == "tensor name 1: a name of 1 to 63 bytes / 0 bytes");
  CHECK(with_name(std::string(64, 'n')) == "tensor name 1: a name of 1 to 63 bytes / 64 bytes");
  CHECK(with_name(std::string(63, 'n')) == "no error");
  CHECK(with_name("token_embd.weight") ==
        "tensor token_embd.weight: one entry / a second one (tensor 1)");
  CHECK(with_name("a\xc0") == "tensor name 1: valid UTF-8 without NUL / a\\xc0");
  CHECK(with_name(std::string("a\0b", 3)) == "tensor name 1: valid UTF-8 without NUL / a\\x00b");
}

TEST_CASE("tensor shapes") {
  const std::string tensor = "tensor blk.0.attn_q.weight ";
  const auto with_shape = [](std::vector<std::uint64_t> ne, std::optional<std::uint32_t> n_dims) {
    return error_after([&](GgufWriter& w) {
      w.tensors[1].ne = ne;
      w.tensors[1].n_dims = n_dims;
    });
  };
  CHECK(with_shape({}, {}) == tensor + "n_dims: 1 to 4 / 0");
  CHECK(with_shape({32, 1, 1, 1, 1}, {}) == tensor + "n_dims: 1 to 4 / 5");
  CHECK(with_shape({32}, UINT32_MAX) == tensor + "n_dims: 1 to 4 / 4294967295");
  CHECK(with_shape({32, 0}, {}) == tensor + "dimension 1: at least 1 / 0");
  CHECK(with_shape({UINT64_MAX, 2}, {}) == tensor + "dimension 0: at least 1 / -1");
  CHECK(with_shape({32, std::uint64_t{1} << 60}, {}) ==
        tensor +
            "dimension 1: a number of elements below 2^63 / 1152921504606846976 (the product "
            "overflows)");
  CHECK(with_shape({33, 2}, {}) ==
        tensor + "dimension 0: a multiple of 32 (the block of q8_0) / 33");
  CHECK(error_after([](GgufWriter& w) {
          w.tensors[0].ne = {std::uint64_t{1} << 62};  // times 4 bytes is 2^64
        }) == "tensor token_embd.weight size: a number of bytes below 2^64 / an overflow");
}

TEST_CASE("tensor types") {
  const auto with_type = [](std::uint32_t type) {
    return error_after([&](GgufWriter& w) { w.tensors[1].type = type; });
  };
  const std::string field = "tensor blk.0.attn_q.weight type: ";
  CHECK(with_type(GGML_TYPE_COUNT) == field + "a ggml type below " +
                                          std::to_string(GGML_TYPE_COUNT) + " / " +
                                          std::to_string(GGML_TYPE_COUNT));
  CHECK(with_type(UINT32_MAX) ==
        field + "a ggml type below " + std::to_string(GGML_TYPE_COUNT) + " / 4294967295");
  CHECK(with_type(4) == field + "a ggml type in use / 4 (DEPRECATED)");
  CHECK(starts_with(with_type(31), (field + "a ggml type in use / 31 (").c_str()));
}

TEST_CASE("tensor places") {
  const std::string field = "tensor blk.0.attn_q.weight offset: ";
  const auto with_offset = [](std::uint64_t offset) {
    return error_after([&](GgufWriter& w) { w.tensors[1].offset = offset; });
  };
  CHECK(with_offset(65) == field + "a multiple of 32 / 65");
  CHECK(with_offset(32) ==
        field + "no overlap with other tensors / an overlap with token_embd.weight");
  CHECK(with_offset(0) != "no error");
  const std::string inside = field + "68 bytes inside the 170 bytes of tensor data / ";
  CHECK(with_offset(128) == inside + "128 (the tensor ends past the end of the file)");
  CHECK(with_offset(UINT64_MAX - 31) ==
        inside + "18446744073709551584 (the tensor ends past the end of the file)");
  CHECK(error_after([](GgufWriter& w) { w.tensors[2].data.pop_back(); }) ==
        "tensor output_norm.weight offset: 10 bytes inside the 169 bytes of tensor data / 160 (the "
        "tensor ends past the end of the file)");
}

TEST_CASE("every truncation of a valid file is an error") {
  const Bytes image = small_valid_file().image();
  for (std::size_t n = 0; n < image.size(); ++n) {
    CAPTURE(n);
    CHECK(error_of(Bytes(image.begin(), image.begin() + static_cast<std::ptrdiff_t>(n))) !=
          "no error");
  }
}

TEST_CASE("any damage gives an error or contents that lie inside the file") {
  const Bytes valid = small_valid_file().image();
  std::mt19937_64 random(20240917);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  constexpr std::uint64_t kEdges[] = {
      0, 1, 0x7F, 0x80, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, INT64_MAX, UINT64_MAX, UINT64_MAX - 31};
  int n_opened = 0;
  for (int round = 0; round < 20000; ++round) {
    Bytes image = valid;
    const std::size_t at = below(image.size());
    switch (below(4)) {
      case 0:  // one byte
        image[at] = static_cast<std::byte>(random());
        break;
      case 1:  // one bit
        image[at] ^= static_cast<std::byte>(1u << below(8));
        break;
      case 2: {  // a whole length, count, dimension or offset
        const std::uint64_t edge = kEdges[below(std::size(kEdges))];
        std::memcpy(image.data() + at, &edge, std::min<std::size_t>(8, image.size() - at));
        break;
      }
      default:  // shorter, or longer by bytes from the middle
        if (below(2) == 0) {
          image.resize(at);
        } else {
          image.insert(image.begin() + static_cast<std::ptrdiff_t>(at), valid.begin(),
                       valid.begin() + static_cast<std::ptrdiff_t>(below(64)));
        }
    }
    try {
      for (const GgufTensor& tensor : parse(image).tensors) {
        REQUIRE(tensor.offset <= image.size());
        REQUIRE(tensor.n_bytes <= image.size() - tensor.offset);
      }
      ++n_opened;
    } catch (const BaseLoadError&) {
    }
  }
  CHECK(n_opened > 1000);  // damage inside tensor data, strings and numbers is not an error
  CHECK(n_opened < 19000);
}

TEST_CASE("a vocabulary of 150,000 tokens and merges is read in milliseconds") {
  GgufWriter writer;
  std::vector<std::string> tokens(150000);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = "token" + std::to_string(i);
  writer.add_strings("tokenizer.ggml.tokens", tokens);
  writer.add_strings("tokenizer.ggml.merges", tokens);
  writer.add_array("tokenizer.ggml.token_type", kI32, std::vector<std::int32_t>(tokens.size(), 1));
  const Bytes image = writer.image();
  auto best = std::chrono::nanoseconds::max();
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    parse_gguf(image, "test.gguf");
    best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - start);
  }
  MESSAGE("best of 5: ", std::chrono::duration<double, std::milli>(best).count(), " ms");
  // Some 5 ms when measured; the room is for sanitizers and busy machines. Quadratic code takes
  // minutes.
  CHECK(best < std::chrono::milliseconds(1000));
}
