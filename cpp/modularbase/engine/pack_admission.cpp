#include "modularbase/engine/pack_admission.h"

#include <numeric>

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
      sequence.pack_error = std::current_exception();
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
  return Verdict::kReady;
}

void PackAdmission::take(Sequence& sequence, const PackChoice& choice) {
  sequence.has_packs = true;
  sequence.pack_set.policy = sequence.spec.policy;
  const float total =
      std::accumulate(choice.packs.begin(), choice.packs.end(), 0.0f,
                      [](float sum, const PackUse& use) { return sum + use.weight; });
  // One pack keeps the weight it is given; several share the whole.
  const float norm = choice.packs.size() > 1 ? total : 1.0f;
  bool reaches_below = false;
  for (std::size_t i = 0; i < choice.packs.size(); ++i) {
    const PackLease& lease = sequence.leases[i];
    sequence.pack_set.entries.push_back(
        {&lease.pool(), lease.slot(), choice.packs[i].weight / norm, lease.scale()});
    reaches_below = reaches_below || lease.pool().geometry().sites.front() < split_;
  }
  if (!choice.packs.empty()) {
    const std::uint32_t context = context_of(sequence, choice);
    sequence.kv_context.upper = context;
    sequence.kv_context.lower = reaches_below ? context : 0;
    if (sequence.spec.activation == Activation::kFromHere) {
      sequence.kv_context.from = std::ssize(sequence.spec.prompt) - 1;
    }
  }
  sequence.ticket->update([&](RequestResult& result) {
    result.pack_choice = static_cast<std::int64_t>(sequence.pack_choice);
  });
}

std::uint32_t PackAdmission::context_of(const Sequence& sequence, const PackChoice& choice) {
  ContextKey key{.packs = {}, .policy = sequence.spec.policy};
  for (const PackUse& use : choice.packs) key.packs.emplace_back(use.generation, use.weight);
  const auto next = static_cast<std::uint32_t>(contexts_.size() + 1);
  return contexts_.try_emplace(std::move(key), next).first->second;
}

}  // namespace modularbase
