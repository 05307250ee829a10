#include "modularbase/channel/checksum.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <string_view>
#include <vector>

using namespace modularbase::channel;

TEST_CASE("XXH64 gives the values its authors publish") {
  const auto hash = [](std::string_view text) { return xxh64(std::as_bytes(std::span(text))); };
  CHECK(hash("") == 0xEF46DB3751D8E999);
  CHECK(hash("a") == 0xD24EC4F1A98C6E5B);
  CHECK(hash("abc") == 0x44BC2CF5AD770999);
  CHECK(hash("Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1);
}

TEST_CASE("XXH64 of pieces is that of the whole") {
  std::vector<std::byte> bytes(300);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 37);
  const std::span<const std::byte> whole(bytes);
  for (const std::size_t n_piece : {1, 7, 31, 32, 33, 64, 299}) {
    Xxh64 hash;
    for (std::size_t at = 0; at < bytes.size(); at += n_piece) {
      CHECK(hash.digest() == xxh64(whole.first(at)));
      hash.update(whole.subspan(at, std::min(n_piece, bytes.size() - at)));
    }
    CHECK(hash.digest() == xxh64(whole));
  }
}
