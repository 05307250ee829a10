#include "modularbase/channel/checksum.h"

#include <bit>
#include <cstring>

namespace modularbase::channel {
namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5;
constexpr std::size_t kStripeBytes = 32;

template <class Word>
std::uint64_t load(const std::byte* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

std::uint64_t lane(std::uint64_t sum, std::uint64_t word) {
  return std::rotl(sum + word * kPrime2, 31) * kPrime1;
}

std::uint64_t merge(std::uint64_t hash, std::uint64_t sum) {
  return (hash ^ lane(0, sum)) * kPrime1 + kPrime4;
}

/// Takes whole stripes from the front of `bytes`.
std::uint64_t take_stripes(std::span<const std::byte>& bytes) {
  std::uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
  const std::byte* at = bytes.data();
  const std::size_t n_stripes = bytes.size() / kStripeBytes;
  for (std::size_t i = 0; i < n_stripes; ++i, at += kStripeBytes) {
    a = lane(a, load<std::uint64_t>(at));
    b = lane(b, load<std::uint64_t>(at + 8));
    c = lane(c, load<std::uint64_t>(at + 16));
    d = lane(d, load<std::uint64_t>(at + 24));
  }
  bytes = bytes.subspan(n_stripes * kStripeBytes);
  const std::uint64_t hash =
      std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
  return merge(merge(merge(merge(hash, a), b), c), d);
}

std::uint64_t avalanche(std::uint64_t hash) {
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

}  // namespace

std::uint64_t xxh64(std::span<const std::byte> bytes) {
  const std::uint64_t n_bytes = bytes.size();
  std::uint64_t hash = (n_bytes >= kStripeBytes ? take_stripes(bytes) : kPrime5) + n_bytes;
  for (; bytes.size() >= 8; bytes = bytes.subspan(8)) {
    hash = std::rotl(hash ^ lane(0, load<std::uint64_t>(bytes.data())), 27) * kPrime1 + kPrime4;
  }
  if (bytes.size() >= 4) {
    hash = std::rotl(hash ^ load<std::uint32_t>(bytes.data()) * kPrime1, 23) * kPrime2 + kPrime3;
    bytes = bytes.subspan(4);
  }
  for (const std::byte byte : bytes) {
    hash = std::rotl(hash ^ std::to_integer<std::uint64_t>(byte) * kPrime5, 11) * kPrime1;
  }
  return avalanche(hash);
}

}  // namespace modularbase::channel
