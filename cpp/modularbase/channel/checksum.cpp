#include "modularbase/channel/checksum.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace modularbase::channel {
namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5;

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

std::uint64_t avalanche(std::uint64_t hash) {
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

}  // namespace

// Takes whole stripes from the front of `bytes`.
void Xxh64::take_stripes(std::span<const std::byte>& bytes) {
  auto [a, b, c, d] = lanes_;
  const std::byte* at = bytes.data();
  const std::size_t n_stripes = bytes.size() / kStripeBytes;
  for (std::size_t i = 0; i < n_stripes; ++i, at += kStripeBytes) {
    a = lane(a, load<std::uint64_t>(at));
    b = lane(b, load<std::uint64_t>(at + 8));
    c = lane(c, load<std::uint64_t>(at + 16));
    d = lane(d, load<std::uint64_t>(at + 24));
  }
  lanes_ = {a, b, c, d};
  bytes = bytes.subspan(n_stripes * kStripeBytes);
}

void Xxh64::update(std::span<const std::byte> bytes) {
  n_bytes_ += bytes.size();
  if (n_pending_ > 0) {
    const std::size_t n = std::min(kStripeBytes - n_pending_, bytes.size());
    std::copy_n(bytes.begin(), n, pending_.begin() + static_cast<std::ptrdiff_t>(n_pending_));
    n_pending_ += n;
    bytes = bytes.subspan(n);
    if (n_pending_ < kStripeBytes) return;
    std::span<const std::byte> stripe(pending_);
    take_stripes(stripe);
  }
  take_stripes(bytes);
  std::copy(bytes.begin(), bytes.end(), pending_.begin());
  n_pending_ = bytes.size();
}

std::uint64_t Xxh64::digest() const {
  const auto& [a, b, c, d] = lanes_;
  std::uint64_t hash = kPrime5;
  if (n_bytes_ >= kStripeBytes) {
    hash = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
    hash = merge(merge(merge(merge(hash, a), b), c), d);
  }
  hash += n_bytes_;
  std::span<const std::byte> rest = std::span(pending_).first(n_pending_);
  for (; rest.size() >= 8; rest = rest.subspan(8)) {
    hash = std::rotl(hash ^ lane(0, load<std::uint64_t>(rest.data())), 27) * kPrime1 + kPrime4;
  }
  if (rest.size() >= 4) {
    hash = std::rotl(hash ^ load<std::uint32_t>(rest.data()) * kPrime1, 23) * kPrime2 + kPrime3;
    rest = rest.subspan(4);
  }
  for (const std::byte byte : rest) {
    hash = std::rotl(hash ^ std::to_integer<std::uint64_t>(byte) * kPrime5, 11) * kPrime1;
  }
  return avalanche(hash);
}

std::uint64_t xxh64(std::span<const std::byte> bytes) {
  Xxh64 hash;
  hash.update(bytes);
  return hash.digest();
}

}  // namespace modularbase::channel
