// Writes the small valid files from which the fuzzer starts into the folder given.
#include <cstdio>
#include <fstream>
#include <string>

#include "tools/gguf_writer.h"

using namespace modularbase::testing;

namespace {

bool write(const std::string& path, const GgufWriter& writer) {
  const Bytes image = writer.image();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(image.data()),
             static_cast<std::streamsize>(image.size()));
  return static_cast<bool>(file.flush());
}

GgufWriter one_tensor() {
  GgufWriter writer;
  writer.add_u32("general.alignment", 64);
  writer.alignment = 64;
  writer.add_tensor("t", 0, {2, 1, 1, 1}, Bytes(8));
  return writer;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: gguf_seeds FOLDER\n");
    return 2;
  }
  const std::string folder = argv[1];
  GgufWriter version_2 = small_valid_file();
  version_2.version = 2;
  const bool written = write(folder + "/empty.gguf", GgufWriter{}) &&
                       write(folder + "/one_tensor.gguf", one_tensor()) &&
                       write(folder + "/small.gguf", small_valid_file()) &&
                       write(folder + "/version_2.gguf", version_2);
  if (!written) std::fprintf(stderr, "gguf_seeds: cannot write into %s\n", folder.c_str());
  return written ? 0 : 1;
}
