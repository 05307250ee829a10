#include "modularbase/channel/checksum.h"

#include <doctest/doctest.h>

#include <string_view>

using namespace modularbase::channel;

TEST_CASE("XXH64 gives the values its authors publish") {
  const auto hash = [](std::string_view text) { return xxh64(std::as_bytes(std::span(text))); };
  CHECK(hash("") == 0xEF46DB3751D8E999);
  CHECK(hash("a") == 0xD24EC4F1A98C6E5B);
  CHECK(hash("abc") == 0x44BC2CF5AD770999);
  CHECK(hash("Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1);
}
