#include "modularbase/core/errors.h"

#include <doctest/doctest.h>

#include <string>

#include "modularbase/core/utf8.h"

using namespace modularbase;

TEST_CASE("BaseLoadError says file, field, expected and found") {
  const BaseLoadError error("a.gguf", "version", "2 or 3", "7");
  CHECK(std::string(error.what()) == "a.gguf: version: expected 2 or 3, found 7");
  CHECK(error.file == "a.gguf");
  CHECK(error.field == "version");
  CHECK(error.expected == "2 or 3");
  CHECK(error.found == "7");
}

TEST_CASE("text from a hostile file cannot break or flood a message") {
  const BaseLoadError error("a.gguf", "key", "text", "\xff\n" + std::string(100000, 'x'));
  CHECK(error.found.substr(0, 9) == "\\xff\\x0ax");
  CHECK(error.found.size() < 500);
  CHECK(is_valid_utf8(error.what()));
}

TEST_CASE("every error is a modularbase::Error with its fields") {
  const auto message = [](const Error& error) { return std::string(error.what()); };
  CHECK(message(InvalidRequestError("temperature", "0 or more", "-1")) ==
        "temperature: expected 0 or more, found -1");
  CHECK(message(ContextLengthError(4097, 4096)) ==
        "the request needs 4097 tokens of context, n_ctx is 4096");
  CHECK(message(KvCacheFullError(20, 10)) ==
        "the request needs 20 bytes of KV cache, the limit is 10");
  CHECK(message(PackNotFoundError("code", ">=2", {"code 1.0.0", "maths 1.0.0"})) ==
        "no pack code >=2; known packs: code 1.0.0, maths 1.0.0");
  CHECK(message(PackNotFoundError("code", "", {})) == "no pack code; known packs: none");
  CHECK(message(PackIncompatibleError("code", "base_id", "smollm2-135m", "qwen3-0.6b")) ==
        "pack code: base_id: required smollm2-135m, found qwen3-0.6b");
  CHECK(message(BudgetExceededError("code", 20, 10, "two packs are in use")) ==
        "pack code needs 20 bytes, the budget is 10: two packs are in use");
  CHECK(message(ChannelError("/s", "magic", "MBWEIGHT", "nothing")) ==
        "segment /s: magic: expected MBWEIGHT, found nothing");
  CHECK(BudgetExceededError("code", 20, 10, "").needed_bytes == 20);
  CHECK(ContextLengthError(2, 1).n_tokens == 2);
  CHECK(KvCacheFullError(2, 1).limit_bytes == 1);
  CHECK(message(CancelledError("closed")) == "closed");
}
