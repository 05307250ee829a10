#include "modularbase/io/digest.h"

#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

using namespace modularbase;

namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// Byte i is (i * 131 + 7) mod 256, so that no two blocks of a short message are alike.
std::vector<std::byte> pattern(std::size_t n) {
  std::vector<std::byte> bytes(n);
  for (std::size_t i = 0; i < n; ++i) bytes[i] = static_cast<std::byte>(i * 131 + 7);
  return bytes;
}

struct Vector {
  std::size_t n_bytes;
  const char* hex;
};

// From Python: hashlib.sha256(bytes((i * 131 + 7) % 256 for i in range(n))).hexdigest()
constexpr Vector kVectors[] = {
    {0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {1, "ca358758f6d27e6cf45272937977a748fd88391db679ceda7dc7bf1f005ee879"},
    {55, "16ed9c4697ca11d5f6fb25ea7900252dd4cb97215d7f6d0b2bb3e2a86ac0ec72"},
    {56, "939ada93b2fe1e9c596d767bb408567c83e253667f0b25e5be8e16f35f2cbac9"},
    {57, "ab84281f3b181e6cfc7cf870c7f3e7912be6fd1ac49c7dd6b21f6c25bb9a5eaa"},
    {63, "6073f83b09ae82016cdbe24c18996c48f0eaa08ca675d0f6b90b807fc29e0149"},
    {64, "b337ba9b0c69c391364e985fdcb23a889887e59800832c92fbfa22b8a3c40304"},
    {65, "9d6a3fb113b586b4ab97bc11c993a27bd9b7bbcb756e0646083dc47a679600e6"},
    {119, "9773fbac8194c3d789af101b49b6a26073076895ef6e0f658432849dd477a43f"},
    {120, "070a538f085dd94821d4dc197c5c8b791051891d4fa2a1bf25d3c275236676f7"},
    {127, "5072b7a9a4cda7f6d80f1eff09b8b9653201dba22319daf32c6c05339d57f483"},
    {128, "485a94e53eba9717a5d8b7b4489cad92a752f1c5722e7dfd29dd164b7c438d11"},
    {1000, "533b698850849b7908b20a22658f639c0b2a476f1791f85f50188287c31a9aba"},
    {4096, "edc9983a5f8a590052203d12c58e8d367f7c694a8746b7b9ef87bcc8f5af9e9f"},
};

}  // namespace

TEST_CASE("SHA-256 agrees with the standard's examples") {
  CHECK(sha256_hex(bytes_of("abc")) ==
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_hex(bytes_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(sha256_hex(bytes_of(std::string(1000000, 'a'))) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("SHA-256 agrees with hashlib on every side of a block's edges") {
  for (const Vector& vector : kVectors) {
    CAPTURE(vector.n_bytes);
    CHECK(sha256_hex(pattern(vector.n_bytes)) == vector.hex);
  }
}

TEST_CASE("the cut of the stream does not matter") {
  const std::vector<std::byte> bytes = pattern(300);
  const std::string whole = sha256_hex(bytes);
  for (std::size_t n_piece = 1; n_piece <= 130; ++n_piece) {
    Sha256 digest;
    std::span<const std::byte> rest(bytes);
    while (!rest.empty()) {
      const std::size_t n = std::min(n_piece, rest.size());
      digest.update(rest.first(n));
      rest = rest.subspan(n);
    }
    CAPTURE(n_piece);
    CHECK(digest.finish_hex() == whole);
  }
}
