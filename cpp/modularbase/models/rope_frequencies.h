#pragma once

#include <vector>

#include "modularbase/models/model.h"

namespace modularbase {

/// How far each pair of a head's numbers turns from one position to the next, in radians:
/// [rope_dim / 2].
std::vector<float> rope_frequencies(const Model& model);

}  // namespace modularbase
