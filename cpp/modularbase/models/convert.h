#pragma once

#include "modularbase/graph/graph_builder.h"
#include "modularbase/io/gguf_file.h"

namespace modularbase {

/// Reads a tensor of the file into `target` (allocated, same shape), converting to its type on all
/// threads of the backend. \throws BaseLoadError when a value does not fit the target type.
void convert_tensor(const GgufFile& file, const GgufTensor& source, Tensor target,
                    const Backend& backend);

}  // namespace modularbase
