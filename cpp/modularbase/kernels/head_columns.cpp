#include "modularbase/kernels/head_columns.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace modularbase::kernels {
namespace {

constexpr std::int64_t kHotColumns = 64;
constexpr std::int64_t kMinColumnsForHot =
    256;  // below, 4-bit places would be too few to be worth two kinds
constexpr std::int64_t kColumnSample = 4096;
constexpr std::int64_t kCodebookSample = 512;
constexpr int kBins = 1024;
constexpr float kBinRange = 8.0f;  // root mean squares covered on either side
constexpr int kLloydSteps = 40;
constexpr float kHotRange = 4.5f;  // root mean squares that an 8-bit code spans

std::vector<std::int32_t> ranked(const float* values, std::int64_t n) {
  std::vector<std::int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return std::abs(values[a]) > std::abs(values[b]); });
  return order;
}

/// Alternately the column with the largest mean and the one with the largest gain.
std::vector<std::int32_t> hot_columns(const std::vector<float>& mean, const float* gain,
                                      std::int64_t n_hot) {
  const auto n = static_cast<std::int64_t>(mean.size());
  const std::vector<std::int32_t> by_mean = ranked(mean.data(), n);
  const std::vector<std::int32_t> by_gain = gain ? ranked(gain, n) : by_mean;
  std::vector<std::int32_t> hot;
  std::vector<bool> taken(n, false);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int32_t column : {by_mean[i], by_gain[i]}) {
      if (taken[column] || static_cast<std::int64_t>(hot.size()) == n_hot) continue;
      taken[column] = true;
      hot.push_back(column);
    }
  }
  return hot;
}

template <class Visit>
void visit_sample(const HeadWeight& head, std::int64_t n_sample, Visit visit) {
  std::vector<float> row(head.n_embd);
  const std::int64_t stride = std::max<std::int64_t>(1, head.n_vocab / n_sample);
  for (std::int64_t i = 0; i < head.n_vocab; i += stride) {
    load_head_row(head, i, row.data());
    visit(row.data());
  }
}

struct ColumnMoments {
  std::vector<float> mean;
  std::vector<float> spread;
};

ColumnMoments column_moments(const HeadWeight& head) {
  const auto n = static_cast<std::size_t>(head.n_embd);
  std::vector<float> sum(n), square(n);
  std::int64_t n_rows = 0;
  visit_sample(head, kColumnSample, [&](const float* row) {
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] += row[j];
      square[j] += row[j] * row[j];
    }
    ++n_rows;
  });
  ColumnMoments moments{sum, square};
  for (std::size_t j = 0; j < n; ++j) {
    // Any mean and spread are correct; an overflowing or constant column needs ones that are
    // finite.
    const bool finite = std::isfinite(square[j]);
    const float mean = finite ? sum[j] / static_cast<float>(n_rows) : 0.0f;
    const float spread = std::sqrt(square[j] / static_cast<float>(n_rows) - mean * mean);
    moments.mean[j] = mean;
    moments.spread[j] = finite && spread > 1e-18f ? spread : 1.0f;
  }
  return moments;
}

using Histogram = std::array<double, kBins>;

float bin_centre(int bin) {
  return (static_cast<float>(bin) + 0.5f) * (2.0f * kBinRange / kBins) - kBinRange;
}

Histogram histogram_of_rows(const HeadWeight& head, const HeadColumns& columns) {
  Histogram histogram{};
  std::vector<float> z(head.n_embd);
  visit_sample(head, kCodebookSample, [&](float* row) {
    normalise_row(columns, row, z.data());
    double square = 0.0;
    for (float v : z) square += static_cast<double>(v) * v;
    const double rms = std::sqrt(square / static_cast<double>(z.size()));
    if (!(rms > 0.0) || !std::isfinite(rms)) return;
    const float to_bin = static_cast<float>(kBins / (2.0 * kBinRange) / rms);
    for (std::size_t p = columns.n_hot; p < z.size(); ++p) {
      const float bin = std::clamp(z[p] * to_bin + 0.5f * kBins, 0.0f, kBins - 1.0f);
      histogram[static_cast<std::size_t>(bin)] += 1.0;
    }
  });
  return histogram;
}

std::array<float, kLevels> lloyd(const Histogram& histogram) {
  std::array<float, kLevels> levels;
  for (int k = 0; k < kLevels; ++k)
    levels[k] = (static_cast<float>(k) + 0.5f) * (5.5f / kLevels) - 2.75f;
  for (int step = 0; step < kLloydSteps; ++step) {
    std::array<double, kLevels> sum{}, count{};
    int k = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      while (k + 1 < kLevels && bin_centre(bin) > 0.5f * (levels[k] + levels[k + 1])) ++k;
      sum[k] += histogram[bin] * bin_centre(bin);
      count[k] += histogram[bin];
    }
    for (int i = 0; i < kLevels; ++i) {
      if (count[i] > 0.0) levels[i] = static_cast<float>(sum[i] / count[i]);
    }
  }
  return levels;
}

}  // namespace

HeadColumns choose_columns(const HeadWeight& head) {
  const ColumnMoments moments = column_moments(head);
  HeadColumns columns;
  columns.n_hot = head.n_embd >= kMinColumnsForHot ? kHotColumns : 0;
  columns.column.resize(head.n_embd);
  std::iota(columns.column.begin(), columns.column.end(), 0);
  for (std::int32_t hot : hot_columns(moments.mean, head.norm_gain, columns.n_hot)) {
    const auto place = std::find(columns.column.begin(), columns.column.end(), hot);
    std::iter_swap(columns.column.begin() + static_cast<std::ptrdiff_t>(columns.swap.size()),
                   place);
    columns.swap.push_back(static_cast<std::int32_t>(place - columns.column.begin()));
  }
  for (std::int32_t column : columns.column) {
    columns.mean.push_back(moments.mean[column]);
    columns.spread.push_back(moments.spread[column]);
    columns.inverse_spread.push_back(1.0f / moments.spread[column]);
  }
  return columns;
}

Codebook fit_codebook(const HeadWeight& head, const HeadColumns& columns) {
  const std::array<float, kLevels> levels = lloyd(histogram_of_rows(head, columns));
  const float largest = std::max({std::abs(levels.front()), std::abs(levels.back()), 1e-3f});
  Codebook book;
  book.unit = largest / 127.0f;
  book.hot_step = kHotRange / largest;
  for (int k = 0; k < kLevels; ++k)
    book.levels[k] = static_cast<std::int8_t>(std::lround(levels[k] / book.unit));
  for (int k = 0; k + 1 < kLevels; ++k) {
    book.bounds[k] =
        static_cast<std::int8_t>(std::floor(0.5f * (book.levels[k] + book.levels[k + 1])));
  }
  return book;
}

void normalise_row(const HeadColumns& columns, float* row, float* z) {
  for (std::size_t i = 0; i < columns.swap.size(); ++i) std::swap(row[i], row[columns.swap[i]]);
  const float* mean = columns.mean.data();
  const float* inverse_spread = columns.inverse_spread.data();
  const std::size_t n = columns.column.size();
  for (std::size_t p = 0; p < n; ++p) z[p] = (row[p] - mean[p]) * inverse_spread[p];
}

}  // namespace modularbase::kernels
