#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "modularbase/engine/sequence.h"
#include "modularbase/packs/residency.h"

namespace modularbase {

/// Gets waiting requests the packs they ask for: leases, the set their rows use, and the context
/// that their KV is known under. Falls back along a request's choices. Engine thread only.
class PackAdmission {
 public:
  /// \param residency null: no packs.
  /// \param split the last layer whose KV packs above do not change.
  PackAdmission(PackResidency* residency, int split) : residency_(residency), split_(split) {}

  /// Begins a round over the waiting requests, in the order in which they came.
  /// \param changed whether a load ended, room came free or a request came since the last round.
  void begin_round(bool changed);

  enum class Verdict { kReady, kWaits, kFailed };
  /// kFailed: none of the choices can be had; the last error is in sequence.error.
  Verdict admit(Sequence& sequence);

  /// Lets a generation request that asked for a name go on with what it means now, where that is
  /// resident; one that has no packs yet does so when it gets them. Its KV is then of several
  /// generations, and shared with nobody. Whether it moved now.
  bool follow(Sequence& sequence, const NewMeaning& meaning);

 private:
  Verdict try_choice(Sequence& sequence, const PackChoice& choice);
  void take(Sequence& sequence, const PackChoice& choice);
  void move(Sequence& sequence, std::size_t entry, PackLease lease);
  bool reaches_below(const PackLease& lease) const;
  std::uint32_t context_of(const Sequence& sequence, const PackChoice& choice);

  /// What decides the KV of a set of packs.
  struct ContextKey {
    std::vector<std::pair<GenerationId, float>> packs;
    kernels::MergePolicy policy;
    auto operator<=>(const ContextKey&) const = default;
  };
  PackResidency* residency_;
  const int split_;
  bool may_try_ = false;
  bool is_full_ = false;  // a request has waited too long for room: no others before it
  std::map<ContextKey, std::uint32_t> contexts_;
};

}  // namespace modularbase
