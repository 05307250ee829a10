#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace modularbase::channel {

/// XXH64 with seed 0 of bytes that arrive in pieces: finds accidents at the speed of memory, which
/// is all that two processes of one user need.
class Xxh64 {
 public:
  void update(std::span<const std::byte> bytes);
  /// Of what has arrived so far; more may follow.
  std::uint64_t digest() const;

 private:
  static constexpr std::size_t kStripeBytes = 32;
  void take_stripes(std::span<const std::byte>& bytes);

  std::array<std::uint64_t, 4> lanes_{0x60EA27EEADC0B5D6, 0xC2B2AE3D27D4EB4F, 0,
                                      0x61C8864E7A143579};  // of seed 0
  std::array<std::byte, kStripeBytes> pending_{};           // a stripe not yet full
  std::size_t n_pending_ = 0;
  std::uint64_t n_bytes_ = 0;
};

std::uint64_t xxh64(std::span<const std::byte> bytes);

}  // namespace modularbase::channel
