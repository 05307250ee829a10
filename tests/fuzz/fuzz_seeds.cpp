// Writes the small valid files from which the fuzzers start into the two folders given.
#include <cstdio>
#include <fstream>
#include <string>

#include "tools/gguf_writer.h"
#include "tools/tiny_pack.h"

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

/// As few bytes as a pack can have.
GgufWriter small_pack(ggml_type expert_type, bool has_token_gate) {
  TinyPack pack;
  pack.n_embd = 1;
  pack.n_expert = 2;
  pack.sites = {1};
  pack.expert_type = expert_type;
  pack.has_token_gate = has_token_gate;
  return tiny_pack_file(pack);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: fuzz_seeds GGUF_FOLDER PACK_FOLDER\n");
    return 2;
  }
  const std::string folder = argv[1], packs = argv[2];
  GgufWriter version_2 = small_valid_file();
  version_2.version = 2;
  const bool written = write(folder + "/empty.gguf", GgufWriter{}) &&
                       write(folder + "/one_tensor.gguf", one_tensor()) &&
                       write(folder + "/small.gguf", small_valid_file()) &&
                       write(folder + "/version_2.gguf", version_2) &&
                       write(packs + "/q4_0.gguf", small_pack(GGML_TYPE_Q4_0, true)) &&
                       write(packs + "/q4_k.gguf", small_pack(GGML_TYPE_Q4_K, false));
  if (!written) std::fprintf(stderr, "fuzz_seeds: cannot write into the folders\n");
  return written ? 0 : 1;
}
