#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "modularbase/packs/pack_status.h"
#include "modularbase/packs/slot_pool.h"

namespace modularbase {

class PackResidency;

/// A running request's hold on a generation: while it lives, the generation stays in its slot.
class PackLease {
 public:
  PackLease(PackResidency& owner, GenerationId generation, const SlotPool& pool, int slot,
            float scale)
      : owner_(&owner), generation_(generation), pool_(&pool), slot_(slot), scale_(scale) {}
  ~PackLease();
  PackLease(PackLease&& other) noexcept;
  PackLease& operator=(PackLease&& other) noexcept;

  GenerationId generation() const { return generation_; }
  const SlotPool& pool() const { return *pool_; }
  int slot() const { return slot_; }
  float scale() const { return scale_; }

 private:
  PackResidency* owner_;
  GenerationId generation_;
  const SlotPool* pool_;
  int slot_;
  float scale_;
};

/// When a request began to wait for packs: failures before that are not its own.
struct PackWait {
  std::uint64_t since = 0;
};

/// Decides which generations are in slots: a budget in bytes, least recently used first out,
/// leased and pinned ones never. Loads run in a thread of their own, those that requests wait for
/// before those that are guesses. Thread-safe.
class PackResidency {
 public:
  /// on_change is called, without locks, when a load ended or room may have come free.
  PackResidency(std::int64_t budget_bytes, const PackBase& base, const Backend& backend,
                std::function<void()> on_change);
  ~PackResidency();

  /// Checks a file and makes its generation known; the same content again is the same generation.
  /// \throws PackFormatError, PackIncompatibleError.
  GenerationId open(const std::string& path, const std::string& digest, const std::string& name);
  /// The same for a pack that was checked against base() already.
  GenerationId adopt(std::unique_ptr<const Pack> pack);
  /// No new leases; forgotten when the last one ends.
  void retire(GenerationId id);
  /// Loads and waits for it, at most until then; false when it is not there yet.
  /// \throws what the load failed with; BudgetExceededError when it can never fit.
  bool load(GenerationId id, PackClock::time_point until);
  /// Loads when nothing more urgent is to be done and room can be made.
  void preload(GenerationId id);
  /// \throws BudgetExceededError when it is leased or pinned.
  void evict(GenerationId id);
  void pin(GenerationId id);
  void unpin(GenerationId id);
  PackStatus status(GenerationId id) const;
  ResidencyStatus status() const;
  const PackBase& base() const { return base_; }
  /// Rests while the backend computes.
  Pacer pacer() const {
    return Pacer([this] { return backend_.is_computing(); });
  }

  enum class Acquired { kReady, kLoading, kNoRoom };
  /// Begins a round of acquire() in the order in which requests are served.
  void begin_round();
  /// Leases all of the generations, or none and sees to it that they are loaded. What an earlier
  /// request of the round waits for is not evicted for a later one.
  /// \throws what a load failed with since the wait began; PackNotFoundError; BudgetExceededError
  /// when they can never fit.
  Acquired acquire(std::span<const GenerationId> ids, std::vector<PackLease>& leases,
                   PackWait& wait);
  /// Leases a generation where it is resident.
  std::optional<PackLease> try_lease(GenerationId id);

 private:
  friend class PackLease;
  struct Generation;
  Generation& find(GenerationId id);
  const Generation& find(GenerationId id) const;
  PackLease lease(Generation& generation);
  int pool_for(const PackGeometry& geometry);
  void check_can_fit(std::span<const GenerationId> ids) const;
  bool want(Generation& generation);
  SlotPool& pool_at(int index) const { return *pools_[static_cast<std::size_t>(index)]; }
  bool find_victims(const Generation& generation, std::vector<Generation*>& victims) const;
  int free_slot(int pool) const;
  bool assign_slot(Generation& generation);
  void put_out(Generation& generation);
  bool is_evictable(const Generation& generation) const;
  std::size_t used_bytes() const;
  void release(GenerationId id);
  void forget_if_retired(Generation& generation);
  void run_loader();
  std::optional<GenerationId> next_load();
  void load_one(std::unique_lock<std::mutex>& lock, GenerationId id);
  PackStatus describe(const Generation& generation) const;

  const std::int64_t budget_bytes_;
  const PackBase base_;
  const Backend& backend_;
  const std::function<void()> on_change_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::vector<std::unique_ptr<SlotPool>> pools_;
  std::map<GenerationId, std::unique_ptr<Generation>> generations_;
  std::deque<GenerationId> urgent_;    // have their slot
  std::deque<GenerationId> preloads_;  // get one when their turn comes
  GenerationId last_id_ = 0;
  std::uint64_t clock_ = 0;  // ticks with every use, failure and wait
  std::uint64_t round_ = 0;
  ResidencyCounts counts_;
  bool stopping_ = false;

  std::thread loader_;  // last: starts when everything is there
};

}  // namespace modularbase
