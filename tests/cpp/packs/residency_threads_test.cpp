// Loads, guesses and requests that compete; what holds whatever threads do.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <random>

#include "cpp/packs/tiny_residency.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;
using Acquired = PackResidency::Acquired;

namespace {

std::int64_t rss_bytes() {
  std::int64_t n_total = 0, n_resident = 0;
  std::ifstream("/proc/self/statm") >> n_total >> n_resident;
  return n_resident * ::sysconf(_SC_PAGESIZE);
}

/// Asks for packs as the engine does: round after round, in the order in which requests came.
struct Request {
  std::vector<GenerationId> ids;
  PackWait wait = {};
  std::vector<PackLease> leases = {};
  int n_steps = 0;  // that it has run
};

}  // namespace

TEST_CASE("two loads of one pack at once are one load") {
  TinyResidency t(2);
  const auto a = t.open(1), b = t.open(2);
  t.hold_loader();
  CHECK(t.packs.load(a, patience()));
  std::atomic<int> n_loaded{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] { n_loaded += t.packs.load(b, patience()) ? 1 : 0; });
  }
  TinyResidency::eventually([&] { return t.state(b) == PackState::kLoading; });
  CHECK_FALSE(t.packs.load(b, PackClock::now()));
  t.let_go();
  for (std::thread& thread : threads) thread.join();
  CHECK(n_loaded == 2);
  CHECK(t.packs.status(b).n_loads == 1);
  CHECK(t.counts().n_loads == 2);
}

TEST_CASE("what is waited for loads before guesses, and no guess takes its place") {
  TinyResidency t(2);
  const auto first = t.open(1), guess = t.open(2), urgent = t.open(3);
  t.hold_loader();
  CHECK(t.packs.load(first, patience()));
  const auto lease = t.lease({first});
  t.packs.preload(guess);
  t.packs.begin_round();
  std::vector<PackLease> leases;
  PackWait wait;
  CHECK(t.packs.acquire(std::vector{urgent}, leases, wait) == Acquired::kLoading);
  t.let_go();
  TinyResidency::eventually([&] { return t.is_resident(urgent); });
  CHECK(t.packs.acquire(std::vector{urgent}, leases, wait) == Acquired::kReady);
  CHECK(t.state(guess) == PackState::kKnown);
  CHECK(t.counts().n_preloads == 0);
}

TEST_CASE("what a request waits for stays until a round begins without it") {
  TinyResidency t(2);
  const auto used = t.open(1), a = t.open(2), b = t.open(3), other = t.open(4);
  const auto lease = t.lease({used});
  std::vector<PackLease> leases;
  PackWait wait;
  t.packs.begin_round();
  CHECK(t.packs.acquire(std::vector{a, b}, leases, wait) == Acquired::kNoRoom);
  TinyResidency::eventually([&] { return t.is_resident(a); });
  CHECK_FALSE(t.packs.load(other, PackClock::now() + std::chrono::milliseconds(20)));
  CHECK(t.is_resident(a));
  std::atomic<bool> is_loaded{false};
  std::thread thread([&] { is_loaded = t.packs.load(other, patience()); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // so that it waits, mostly
  t.packs.begin_round();
  thread.join();
  CHECK(is_loaded);
  CHECK_FALSE(t.is_resident(a));
}

TEST_CASE("guesses are counted as hits when they are leased, and as wastes when they are not") {
  TinyResidency t(2);
  const auto hit = t.open(1), waste = t.open(2);
  for (const auto id : {hit, waste}) {
    t.packs.preload(id);
    t.packs.preload(id);
    TinyResidency::eventually([&] { return t.is_resident(id); });
  }
  t.lease({hit});
  t.lease({hit});
  CHECK(t.counts().n_preload_hits == 1);
  t.packs.evict(hit);
  CHECK(t.counts().n_preload_wastes == 0);
  t.packs.evict(waste);
  CHECK(t.counts().n_preloads == 2);
  CHECK(t.counts().n_preload_hits == 1);
  CHECK(t.counts().n_preload_wastes == 1);
  CHECK(t.used_bytes() == 0);
}

TEST_CASE("a guess that fails harms nobody") {
  TinyResidency t(2);
  const auto bad = t.open(1);
  touch(t.files.back().path());
  const auto good = t.open(2);
  t.packs.preload(bad);
  t.packs.preload(good);
  TinyResidency::eventually([&] { return t.is_resident(good); });
  CHECK(t.counts().n_failed_loads == 1);
  CHECK(t.used_bytes() == small_slot_bytes());
}

TEST_CASE("requests for two packs each, and room for two: all or none, and everybody's turn") {
  TinyResidency t(2);
  std::vector<GenerationId> ids;
  for (int i = 1; i <= 5; ++i) ids.push_back(t.open(static_cast<float>(i)));
  std::list<Request> requests;
  for (std::size_t i = 0; i < 15; ++i) {
    requests.push_back({{ids[i % 5], ids[(i + 1 + i / 5) % 5]}});
  }
  TinyResidency::eventually([&] {
    t.packs.begin_round();
    for (auto it = requests.begin(); it != requests.end();) {
      Request& request = *it;
      if (request.leases.empty()) t.packs.acquire(request.ids, request.leases, request.wait);
      CHECK((request.leases.empty() || request.leases.size() == 2));
      for (std::size_t i = 0; i < request.leases.size(); ++i) {
        CHECK(marker_of(request.leases[i]) == static_cast<float>(request.ids[i]));
      }
      if (!request.leases.empty() && ++request.n_steps == 3) {
        it = requests.erase(it);
      } else {
        ++it;
      }
    }
    return requests.empty();
  });
  for (const PackStatus& pack : t.packs.status().packs) CHECK(pack.n_leases == 0);
}

TEST_CASE("a thousand loads and evictions leave the memory where it was") {
  TinyResidency t(2);
  const std::vector ids{t.open(1), t.open(2), t.open(3), t.open(4, 3)};
  const auto cycle = [&](int n) {
    for (int i = 0; i < n; ++i) {
      const auto id = ids[static_cast<std::size_t>(i) % ids.size()];
      REQUIRE(t.packs.load(id, patience()));
      if (i % 3 == 0) t.packs.evict(id);
    }
  };
  cycle(100);
  const std::int64_t before = rss_bytes();
  cycle(1000);
  // A leak of a twentieth of a pack a cycle would be 11 MB; a huge page may come or go, and the
  // address sanitizer keeps what was freed, some 6 kB a load.
  CHECK(rss_bytes() - before < 9 * 1000 * 1000);
  CHECK(t.counts().n_loads >= 1000);
}

TEST_CASE("an end in the middle of loads") {
  for (int i = 0; i < 20; ++i) {
    TinyResidency t(3);
    std::vector<GenerationId> ids;
    for (int k = 1; k <= 4; ++k) ids.push_back(t.open(static_cast<float>(k)));
    for (const auto id : ids) t.packs.preload(id);
    std::vector<PackLease> leases;
    PackWait wait;
    t.packs.acquire(std::vector{ids[static_cast<std::size_t>(i) % 4]}, leases, wait);
    if (i % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
  }
}

namespace {

/// What one of several threads does: anything, in any order.
class Player {
 public:
  Player(TinyResidency& residency, std::vector<std::atomic<GenerationId>>& ids,
         const std::vector<std::string>& paths, unsigned seed)
      : packs_(residency.packs), ids_(ids), paths_(paths), random_(seed) {}

  void play(int n_moves) {
    for (int i = 0; i < n_moves; ++i) {
      try {
        move();
      } catch (const BudgetExceededError&) {  // leased, pinned or being loaded
      } catch (const PackNotFoundError&) {    // retired by another
      }
      check_leases();
      check_status();
    }
    for (std::size_t at = 0; at < ids_.size(); ++at) unpin(at);
  }
  bool is_sound() const { return n_wrong_ == 0; }

 private:
  void move() {
    const std::size_t at = random_() % ids_.size();
    const GenerationId id = ids_[at];
    switch (random_() % 12) {
      case 0:
        return packs_.evict(id);
      case 1:
        return packs_.pin(id);
      case 2:
      case 3:
        return packs_.unpin(id);
      case 4:
        return packs_.preload(id);
      case 5:
        packs_.load(id, PackClock::now() + std::chrono::milliseconds(2));
        return;
      case 6:
        packs_.retire(id);
        ids_[at] = packs_.open(paths_[at], "", "pack");
        return;
      case 7:
        packs_.begin_round();
        return;
      case 8:
      case 9:
        return held_.clear();
      default:
        return acquire(at);
    }
  }

  void acquire(std::size_t at) {
    const std::size_t other = random_() % ids_.size();
    std::vector<GenerationId> ids{ids_[at]};
    if (other != at && ids_[other] != ids[0]) ids.push_back(ids_[other]);
    std::vector<PackLease> leases;
    PackWait wait;
    const Acquired found = packs_.acquire(ids, leases, wait);
    require(leases.size() == (found == Acquired::kReady ? ids.size() : 0));
    for (PackLease& lease : leases) {
      const float marker = marker_of(lease);
      held_.emplace_back(std::move(lease), marker);
    }
    if (held_.size() > 3) held_.erase(held_.begin());
  }

  // A leased slot never changes, and holds what its generation is.
  void check_leases() {
    for (const auto& [lease, marker] : held_) {
      require(marker > 0.0f && marker_of(lease) == marker);
      const PackStatus status = packs_.status(lease.generation());
      require(status.state == PackState::kResident && status.slot == lease.slot());
      require(status.n_leases > 0);
      require(status.path == paths_[static_cast<std::size_t>(marker) - 1]);
    }
  }

  void check_status() {
    const ResidencyStatus status = packs_.status();
    std::int64_t n_bytes = 0;
    std::vector<std::pair<int, int>> slots;
    for (const PackStatus& pack : status.packs) {
      require((pack.state == PackState::kKnown) == (pack.slot == -1));
      require(pack.n_leases == 0 || pack.state == PackState::kResident);
      if (pack.slot > 0) n_bytes += pack.n_bytes;
      if (pack.slot > 0) slots.emplace_back(pack.pool, pack.slot);
    }
    std::ranges::sort(slots);
    require(std::ranges::adjacent_find(slots) == slots.end());
    require(status.used_bytes == n_bytes);
    require(n_bytes <= status.budget_bytes);
  }

  void unpin(std::size_t at) {
    try {
      packs_.unpin(ids_[at]);
    } catch (const PackNotFoundError&) {
    }
  }

  void require(bool is_so) { n_wrong_ += is_so ? 0 : 1; }  // doctest's checks are not for threads

  PackResidency& packs_;
  std::vector<std::atomic<GenerationId>>& ids_;
  const std::vector<std::string>& paths_;
  std::mt19937 random_;
  std::list<std::pair<PackLease, float>> held_;
  int n_wrong_ = 0;
};

}  // namespace

TEST_CASE("whatever several threads do, the budget holds and leased slots stay as they are") {
  TinyResidency t(3);
  std::vector<std::atomic<GenerationId>> ids(6);
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = t.open(static_cast<float>(i + 1), i < 4 ? 2 : 3);
    paths.push_back(t.files.back().path());
  }
  {
    std::list<Player> players;
    std::vector<std::thread> threads;
    for (unsigned seed = 1; seed <= 3; ++seed) players.emplace_back(t, ids, paths, seed);
    for (Player& player : players) threads.emplace_back([&] { player.play(600); });
    for (std::thread& thread : threads) thread.join();
    for (const Player& player : players) CHECK(player.is_sound());
  }
  for (const PackStatus& pack : t.packs.status().packs) CHECK(pack.n_leases == 0);
  CHECK(t.counts().n_failed_loads == 0);
  CHECK(t.counts().n_loads > 10);  // on a busy machine few are through in time
  t.packs.begin_round();           // without those who waited
  for (const std::string& path : paths) {
    const GenerationId id = t.packs.open(path, "", "pack");  // a slow player's may be retired since
    t.packs.unpin(id);
    CHECK(t.packs.load(id, patience()));  // nothing is stuck
  }
}
