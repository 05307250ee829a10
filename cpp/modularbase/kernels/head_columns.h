#pragma once

#include "modularbase/kernels/head_layout.h"

namespace modularbase::kernels {

/// Chooses the order and scale of the columns from a sample of the rows.
///
/// The error bound grows with |y| over the 4-bit places, and in trained models a few dozen
/// coordinates of x hold most of its energy. They can be told from the weights: rows that are
/// seldom seen drift along the mean of x, so the column means are large there, or the norm's gain
/// is. Those columns get 8 bits.
HeadColumns choose_columns(const HeadWeight& head);

/// The 16 levels that fit the sampled rows best (Lloyd's algorithm on their histogram).
Codebook fit_codebook(const HeadWeight& head, const HeadColumns& columns);

/// z of one row, place by place. Reorders the row.
void normalise_row(const HeadColumns& columns, float* row, float* z);

}  // namespace modularbase::kernels
