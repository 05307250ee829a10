#include "modularbase/io/digest.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#if defined(__SHA__) && defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace modularbase {
namespace {

using State = std::array<std::uint32_t, 8>;

// Fractional parts of the cube roots of the first 64 primes.
alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#if defined(__SHA__) && defined(__SSE4_1__)

/// Four rounds; `message` holds words 4 group .. 4 group + 3.
void four_rounds(__m128i& abef, __m128i& cdgh, __m128i message, int group) {
  const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound + 4 * group));
  const __m128i sum = _mm_add_epi32(message, constants);
  cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
  abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
}

void compress(State& state, const std::byte* blocks, std::size_t n_blocks) {
#if defined(__AVX__)
  // These instructions have no wide form: with the upper halves of the registers in use each waits
  // for them (a hundred times slower, measured). So nothing below may be 256 bits wide.
  _mm256_zeroupper();
#endif
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const auto pick = [](__m128i low, __m128i high, auto choice) {
    return _mm_castps_si128(
        _mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), decltype(choice)::value));
  };
  using First = std::integral_constant<int, _MM_SHUFFLE(0, 1, 0, 1)>;
  using Last = std::integral_constant<int, _MM_SHUFFLE(2, 3, 2, 3)>;
  auto* words = reinterpret_cast<__m128i*>(state.data());
  const __m128i abcd = _mm_loadu_si128(words);
  const __m128i efgh = _mm_loadu_si128(words + 1);
  // The instructions want the state as (a b e f) and (c d g h), most significant word first.
  __m128i abef = pick(efgh, abcd, First{});
  __m128i cdgh = pick(efgh, abcd, Last{});
  for (; n_blocks > 0; --n_blocks, blocks += 64) {
    const __m128i abef_before = abef;
    const __m128i cdgh_before = cdgh;
    __m128i w[4];
    for (int group = 0; group < 16; ++group) {
      __m128i& word = w[group % 4];
      if (group < 4) {
        word = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks) + group),
                                big_endian);
      } else {
        const __m128i last = w[(group + 3) % 4];
        const __m128i seven_back = _mm_alignr_epi8(last, w[(group + 2) % 4], 4);
        word = _mm_add_epi32(_mm_sha256msg1_epu32(word, w[(group + 1) % 4]), seven_back);
        word = _mm_sha256msg2_epu32(word, last);
      }
      four_rounds(abef, cdgh, word, group);
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  _mm_storeu_si128(words, pick(abef, cdgh, Last{}));
  _mm_storeu_si128(words + 1, pick(abef, cdgh, First{}));
}

#else

std::uint32_t load_big_endian(const std::byte* from) {
  return std::to_integer<std::uint32_t>(from[0]) << 24 |
         std::to_integer<std::uint32_t>(from[1]) << 16 |
         std::to_integer<std::uint32_t>(from[2]) << 8 | std::to_integer<std::uint32_t>(from[3]);
}

void fill_schedule(std::uint32_t (&w)[64], const std::byte* block) {
  for (int i = 0; i < 16; ++i) w[i] = load_big_endian(block + 4 * i);
  for (int i = 16; i < 64; ++i) {
    const std::uint32_t x = w[i - 15];
    const std::uint32_t y = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(x, 7) ^ std::rotr(x, 18) ^ (x >> 3)) + w[i - 7] +
           (std::rotr(y, 17) ^ std::rotr(y, 19) ^ (y >> 10));
  }
}

void compress(State& state, const std::byte* blocks, std::size_t n_blocks) {
  for (; n_blocks > 0; --n_blocks, blocks += 64) {
    std::uint32_t w[64];
    fill_schedule(w, blocks);
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t t1 = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                               ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const std::uint32_t t2 =
          (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1;
      d = c, c = b, b = a, a = t1 + t2;
    }
    const State added{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < state.size(); ++i) state[i] += added[i];
  }
}

#endif

}  // namespace

void Sha256::update(std::span<const std::byte> bytes) {
  n_bytes_ += bytes.size();
  if (n_pending_ > 0) {
    const std::size_t n = std::min(bytes.size(), kBlockBytes - n_pending_);
    std::copy_n(bytes.begin(), n, pending_.begin() + static_cast<std::ptrdiff_t>(n_pending_));
    n_pending_ += n;
    bytes = bytes.subspan(n);
    if (n_pending_ < kBlockBytes) return;
    compress(state_, pending_.data(), 1);
    n_pending_ = 0;
  }
  const std::size_t n_blocks = bytes.size() / kBlockBytes;
  compress(state_, bytes.data(), n_blocks);
  bytes = bytes.subspan(n_blocks * kBlockBytes);
  std::copy(bytes.begin(), bytes.end(), pending_.begin());
  n_pending_ = bytes.size();
}

std::string Sha256::finish_hex() {
  const std::uint64_t n_bits = n_bytes_ * 8;
  // One 1 bit, zeros up to 8 bytes before a block's end, then the length: 9 to 72 bytes.
  std::array<std::byte, kBlockBytes + 8> tail{std::byte{0x80}};
  const std::size_t n_zeros = (2 * kBlockBytes - 9 - n_pending_) % kBlockBytes;
  for (std::size_t i = 0; i < 8; ++i) {
    tail[1 + n_zeros + i] = static_cast<std::byte>(n_bits >> (56 - 8 * i));
  }
  update({tail.data(), n_zeros + 9});

  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const std::uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += kDigits[(word >> shift) & 15];
  }
  return hex;
}

std::string sha256_hex(std::span<const std::byte> bytes, Pacer pacer) {
  Sha256 digest;
  while (!bytes.empty()) {
    const auto slice = bytes.first(std::min(Pacer::kSliceBytes, bytes.size()));
    digest.update(slice);
    bytes = bytes.subspan(slice.size());
    pacer.rest();
  }
  return digest.finish_hex();
}

}  // namespace modularbase
