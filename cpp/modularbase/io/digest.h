#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "modularbase/core/pacer.h"

namespace modularbase {

/// SHA-256 (FIPS 180-4) of bytes that arrive in pieces.
class Sha256 {
 public:
  void update(std::span<const std::byte> bytes);
  /// The digest in 64 lower-case hexadecimal digits. Ends the stream: nothing may be added
  /// afterwards.
  std::string finish_hex();

 private:
  static constexpr std::size_t kBlockBytes = 64;

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, kBlockBytes> pending_{};  // a block not yet full
  std::size_t n_pending_ = 0;
  std::uint64_t n_bytes_ = 0;
};

/// \param pacer rests between slices.
std::string sha256_hex(std::span<const std::byte> bytes, Pacer pacer = {});

}  // namespace modularbase
