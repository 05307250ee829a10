// Who gets a slot, and the thread that fills it.
#include <algorithm>
#include <limits>

#include "modularbase/core/errors.h"
#include "modularbase/packs/generation.h"

namespace modularbase {

bool PackResidency::is_evictable(const Generation& generation) const {
  return generation.state == PackState::kResident && generation.n_leases == 0 &&
         !generation.is_pinned;
}

// The slot is free; what becomes of its memory is the caller's business.
void PackResidency::put_out(Generation& generation) {
  generation.state = PackState::kKnown;
  generation.slot = -1;
  ++counts_.n_evictions;
  if (generation.is_guess) ++counts_.n_preload_wastes;
  generation.is_guess = false;
}

bool PackResidency::find_victims(const Generation& generation,
                                 std::vector<Generation*>& victims) const {
  for (const auto& [_, other] : generations_) {
    const bool is_awaited = round_ > 0 && other->wanted_round == round_;
    if (is_evictable(*other) && !is_awaited) victims.push_back(other.get());
  }
  std::ranges::sort(victims, {}, &Generation::last_use);
  std::int64_t n_free = budget_bytes_ - static_cast<std::int64_t>(used_bytes());
  std::size_t n_victims = 0;
  while (n_free < generation.slot_bytes()) {
    if (n_victims == victims.size()) return false;
    n_free += victims[n_victims++]->slot_bytes();
  }
  victims.resize(n_victims);
  return true;
}

int PackResidency::free_slot(int pool) const {
  std::vector<bool> taken(static_cast<std::size_t>(pool_at(pool).n_slots()), false);
  for (const auto& [_, other] : generations_) {
    if (other->pool == pool && other->slot > 0) taken[static_cast<std::size_t>(other->slot)] = true;
  }
  const auto free = std::find(taken.begin() + 1, taken.end(), false);
  return free == taken.end() ? -1 : static_cast<int>(free - taken.begin());
}

// Gives a slot to a generation that has none. False when there is no room.
bool PackResidency::assign_slot(Generation& generation) {
  std::vector<Generation*> victims;
  if (!find_victims(generation, victims)) return false;
  int slot = -1;
  for (Generation* victim : victims) {
    // One slot is written over; the others would keep their pages, and the budget is about memory.
    if (slot < 0 && victim->pool == generation.pool) {
      slot = victim->slot;
    } else {
      pool_at(victim->pool).release_memory(victim->slot);
    }
    put_out(*victim);
  }
  if (slot < 0) slot = free_slot(generation.pool);
  if (slot < 0) return false;
  generation.slot = slot;
  generation.state = PackState::kLoading;
  return true;
}

bool PackResidency::want(Generation& generation) {
  if (generation.state != PackState::kKnown) return true;
  if (!assign_slot(generation)) return false;
  urgent_.push_back(generation.id);
  std::erase(preloads_, generation.id);
  changed_.notify_all();
  return true;
}

void PackResidency::check_can_fit(std::span<const GenerationId> ids) const {
  std::int64_t n_needed = 0;
  for (const GenerationId id : ids) n_needed += find(id).slot_bytes();
  std::int64_t n_pinned = 0;
  for (const auto& [id, other] : generations_) {
    const bool is_asked = std::find(ids.begin(), ids.end(), id) != ids.end();
    if (other->is_pinned && other->slot > 0 && !is_asked) n_pinned += other->slot_bytes();
  }
  if (n_needed + n_pinned <= budget_bytes_) return;
  throw BudgetExceededError(find(ids[0]).pack->name(), n_needed, budget_bytes_,
                            n_needed > budget_bytes_
                                ? "the budget is smaller than the packs of one request"
                                : std::to_string(n_pinned) + " bytes are pinned");
}

void PackResidency::begin_round() {
  const std::lock_guard lock(mutex_);
  ++round_;
  changed_.notify_all();  // what only a request that is gone waited for may be evicted now
}

PackResidency::Acquired PackResidency::acquire(std::span<const GenerationId> ids,
                                               std::vector<PackLease>& leases, PackWait& wait) {
  const std::lock_guard lock(mutex_);
  if (wait.since == 0) wait.since = ++clock_;
  for (const GenerationId id : ids) {
    const Generation& generation = find(id);
    if (generation.error && generation.failed_at > wait.since) {
      std::rethrow_exception(generation.error);
    }
  }
  check_can_fit(ids);
  const auto is_resident = [&](GenerationId id) { return find(id).state == PackState::kResident; };
  if (!std::all_of(ids.begin(), ids.end(), is_resident)) {
    for (const GenerationId id : ids) find(id).wanted_round = round_;
    const bool all = std::all_of(ids.begin(), ids.end(), [&](auto id) { return want(find(id)); });
    return all ? Acquired::kLoading : Acquired::kNoRoom;
  }
  for (const GenerationId id : ids) leases.push_back(lease(find(id)));
  return Acquired::kReady;
}

PackLease PackResidency::lease(Generation& generation) {
  ++generation.n_leases;
  ++generation.n_hits;
  generation.last_use = ++clock_;
  generation.used_at = PackClock::now();
  if (generation.is_guess) ++counts_.n_preload_hits;
  generation.is_guess = false;
  return {*this, generation.id, pool_at(generation.pool), generation.slot,
          generation.pack->scale()};
}

std::optional<PackLease> PackResidency::try_lease(GenerationId id) {
  const std::lock_guard lock(mutex_);
  const auto at = generations_.find(id);
  if (at == generations_.end() || at->second->state != PackState::kResident) return std::nullopt;
  return lease(*at->second);
}

bool PackResidency::load(GenerationId id, PackClock::time_point until) {
  std::unique_lock lock(mutex_);
  const std::uint64_t since = ++clock_;
  check_can_fit({&id, 1});
  for (;;) {
    Generation& generation = find(id);
    if (generation.state == PackState::kResident) return true;
    if (generation.error && generation.failed_at > since) {
      std::rethrow_exception(generation.error);
    }
    if (stopping_) throw CancelledError("the engine is closed");
    if (PackClock::now() >= until) return false;
    want(generation);
    changed_.wait_until(lock, until);
  }
}

// Urgent loads have their slot; a guess gets one now, if it can be had.
std::optional<GenerationId> PackResidency::next_load() {
  if (!urgent_.empty()) {
    const GenerationId id = urgent_.front();
    urgent_.pop_front();
    return id;
  }
  while (!preloads_.empty()) {
    const GenerationId id = preloads_.front();
    preloads_.pop_front();
    Generation& generation = find(id);
    if (generation.state != PackState::kKnown || !assign_slot(generation)) continue;
    generation.is_guess = true;
    ++counts_.n_preloads;
    return id;
  }
  return std::nullopt;
}

void PackResidency::run_loader() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const auto id = next_load();
    if (!id) {
      changed_.wait(lock);
      continue;
    }
    load_one(lock, *id);
    lock.unlock();
    on_change_();
    lock.lock();
  }
}

void PackResidency::load_one(std::unique_lock<std::mutex>& lock, GenerationId id) {
  Generation& generation = find(id);  // stays while it is loading
  SlotPool& pool = pool_at(generation.pool);
  std::exception_ptr error;
  std::string error_text;
  lock.unlock();
  const auto start = PackClock::now();
  try {
    pool.write(generation.slot, *generation.pack, pacer());
  } catch (const std::exception& e) {
    error = std::current_exception();
    error_text = e.what();
  }
  const auto end = PackClock::now();
  lock.lock();
  generation.load_us = std::chrono::duration<double, std::micro>(end - start).count();
  generation.error = error;
  generation.error_text = std::move(error_text);
  if (error) {
    generation.failed_at = ++clock_;
    pool.release_memory(generation.slot);  // it may be half written
    generation.state = PackState::kKnown;
    generation.slot = -1;
    generation.is_guess = false;
    ++counts_.n_failed_loads;
  } else {
    generation.state = PackState::kResident;
    generation.last_use = ++clock_;  // else it would be the first to go
    ++generation.n_loads;
    ++counts_.n_loads;
  }
  forget_if_retired(generation);
  changed_.notify_all();
}

}  // namespace modularbase
