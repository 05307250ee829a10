// Who is in a slot, who has to go, and what is told about it.
#include "modularbase/packs/residency.h"

#include "cpp/packs/tiny_residency.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;
using Acquired = PackResidency::Acquired;

namespace {

std::string no_room_reason(const std::function<void()>& ask) {
  try {
    ask();
  } catch (const BudgetExceededError& e) {
    return e.reason;
  }
  return "there was room";
}

PackClock::time_point soon() {
  return PackClock::now() + std::chrono::milliseconds(20);
}

}  // namespace

TEST_CASE("the least recently used generation makes room") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2), c = t.open(3);
  CHECK(t.packs.load(a, patience()));
  CHECK(t.packs.load(b, patience()));
  CHECK(t.used_bytes() == 2 * small_slot_bytes());
  t.lease({a});
  CHECK(t.packs.load(c, patience()));
  CHECK(t.is_resident(a));
  CHECK(t.state(b) == PackState::kKnown);
  CHECK(t.packs.status(b).slot == -1);
  CHECK(t.is_resident(c));
  CHECK(t.counts().n_loads == 3);
  CHECK(t.counts().n_evictions == 1);
  CHECK(marker_of(t.lease({c})[0]) == 3.0f);
  CHECK(marker_of(t.lease({b})[0]) == 2.0f);
  CHECK_FALSE(t.is_resident(a));
}

TEST_CASE("what was just loaded is not the first to go") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2), c = t.open(3), d = t.open(4);
  t.lease({a});
  t.lease({b});
  CHECK(t.packs.load(c, patience()));
  CHECK(t.packs.load(d, patience()));
  CHECK(t.is_resident(c));
  CHECK_FALSE(t.is_resident(b));
}

TEST_CASE("leases keep their generations, and say so to who wants the room") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2), c = t.open(3);
  auto first = t.lease({a});
  const auto second = t.lease({b});
  CHECK_FALSE(t.packs.load(c, soon()));
  CHECK(no_room_reason([&] { t.packs.evict(a); }) == "requests are using it");
  std::vector<PackLease> none;
  PackWait wait;
  t.packs.begin_round();
  CHECK(t.packs.acquire(std::vector{c}, none, wait) == Acquired::kNoRoom);
  CHECK(marker_of(first[0]) == 1.0f);
  CHECK(t.packs.status(a).n_leases == 1);
  CHECK(t.packs.status(a).n_hits == 1);
  first.clear();
  CHECK(t.packs.status(a).n_leases == 0);
  CHECK(t.packs.status(a).idle_s >= 0.0);
  CHECK(t.packs.load(c, patience()));
  CHECK_FALSE(t.is_resident(a));
  CHECK(marker_of(second[0]) == 2.0f);
}

TEST_CASE("two leases of a generation are two, and a lease that is moved is one") {
  TinyResidency t(1);
  const auto a = t.open(1);
  auto first = t.lease({a});
  auto second = t.lease({a});
  CHECK(t.packs.status(a).n_leases == 2);
  PackLease moved = std::move(first[0]);
  first.clear();
  CHECK(t.packs.status(a).n_leases == 2);
  second[0] = std::move(moved);  // the one that was there ends with `moved`
  {
    const PackLease ended = std::move(moved);
  }
  CHECK(t.packs.status(a).n_leases == 1);
  second.clear();
  CHECK(t.packs.status(a).n_leases == 0);
  CHECK(t.packs.status(a).n_loads == 1);
}

TEST_CASE("pins keep their generations, and what can never fit is told at once") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2), c = t.open(3);
  for (const auto id : {a, b}) {
    CHECK(t.packs.load(id, patience()));
    t.packs.pin(id);
  }
  const std::string pinned = std::to_string(2 * small_slot_bytes()) + " bytes are pinned";
  std::vector<PackLease> none;
  PackWait wait;
  CHECK(no_room_reason([&] { t.packs.load(c, patience()); }) == pinned);
  CHECK(no_room_reason([&] { t.packs.acquire(std::vector{c}, none, wait); }) == pinned);
  CHECK(no_room_reason([&] { t.packs.evict(a); }) == "it is pinned");
  CHECK(t.lease({a, b}).size() == 2);
  t.packs.unpin(b);
  CHECK(t.packs.load(c, patience()));
  CHECK(t.is_resident(a));
  CHECK_FALSE(t.is_resident(b));
}

TEST_CASE("a budget that is too small is told at once") {
  TinyResidency none(0), two(2);
  CHECK(no_room_reason([&] { none.packs.load(none.open(1), patience()); }) ==
        "the budget is smaller than the packs of one request");
  const std::vector ids{two.open(1), two.open(2), two.open(3)};
  std::vector<PackLease> leases;
  PackWait wait;
  CHECK(no_room_reason([&] { two.packs.acquire(ids, leases, wait); }) ==
        "the budget is smaller than the packs of one request");
  CHECK(leases.empty());
  CHECK(two.used_bytes() == 0);
}

TEST_CASE("a retired generation stays until its last lease ends") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2);
  auto first = t.lease({a});
  auto second = t.lease({a});
  t.packs.retire(a);
  CHECK(t.packs.status(a).is_retired);
  CHECK(t.used_bytes() == small_slot_bytes());
  first.clear();
  CHECK(marker_of(second[0]) == 1.0f);
  second.clear();
  CHECK_THROWS_AS(t.packs.status(a), PackNotFoundError);
  CHECK(t.used_bytes() == 0);
  CHECK(t.packs.load(b, patience()));
  t.packs.retire(b);  // nobody uses it
  CHECK(t.packs.status().packs.empty());
  std::vector<PackLease> leases;
  PackWait wait;
  CHECK_THROWS_AS(t.packs.acquire(std::vector{b}, leases, wait), PackNotFoundError);
  CHECK_THROWS_AS(t.packs.load(b, patience()), PackNotFoundError);
  CHECK(t.open(2) > b);  // a new generation: what was kept of the old one is not found under it
}

TEST_CASE("a generation that is retired while it is loaded goes when it is there") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2);
  t.hold_loader();
  CHECK(t.packs.load(a, patience()));
  std::vector<PackLease> leases;
  PackWait wait;
  CHECK(t.packs.acquire(std::vector{b}, leases, wait) == Acquired::kLoading);
  CHECK(no_room_reason([&] { t.packs.evict(b); }) == "it is being loaded");
  t.packs.retire(b);
  CHECK(t.state(b) == PackState::kLoading);
  t.let_go();
  TinyResidency::eventually([&] { return t.packs.status().packs.size() == 1; });
  CHECK(t.used_bytes() == small_slot_bytes());
  CHECK_THROWS_AS(t.packs.acquire(std::vector{b}, leases, wait), PackNotFoundError);
}

TEST_CASE("the same content is the same generation, whatever its file is called") {
  TinyResidency t(2);
  const auto a = t.open(1);
  CHECK(t.open(1) == a);
  CHECK(t.open(2) != a);
  const auto lease = t.lease({a});
  t.packs.retire(a);
  CHECK(t.open(1) == a);
  CHECK_FALSE(t.packs.status(a).is_retired);
}

TEST_CASE("a load that fails is told to those who waited for it, and nothing else changes") {
  TinyResidency t(3);
  const auto a = t.open(1), b = t.open(2);
  const std::string path = t.files.back().path();
  touch(path, 100);
  const auto c = t.open(3);
  CHECK(t.packs.load(a, patience()));
  t.hold_loader();
  CHECK(t.packs.load(c, patience()));
  std::vector<PackLease> leases;
  PackWait early;
  const std::vector both{a, b};
  CHECK(t.packs.acquire(both, leases, early) == Acquired::kLoading);
  t.let_go();
  TinyResidency::eventually([&] { return t.counts().n_failed_loads == 1; });
  CHECK_THROWS_AS(t.packs.acquire(both, leases, early), PackFormatError);
  CHECK(leases.empty());
  const PackStatus status = t.packs.status(b);
  CHECK(status.state == PackState::kKnown);
  CHECK(status.slot == -1);
  CHECK(status.n_loads == 0);
  CHECK(status.last_error.find(path) != std::string::npos);
  CHECK(t.used_bytes() == 2 * small_slot_bytes());
  CHECK(t.packs.status(a).n_leases == 0);
  CHECK(marker_of(t.lease({a})[0]) == 1.0f);

  PackWait late;  // began after the failure: another try
  CHECK(t.packs.acquire(both, leases, late) == Acquired::kLoading);
  TinyResidency::eventually([&] { return t.counts().n_failed_loads == 2; });
  CHECK_THROWS_AS(t.packs.acquire(both, leases, late), PackFormatError);
  CHECK_THROWS_AS(t.packs.load(b, patience()), PackFormatError);
}

TEST_CASE("a file that is sound again loads again") {
  TinyResidency t(1);
  t.files.emplace_back(marked_pack(1).image());
  const std::string path = t.files.back().path();
  touch(path, 100);
  const auto a = t.packs.open(path, "", "a");
  touch(path, 200);
  CHECK_THROWS_AS(t.packs.load(a, patience()), PackFormatError);
  CHECK(t.used_bytes() == 0);
  touch(path, 100);
  CHECK(t.packs.load(a, patience()));
  CHECK(t.packs.status(a).last_error.empty());
  CHECK(t.packs.status(a).load_us > 0.0);
  CHECK(t.packs.status(a).verify_us > 0.0);
}

TEST_CASE("an error of opening leaves nothing behind") {
  TinyResidency t(1);
  t.files.emplace_back(Bytes(100, std::byte{1}));
  CHECK_THROWS_AS(t.packs.open(t.files.back().path(), "", "bad"), PackFormatError);
  t.files.emplace_back(tiny_pack_file().image());
  CHECK_THROWS_AS(t.packs.open(t.files.back().path(), "", "wide"), PackIncompatibleError);
  CHECK(t.packs.status().packs.empty());
}

TEST_CASE("two geometries share one budget") {
  const std::int64_t wide = small_slot_bytes(3), narrow = small_slot_bytes();
  REQUIRE(wide > narrow);
  REQUIRE(wide <= 2 * narrow);
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2), c = t.open(3, 3);
  CHECK(t.packs.load(a, patience()));
  CHECK(t.packs.load(b, patience()));
  CHECK(t.packs.load(c, patience()));  // takes the room of both
  CHECK(t.used_bytes() == wide);
  CHECK(t.counts().n_evictions == 2);
  CHECK(t.packs.status(a).pool != t.packs.status(c).pool);
  CHECK(marker_of(t.lease({c})[0]) == 3.0f);
  CHECK(marker_of(t.lease({a})[0]) == 1.0f);
  CHECK_FALSE(t.is_resident(c));
}

TEST_CASE("slots that were given up hold no memory beside the budget") {
  TinyResidency t(3);
  const auto a = t.open(1), b = t.open(2), c = t.open(3), other = t.open(4, 3);
  for (const auto id : {a, b}) CHECK(t.packs.load(id, patience()));
  t.packs.evict(a);  // its slot is free now, while b is the one that makes room for c
  {
    const auto lease = t.lease({other});
  }
  const auto lease = t.lease({c});
  CHECK_FALSE(t.is_resident(b));
  int n_written = 0;
  for (int slot = 0; slot < lease[0].pool().n_slots(); ++slot) {
    n_written += marker_of(lease[0].pool(), slot) == 0.0f ? 0 : 1;
  }
  CHECK(n_written == 1);
}
