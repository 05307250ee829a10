#include "modularbase/packs/memory_pack.h"

#include "cpp/packs/tiny_residency.h"
#include "modularbase/core/errors.h"
#include "modularbase/packs/file_pack.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

/// What a file's pack looks like in a slot, as a pack of its own.
std::unique_ptr<const Pack> in_memory(const Pack& file, const std::string& digest) {
  std::vector<std::byte> image(file.layout().slot_bytes);
  file.copy_to(image);
  return std::make_unique<const MemoryPack>(
      PackFacts{"memory", "/segment", digest, file.geometry(), file.scale()}, std::move(image));
}

std::unique_ptr<const FilePack> file_pack(float marker) {
  const TempFile file(marked_pack(marker).image());
  return FilePack::open(file.path(), "", "file", kSmallBase);
}

}  // namespace

TEST_CASE("a pack in memory gives a slot the same bytes each time") {
  const auto file = file_pack(3);
  const auto memory = in_memory(*file, "xxh64:3");
  std::vector<std::byte> from_file(file->layout().slot_bytes), from_memory(from_file.size());
  file->copy_to(from_file);
  memory->copy_to(from_memory, Pacer([] { return true; }));
  CHECK(from_memory == from_file);
  CHECK(memory->path() == "/segment");
}

TEST_CASE("packs in memory share pool, budget and slots with those of files") {
  TinyResidency t(2);
  const auto a = t.open(1);
  const auto b = t.packs.adopt(in_memory(*file_pack(2), "xxh64:2"));
  const auto c = t.packs.adopt(in_memory(*file_pack(3), "xxh64:3"));
  CHECK(t.packs.adopt(in_memory(*file_pack(3), "xxh64:3")) == c);
  CHECK(marker_of(t.lease({a})[0]) == 1.0f);
  CHECK(marker_of(t.lease({b})[0]) == 2.0f);
  CHECK(marker_of(t.lease({c})[0]) == 3.0f);  // takes a's slot
  CHECK(t.packs.status(c).pool == t.packs.status(a).pool);
  CHECK(marker_of(t.lease({a})[0]) == 1.0f);
  CHECK(marker_of(t.lease({b})[0]) == 2.0f);
  CHECK(t.packs.status(b).n_loads == 2);
}

TEST_CASE("a lease is given at once for what is resident, and for nothing else") {
  TinyResidency t(1);
  const auto a = t.open(1), b = t.open(2);
  CHECK_FALSE(t.packs.try_lease(a));
  CHECK(t.packs.load(a, patience()));
  {
    const auto lease = t.packs.try_lease(a);
    REQUIRE(lease);
    CHECK(marker_of(*lease) == 1.0f);
    CHECK(t.packs.status(a).n_leases == 1);
    CHECK_THROWS_AS(t.packs.evict(a), BudgetExceededError);
  }
  CHECK(t.packs.load(b, patience()));
  CHECK_FALSE(t.packs.try_lease(a));
  CHECK_FALSE(t.packs.try_lease(99));
}
