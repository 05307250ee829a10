#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>

#include "modularbase/core/errors.h"
#include "modularbase/core/utf8.h"
#include "modularbase/io/gguf_parser.h"

// Any bytes either parse into tensors that lie inside them, or raise BaseLoadError with a printable
// message.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::string kPath = "fuzz.gguf";
  const auto image = std::as_bytes(std::span(data, size));
  try {
    for (const modularbase::GgufTensor& tensor : modularbase::parse_gguf(image, kPath).tensors) {
      if (tensor.offset > size || tensor.n_bytes > size - tensor.offset) std::abort();
      if (tensor.n_bytes !=
          ggml_row_size(tensor.type, tensor.ne[0]) * tensor.ne[1] * tensor.ne[2] * tensor.ne[3]) {
        std::abort();
      }
    }
  } catch (const modularbase::BaseLoadError& error) {
    if (error.field.empty() || !modularbase::is_valid_utf8(error.what())) std::abort();
  }
  return 0;
}
