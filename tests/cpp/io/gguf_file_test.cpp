#include "modularbase/io/gguf_file.h"

#include <doctest/doctest.h>

#include <cstring>
#include <utility>

#include "modularbase/core/errors.h"
#include "tools/gguf_writer.h"
#include "tools/temp_file.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

GgufFile open_small_valid_file() {
  const TempFile temp(small_valid_file().image());
  return GgufFile::open(temp.path());  // the mapping outlives the name
}

template <typename Read>
std::string error_of(Read&& read) {
  try {
    read();
  } catch (const BaseLoadError& error) {
    return error.field + ": " + error.expected + " / " + error.found;
  }
  return "no error";
}

template <typename T>
const std::vector<T>& array(const GgufFile& file, std::string_view key) {
  return std::get<std::vector<T>>(std::get<GgufArray>(*file.find(key)));
}

}  // namespace

TEST_CASE("metadata is read with integers and floats widened") {
  const GgufFile file = open_small_valid_file();
  CHECK(file.metadata().size() == 10);
  CHECK(file.required_string("general.architecture") == "llama");
  CHECK(file.required_int("llama.block_count", 1, 100) == 2);
  CHECK(file.required_int("llama.negative", -10, 0) == -5);
  CHECK(file.required_float("llama.rope.freq_base") == 10000.0);
  CHECK(file.optional_bool("llama.flag") == true);
  CHECK(array<std::string>(file, "tokenizer.ggml.tokens") ==
        std::vector<std::string>{"<s>", "a", "\xff\xfe", ""});
  CHECK(array<std::int64_t>(file, "tokenizer.ggml.token_type") ==
        std::vector<std::int64_t>{3, 1, -1, 1});
  CHECK(array<double>(file, "tokenizer.ggml.scores") == std::vector<double>{0.0, -1.5});
  CHECK(array<bool>(file, "flags") == std::vector<bool>{true, false, true});
}

TEST_CASE("absent keys are empty or an error, as asked") {
  const GgufFile file = open_small_valid_file();
  CHECK(file.find("nothing") == nullptr);
  CHECK(file.optional_int("nothing", 0, 1) == std::nullopt);
  CHECK(file.optional_float("nothing") == std::nullopt);
  CHECK(file.optional_string("nothing") == std::nullopt);
  CHECK(file.optional_bool("nothing") == std::nullopt);
  CHECK(error_of([&] { file.required_int("nothing", 0, 1); }) ==
        "nothing: an integer from 0 to 1 / no such key");
  CHECK(error_of([&] { file.required_float("nothing"); }) == "nothing: a float / no such key");
  CHECK(error_of([&] { file.required_string("nothing"); }) == "nothing: a string / no such key");
}

TEST_CASE("a wrong type or range names both") {
  const GgufFile file = open_small_valid_file();
  CHECK(error_of([&] { file.required_int("llama.block_count", 3, 9); }) ==
        "llama.block_count: an integer from 3 to 9 / 2");
  CHECK(error_of([&] { file.required_int("llama.negative", 0, 9); }) ==
        "llama.negative: an integer from 0 to 9 / -5");
  CHECK(error_of([&] { file.optional_int("llama.big", 0, INT64_MAX); }) ==
        "llama.big: an integer from 0 to 9223372036854775807 / 9223372036854775808");
  CHECK(error_of([&] { file.optional_int("llama.big", INT64_MIN, -1); }) ==
        "llama.big: an integer from -9223372036854775808 to -1 / 9223372036854775808");
  CHECK(error_of([&] { file.optional_int("llama.flag", 0, 9); }) ==
        "llama.flag: an integer from 0 to 9 / a boolean");
  CHECK(error_of([&] { file.optional_float("llama.block_count"); }) ==
        "llama.block_count: a float / an integer");
  CHECK(error_of([&] { file.optional_string("flags"); }) ==
        "flags: a string / an array of booleans");
  CHECK(error_of([&] { file.optional_bool("general.architecture"); }) ==
        "general.architecture: a boolean / a string");
}

TEST_CASE("tensors are found by name, with their bytes, also after a move") {
  GgufFile original = open_small_valid_file();
  const GgufFile file = std::move(original);
  CHECK(file.tensors().size() == 3);
  CHECK(file.find_tensor("blk.1.attn_q.weight") == nullptr);
  const GgufTensor* tensor = file.find_tensor("blk.0.attn_q.weight");
  REQUIRE(tensor != nullptr);
  CHECK(tensor->type == GGML_TYPE_Q8_0);
  CHECK(tensor->ne == std::array<std::int64_t, 4>{32, 2, 1, 1});
  CHECK(tensor->n_bytes == 68);
  CHECK(tensor->offset % 32 == 0);
  const auto bytes = file.tensor_bytes(*tensor);
  CHECK(std::vector(bytes.begin(), bytes.end()) == Bytes(68, std::byte{2}));
  const auto last = file.tensor_bytes(*file.find_tensor("output_norm.weight"));
  CHECK(std::vector(last.begin(), last.end()) == Bytes(10, std::byte{3}));
}

TEST_CASE("errors name the file") {
  GgufWriter writer = small_valid_file();
  writer.version = 1;
  const TempFile temp(writer.image());
  try {
    GgufFile::open(temp.path());
    FAIL("opened");
  } catch (const BaseLoadError& error) {
    CHECK(error.file == temp.path());
    CHECK(error.field == "version");
  }
}
