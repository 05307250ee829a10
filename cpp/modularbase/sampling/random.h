#pragma once

#include <cstdint>
#include <random>

namespace modularbase {

/// A request's stream of random numbers. The C++ standard fixes every output of mt19937 but not
/// those of its distributions, so the step from words to a double is written out: one seed, one
/// stream, on any platform. It is the step GNU's library takes, so a 32-bit seed gives the stream
/// that llama.cpp draws with.
class Random {
 public:
  explicit Random(std::uint64_t seed) {
    const auto low = static_cast<std::uint32_t>(seed);
    const auto high = static_cast<std::uint32_t>(seed >> 32);
    if (high == 0) {
      words_.seed(low);
    } else {
      std::seed_seq both{low, high};
      words_.seed(both);
    }
  }

  /// The next number, in [0, 1).
  double uniform() {
    const double low = static_cast<double>(words_());
    const double high = static_cast<double>(words_());
    const double value = (low + high * 0x1p32) * 0x1p-64;
    return value < 1.0 ? value : 0x1.fffffffffffffp-1;  // the sum may round up to 2^64
  }

 private:
  std::mt19937 words_;
};

/// A seed from the system, for requests that name none; 32 bits, short enough to pass on.
inline std::uint64_t random_seed() {
  return std::random_device{}();
}

}  // namespace modularbase
