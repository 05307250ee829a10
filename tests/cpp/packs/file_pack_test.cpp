#include "modularbase/packs/file_pack.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "cpp/packs/marked_pack.h"
#include "modularbase/core/errors.h"
#include "modularbase/io/digest.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

std::vector<std::byte> slot_of(const Pack& pack, std::byte fill = std::byte{0}) {
  std::vector<std::byte> slot(pack.layout().slot_bytes, fill);
  pack.copy_to(slot);
  return slot;
}

/// The field that the error of copying a pack names.
std::string copy_error(const Pack& pack) {
  try {
    slot_of(pack);
  } catch (const PackFormatError& e) {
    CHECK(e.file == pack.path());
    CHECK(!e.expected.empty());
    return e.field;
  }
  return "copied";
}

bool holds(const std::vector<std::byte>& slot, std::size_t offset, const Bytes& bytes) {
  return std::equal(bytes.begin(), bytes.end(), slot.begin() + static_cast<std::ptrdiff_t>(offset));
}

}  // namespace

TEST_CASE("a pack lies in its slot as its file says") {
  for (const ggml_type expert : {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
    for (const ggml_type adapter : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
      TinyPack shape;
      shape.n_expert = 2;
      shape.adapter_type = adapter;
      shape.expert_type = expert;
      GgufWriter writer = tiny_pack_file(shape);
      // The order of tensors in a file is its writer's.
      std::reverse(writer.tensors.begin() + 3, writer.tensors.end());
      const TempFile file(writer.image());
      const auto pack = FilePack::open(file.path(), "", "tiny", {64, 4});
      const auto slot = slot_of(*pack);
      for (std::size_t i = 0; i < 2; ++i) {
        const SlotLayout::Site& at = pack->layout().sites[i];
        const auto bytes = [&](const char* name) {
          return writer.tensor("site." + std::to_string(i) + "." + name).data;
        };
        CHECK(holds(slot, at.in, bytes("in.weight")));
        CHECK(holds(slot, at.norm, bytes("norm.weight")));
        CHECK(holds(slot, at.router, bytes("router.weight")));
        CHECK(holds(slot, at.token_gate, bytes("token_gate.weight")));
        CHECK(holds(slot, at.token_bias, bytes("token_gate.bias")));
        CHECK(holds(slot, at.expert_gate, bytes("expert_gate.weight")));
        CHECK(holds(slot, at.expert_up, bytes("expert_up.weight")));
        CHECK(holds(slot, at.expert_down, bytes("expert_down.weight")));
        CHECK(holds(slot, at.out, bytes("out.weight")));
      }
    }
  }
}

TEST_CASE("a pack without token gates leaves none of the slot's last pack") {
  TinyPack shape;
  shape.has_token_gate = false;
  const TempFile file(tiny_pack_file(shape).image());
  const auto pack = FilePack::open(file.path(), "", "tiny", {64, 4});
  const auto slot = slot_of(*pack, std::byte{0xff});
  for (const SlotLayout::Site& site : pack->layout().sites) {
    CHECK(holds(slot, site.token_gate, Bytes(64 * 4)));
    CHECK(holds(slot, site.token_bias, Bytes(4)));
  }
}

TEST_CASE("the digest names the content, and a wrong one is refused") {
  const Bytes image = marked_pack(1).image();
  const TempFile file(image);
  const std::string digest = "sha256:" + sha256_hex(image);
  CHECK(FilePack::open(file.path(), "", "a", kSmallBase)->digest() == digest);
  CHECK(FilePack::open(file.path(), digest, "a", kSmallBase)->digest() == digest);
  const std::string other = "sha256:" + sha256_hex(marked_pack(2).image());
  try {
    FilePack::open(file.path(), other, "a", kSmallBase);
    FAIL("a wrong digest was accepted");
  } catch (const PackFormatError& e) {
    CHECK(e.file == file.path());
    CHECK(e.field == "digest");
    CHECK(e.expected == other);
    CHECK(e.found == digest);
  }
}

TEST_CASE("a pack for another base is refused by name") {
  const TempFile file(marked_pack(1).image());
  const auto refused = [&](const PackBase& base) {
    try {
      FilePack::open(file.path(), "", "medical", base);
    } catch (const PackIncompatibleError& e) {
      CHECK(e.pack_id == "medical");
      return e.field + ": " + e.required + ", not " + e.found;
    }
    return std::string("accepted");
  };
  CHECK(refused({.n_embd = 32, .n_layer = 4}) == "n_embd: 32, not 16");
  CHECK(refused({.n_embd = 16, .n_layer = 2}) == "sites: layers below 2, not 2");
  CHECK(refused({.n_embd = 16, .n_layer = 3}) == "accepted");
}

TEST_CASE("a file that is written to after it was checked is refused") {
  const TempFile file(marked_pack(1).image());
  const auto pack = FilePack::open(file.path(), "", "a", kSmallBase);
  CHECK(copy_error(*pack) == "copied");
  touch(file.path());
  CHECK(copy_error(*pack) == "file");
}

TEST_CASE("a file that is cut after it was checked is an error, whatever its time") {
  const Bytes image = marked_pack(1).image();
  for (const std::size_t n : {std::size_t{0}, std::size_t{100}, image.size() - 1}) {
    CAPTURE(n);
    const TempFile file(image);
    touch(file.path());
    const auto pack = FilePack::open(file.path(), "", "a", kSmallBase);
    REQUIRE(::truncate(file.path().c_str(), static_cast<::off_t>(n)) == 0);
    touch(file.path());
    CHECK(copy_error(*pack) == "file");
  }
}

TEST_CASE("a file that is deleted or replaced after it was checked still loads") {
  const Bytes image = marked_pack(1).image();
  const TempFile file(image), other(marked_pack(2).image());
  const auto pack = FilePack::open(file.path(), "", "a", kSmallBase);
  const auto before = slot_of(*pack);
  REQUIRE(::rename(other.path().c_str(), file.path().c_str()) == 0);
  CHECK(slot_of(*pack) == before);
  REQUIRE(::unlink(file.path().c_str()) == 0);
  CHECK(slot_of(*pack) == before);
}

TEST_CASE("what is no pack at all is a named error") {
  const auto refused = [](const std::string& path) {
    CHECK_THROWS_AS(FilePack::open(path, "", "a", kSmallBase), PackFormatError);
  };
  refused("/nonexistent/pack.gguf");
  refused("/tmp");
  const TempFile text(Bytes(100, std::byte{'x'}));
  refused(text.path());
  const std::string pipe = text.path() + ".pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  refused(pipe);  // nobody writes: it must not wait
  ::unlink(pipe.c_str());
}
