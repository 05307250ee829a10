#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "modularbase/core/errors.h"
#include "modularbase/core/utf8.h"
#include "modularbase/io/pack_file.h"

namespace {

// A file in memory, written anew for every input: packs are read from files only.
int memory_file() {
  static const int kFile = ::memfd_create("fuzz", 0);
  if (kFile < 0) std::abort();
  return kFile;
}

}  // namespace

// Any bytes are either a pack all of whose tensors lie inside them, or a PackFormatError with a
// printable message.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const int file = memory_file();
  if (::ftruncate(file, static_cast<::off_t>(size)) != 0) std::abort();
  if (::pwrite(file, data, size, 0) != static_cast<::ssize_t>(size)) std::abort();
  try {
    const auto pack = modularbase::PackFile::open("/proc/self/fd/" + std::to_string(file));
    for (const modularbase::GgufTensor& tensor : pack.tensors()) {
      if (tensor.offset > size || tensor.n_bytes > size - tensor.offset) std::abort();
    }
    if (pack.sites().size() != pack.geometry().sites.size()) std::abort();
  } catch (const modularbase::PackFormatError& error) {
    if (error.field.empty() || !modularbase::is_valid_utf8(error.what())) std::abort();
  }
  return 0;
}
