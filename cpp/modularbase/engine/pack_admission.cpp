#include "modularbase/engine/pack_admission.h"

#include <algorithm>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

// So long, requests with packs that are there may overtake one that waits for room.
constexpr auto kPatience = std::chrono::milliseconds(500);

}  // namespace

void PackAdmission::begin_round(bool changed) {
  may_try_ = changed && residency_;
  is_full_ = false;
  if (may_try_) residency_->begin_round();
}

PackAdmission::Verdict PackAdmission::admit(Sequence& sequence) {
  const std::vector<PackChoice>& choices = sequence.spec.pack_choices;
  if (choices.empty() || sequence.has_packs) return Verdict::kReady;
  if (!may_try_ || is_full_) return Verdict::kWaits;
  while (sequence.pack_choice < choices.size()) {
    try {
      return try_choice(sequence, choices[sequence.pack_choice]);
    } catch (const std::exception& e) {
      sequence.error = std::current_exception();
      sequence.ticket->update(
          [&](RequestResult& result) { result.pack_errors.emplace_back(e.what()); });
      ++sequence.pack_choice;
      sequence.pack_wait = {};
    }
  }
  return Verdict::kFailed;
}

PackAdmission::Verdict PackAdmission::try_choice(Sequence& sequence, const PackChoice& choice) {
  std::vector<GenerationId> ids;
  ids.reserve(choice.packs.size());
  for (const PackUse& use : choice.packs) ids.push_back(use.generation);
  if (!ids.empty()) {
    const auto acquired = residency_->acquire(ids, sequence.leases, sequence.pack_wait);
    sequence.waits_for_room = acquired == PackResidency::Acquired::kNoRoom;
    if (sequence.waits_for_room && Clock::now() - sequence.submitted_at > kPatience) {
      is_full_ = true;
    }
    if (acquired != PackResidency::Acquired::kReady) return Verdict::kWaits;
  }
  take(sequence, choice);
  for (const NewMeaning& meaning : sequence.meanings) follow(sequence, meaning);
  return Verdict::kReady;
}

void PackAdmission::take(Sequence& sequence, const PackChoice& choice) {
  sequence.has_packs = true;
  sequence.pack_set.policy = sequence.spec.policy;
  bool is_below = false;
  for (std::size_t i = 0; i < choice.packs.size(); ++i) {
    const PackLease& lease = sequence.leases[i];
    sequence.pack_set.entries.push_back(
        {&lease.pool(), lease.slot(), choice.packs[i].weight, lease.scale()});
    is_below = is_below || reaches_below(lease);
  }
  if (!choice.packs.empty()) {
    const std::uint32_t context = context_of(sequence, choice);
    sequence.kv_context.upper = context;
    sequence.kv_context.lower = is_below ? context : 0;
    if (sequence.spec.activation == Activation::kFromHere) {
      sequence.kv_context.from = std::ssize(sequence.spec.prompt) - 1;
    }
  }
  sequence.ticket->update([&](RequestResult& result) {
    result.pack_choice = static_cast<std::int64_t>(sequence.pack_choice);
  });
}

bool PackAdmission::follow(Sequence& sequence, const NewMeaning& meaning) {
  if (sequence.spec.kind != RequestKind::kGenerate) return false;
  if (!sequence.has_packs) {
    sequence.meanings.push_back(meaning);
    return false;
  }
  const auto holds = [&](const PackLease& l) { return l.generation() == meaning.generation; };
  if (std::ranges::any_of(sequence.leases, holds)) return false;  // each pack once
  const auto& uses = sequence.spec.pack_choices[sequence.pack_choice].packs;
  const auto use = std::ranges::find(uses, meaning.name, &PackUse::name);
  if (use == uses.end()) return false;
  auto lease = residency_->try_lease(meaning.generation);
  if (lease) move(sequence, static_cast<std::size_t>(use - uses.begin()), std::move(*lease));
  return lease.has_value();
}

void PackAdmission::move(Sequence& sequence, std::size_t entry, PackLease lease) {
  PackSwitch change{.n_generated = sequence.n_generated,
                    .from = residency_->status(sequence.leases[entry].generation()).digest,
                    .to = residency_->status(lease.generation()).digest};
  PackSet::Entry& use = sequence.pack_set.entries[entry];
  use = {&lease.pool(), lease.slot(), use.weight, lease.scale()};
  sequence.kv_context.upper = KvContext::kMixed;
  if (sequence.kv_context.lower != 0 || reaches_below(lease)) {
    sequence.kv_context.lower = KvContext::kMixed;
  }
  sequence.leases[entry] = std::move(lease);
  sequence.ticket->update(
      [&](RequestResult& result) { result.pack_switches.push_back(std::move(change)); });
}

bool PackAdmission::reaches_below(const PackLease& lease) const {
  return lease.pool().geometry().sites.front() < split_;
}

std::uint32_t PackAdmission::context_of(const Sequence& sequence, const PackChoice& choice) {
  ContextKey key{.packs = {}, .policy = sequence.spec.policy};
  for (const PackUse& use : choice.packs) key.packs.emplace_back(use.generation, use.weight);
  const auto next = static_cast<std::uint32_t>(contexts_.size() + 1);
  return contexts_.try_emplace(std::move(key), next).first->second;
}

}  // namespace modularbase
