#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/kernels/head_layout.h"
#include "modularbase/kernels/head_product.h"

namespace modularbase::kernels {

/// Some places of y = spread * x in fixed point: step * (256 * high byte + low byte).
struct FixedPoint {
  std::vector<std::int8_t> planes[2];  // [n_places, padded] high, low
  float step = 0.0f;
  double norm = 0.0;   // |y|
  double error = 0.0;  // |y - fixed point|
};

/// One row of x, ready to be multiplied with the codes.
struct ScanRow {
  ProductInput product;
  std::vector<float> y;  // [n_embd] by place
  FixedPoint hot_y;
  FixedPoint rest_y;
  // Per vector of codes the four bytes that meet each lane; high plane, then low plane.
  std::vector<std::int32_t> hot;  // [2, n_hot_vectors]
  std::vector<std::int32_t>
      rest;  // [n_planes, 2, n_rest_vectors]: the first four places, then the last four
  std::int32_t hot_offset[2] = {};  // -128 * sum of the plane: codes are stored with 128 added
  std::int32_t rest_offset[2] = {};
  // upper bound = base + scale (k_scale + k_hot * hot + k_rest * rest) + rest_residual |y_rest| +
  // hot_residual |y_hot|
  float base = 0.0f;
  float k_scale = 0.0f;
  float k_hot = 0.0f;
  float k_rest = 0.0f;
  float rest_norm = 0.0f;
  float hot_norm = 0.0f;
  bool bounded = false;  // false: x or the bound is not finite
};

/// Bytes an element of x on the 4-bit places. One row waits for memory, so a second byte costs no
/// time and shortens the list by a third; many rows wait for arithmetic.
int rest_planes(std::int64_t n_rows);

void prepare_scan_row(const HeadWeight& head, const HeadScreen::Data& screen, const float* x,
                      int n_rest_planes, ScanRow& row);

/// Upper bounds of the logits of tiles first..end-1 for rows[0..n_rows), all prepared with
/// n_rest_planes.
void scan_tiles(const HeadScreen::Data& screen, const ScanRow* const* rows, int n_rows,
                int n_rest_planes, std::int64_t first, std::int64_t end,
                float* const* upper,      // a row: [n_tiles * kTileRows]
                float* const* tile_max);  // a row: [n_tiles]

}  // namespace modularbase::kernels
