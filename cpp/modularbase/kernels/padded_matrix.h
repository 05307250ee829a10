#pragma once

#include <cstdint>
#include <vector>

namespace modularbase::kernels {

/// A matrix of floats, row after row, in memory that is kept for the next one. The rows after the
/// last and the columns after the last are zeros, so that products need no case for the remainders.
class PaddedMatrix {
 public:
  static constexpr std::int64_t kRowBlock = 8;
  static constexpr std::int64_t kColumnBlock = 16;

  void reshape(std::int64_t n_rows, std::int64_t n_columns) {
    n_rows_ = n_rows;
    n_columns_ = n_columns;
    // An odd number of blocks: a column of a power of two's stride would fill few sets of the
    // cache.
    stride_ = (((n_columns + kColumnBlock - 1) / kColumnBlock) | 1) * kColumnBlock;
    floats_.assign(static_cast<std::size_t>(padded_rows() * stride_), 0.0f);
  }

  std::int64_t n_rows() const { return n_rows_; }
  std::int64_t n_columns() const { return n_columns_; }
  std::int64_t stride() const { return stride_; }
  std::int64_t padded_rows() const { return (n_rows_ + kRowBlock - 1) / kRowBlock * kRowBlock; }

  float* row(std::int64_t i) { return floats_.data() + i * stride_; }
  const float* row(std::int64_t i) const { return floats_.data() + i * stride_; }

 private:
  std::int64_t n_rows_ = 0;
  std::int64_t n_columns_ = 0;
  std::int64_t stride_ = 0;
  std::vector<float> floats_;
};

/// c = a b.
void multiply(const PaddedMatrix& a, const PaddedMatrix& b, PaddedMatrix& c);

/// c = a' b, of the first n_rows rows of both.
void multiply_transposed(const PaddedMatrix& a, const PaddedMatrix& b, std::int64_t n_rows,
                         PaddedMatrix& c);

/// out[*] = sum over the first n_rows rows of factors[i] a[i][*]; out has a's stride.
void combine_rows(const float* factors, const PaddedMatrix& a, std::int64_t n_rows, float* out);

}  // namespace modularbase::kernels
