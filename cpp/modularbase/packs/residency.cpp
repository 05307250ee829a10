#include "modularbase/packs/residency.h"

#include <algorithm>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/packs/file_pack.h"
#include "modularbase/packs/generation.h"

namespace modularbase {
namespace {

constexpr int kMaxSlots = 4096;

}  // namespace

PackLease::~PackLease() {
  if (owner_) owner_->release(generation_);
}

PackLease::PackLease(PackLease&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)),
      generation_(other.generation_),
      pool_(other.pool_),
      slot_(other.slot_),
      scale_(other.scale_) {}

PackLease& PackLease::operator=(PackLease&& other) noexcept {
  std::swap(owner_, other.owner_);
  generation_ = std::exchange(other.generation_, generation_);
  pool_ = other.pool_;
  slot_ = other.slot_;
  scale_ = other.scale_;
  return *this;
}

PackResidency::PackResidency(std::int64_t budget_bytes, const PackBase& base,
                             const Backend& backend, std::function<void()> on_change)
    : budget_bytes_(budget_bytes),
      base_(base),
      backend_(backend),
      on_change_(std::move(on_change)),
      loader_([this] { run_loader(); }) {}

PackResidency::~PackResidency() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  loader_.join();
}

PackResidency::Generation& PackResidency::find(GenerationId id) {
  return const_cast<Generation&>(std::as_const(*this).find(id));
}

const PackResidency::Generation& PackResidency::find(GenerationId id) const {
  const auto at = generations_.find(id);
  if (at == generations_.end()) {
    throw PackNotFoundError("generation #" + std::to_string(id), "", {});
  }
  return *at->second;
}

GenerationId PackResidency::open(const std::string& path, const std::string& digest,
                                 const std::string& name) {
  // Slow: without the lock, and beside those who compute.
  return adopt(FilePack::open(path, digest, name, base_, pacer()));
}

GenerationId PackResidency::adopt(std::unique_ptr<const Pack> pack) {
  const std::lock_guard lock(mutex_);
  for (auto& [id, known] : generations_) {
    if (known->pack->digest() == pack->digest()) {
      known->is_retired = false;
      return id;
    }
  }
  const GenerationId id = ++last_id_;
  auto generation = std::make_unique<Generation>();
  generation->id = id;
  generation->pool = pool_for(pack->geometry());
  generation->pack = std::move(pack);
  generations_[id] = std::move(generation);
  return id;
}

int PackResidency::pool_for(const PackGeometry& geometry) {
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    if (pools_[i]->geometry() == geometry) return static_cast<int>(i);
  }
  const auto slot_bytes = static_cast<std::int64_t>(SlotLayout(geometry).slot_bytes);
  const std::int64_t n_slots = std::min<std::int64_t>(budget_bytes_ / slot_bytes, kMaxSlots);
  pools_.push_back(std::make_unique<SlotPool>(geometry, static_cast<int>(n_slots) + 1, backend_));
  return static_cast<int>(pools_.size()) - 1;
}

void PackResidency::retire(GenerationId id) {
  {
    const std::lock_guard lock(mutex_);
    Generation& generation = find(id);
    generation.is_retired = true;
    forget_if_retired(generation);
  }
  on_change_();
}

void PackResidency::forget_if_retired(Generation& generation) {
  if (!generation.is_retired || generation.n_leases > 0) return;
  if (generation.state == PackState::kLoading) return;  // the loader forgets it
  if (generation.state == PackState::kResident) {
    pool_at(generation.pool).release_memory(generation.slot);
    put_out(generation);
  }
  const GenerationId id = generation.id;
  std::erase(preloads_, id);
  generations_.erase(id);
}

void PackResidency::preload(GenerationId id) {
  const std::lock_guard lock(mutex_);
  if (find(id).state != PackState::kKnown) return;
  if (std::find(preloads_.begin(), preloads_.end(), id) != preloads_.end()) return;
  preloads_.push_back(id);
  changed_.notify_all();
}

void PackResidency::evict(GenerationId id) {
  {
    const std::lock_guard lock(mutex_);
    Generation& generation = find(id);
    if (generation.state == PackState::kKnown) return;
    if (!is_evictable(generation)) {
      throw BudgetExceededError(generation.pack->name(), generation.slot_bytes(), budget_bytes_,
                                generation.state == PackState::kLoading ? "it is being loaded"
                                : generation.is_pinned                  ? "it is pinned"
                                                                        : "requests are using it");
    }
    pool_at(generation.pool).release_memory(generation.slot);
    put_out(generation);
    changed_.notify_all();
  }
  on_change_();
}

void PackResidency::pin(GenerationId id) {
  const std::lock_guard lock(mutex_);
  find(id).is_pinned = true;
}

void PackResidency::unpin(GenerationId id) {
  {
    const std::lock_guard lock(mutex_);
    find(id).is_pinned = false;
    changed_.notify_all();
  }
  on_change_();
}

void PackResidency::release(GenerationId id) {
  {
    const std::lock_guard lock(mutex_);
    Generation& generation = *generations_.at(id);  // there: this lease keeps it
    --generation.n_leases;
    generation.last_use = ++clock_;
    generation.used_at = PackClock::now();
    forget_if_retired(generation);
    changed_.notify_all();
  }
  on_change_();
}

std::size_t PackResidency::used_bytes() const {
  std::size_t n = 0;
  for (const auto& [_, generation] : generations_) {
    if (generation->slot > 0) n += generation->pack->layout().slot_bytes;
  }
  return n;
}

PackStatus PackResidency::describe(const Generation& g) const {
  PackStatus status;
  status.id = g.id;
  status.name = g.pack->name();
  status.path = g.pack->path();
  status.digest = g.pack->digest();
  status.state = g.state;
  status.n_bytes = g.slot_bytes();
  status.pool = g.pool;
  status.slot = g.slot;
  status.n_leases = g.n_leases;
  status.is_pinned = g.is_pinned;
  status.is_retired = g.is_retired;
  status.n_hits = g.n_hits;
  status.n_loads = g.n_loads;
  if (g.n_hits > 0) {
    status.idle_s = std::chrono::duration<double>(PackClock::now() - g.used_at).count();
  }
  status.verify_us = g.pack->verify_us();
  status.load_us = g.load_us;
  status.last_error = g.error_text;
  return status;
}

PackStatus PackResidency::status(GenerationId id) const {
  const std::lock_guard lock(mutex_);
  return describe(find(id));
}

ResidencyStatus PackResidency::status() const {
  const std::lock_guard lock(mutex_);
  ResidencyStatus status;
  status.budget_bytes = budget_bytes_;
  status.used_bytes = static_cast<std::int64_t>(used_bytes());
  status.counts = counts_;
  for (const auto& [_, generation] : generations_) status.packs.push_back(describe(*generation));
  return status;
}

}  // namespace modularbase
