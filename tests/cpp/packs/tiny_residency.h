#pragma once

#include <doctest/doctest.h>

#include <condition_variable>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "cpp/packs/marked_pack.h"
#include "modularbase/packs/residency.h"

namespace modularbase::testing {

// Far longer than any load of these tests takes, even under a sanitizer on a busy machine.
inline PackClock::time_point patience() {
  return PackClock::now() + std::chrono::minutes(2);
}

inline std::int64_t small_slot_bytes(std::uint32_t n_expert = 2) {
  const TempFile file(marked_pack(0, n_expert).image());
  return static_cast<std::int64_t>(SlotLayout(PackFile::open(file.path()).geometry()).slot_bytes);
}

/// A residency with room for some small packs, on files of its own, and a loader that stops behind
/// a load when it is told to.
class TinyResidency {
 public:
  explicit TinyResidency(std::int64_t n_slots, std::int64_t more_bytes = 1000)
      : packs(n_slots * small_slot_bytes() + more_bytes, kSmallBase, backend_,
              [this] { changed(); }) {}
  ~TinyResidency() { let_go(); }

  GenerationId open(float marker, std::uint32_t n_expert = 2) {
    files.emplace_back(marked_pack(marker, n_expert).image());
    return packs.open(files.back().path(), "", "pack " + std::to_string(static_cast<int>(marker)));
  }

  /// The loader stops at the end of its next load, when that is in its slot.
  void hold_loader() {
    const std::lock_guard lock(mutex_);
    is_held_ = true;
  }
  void let_go() {
    const std::lock_guard lock(mutex_);
    is_held_ = false;
    let_go_.notify_all();
  }
  /// As a request that is alone: asks in round after round.
  std::vector<PackLease> lease(std::vector<GenerationId> ids) {
    std::vector<PackLease> leases;
    PackWait wait;
    eventually([&] {
      packs.begin_round();
      return packs.acquire(ids, leases, wait) == PackResidency::Acquired::kReady;
    });
    return leases;
  }
  static void eventually(const std::function<bool()>& is_so) {
    const auto until = patience();
    while (!is_so()) {
      REQUIRE(PackClock::now() < until);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  PackState state(GenerationId id) const { return packs.status(id).state; }
  bool is_resident(GenerationId id) const { return state(id) == PackState::kResident; }
  std::int64_t used_bytes() const { return packs.status().used_bytes; }
  ResidencyCounts counts() const { return packs.status().counts; }

  std::list<TempFile> files;

 private:
  void changed() {
    if (std::this_thread::get_id() == tester_) return;
    std::unique_lock lock(mutex_);
    let_go_.wait(lock, [&] { return !is_held_; });
  }

  const std::thread::id tester_ = std::this_thread::get_id();
  Backend backend_{"cpu", 1};
  std::mutex mutex_;
  std::condition_variable let_go_;
  bool is_held_ = false;

 public:
  PackResidency packs;  // last: its loader uses what is above
};

inline float marker_of(const PackLease& lease) {
  return marker_of(lease.pool(), lease.slot());
}

}  // namespace modularbase::testing
