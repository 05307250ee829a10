#pragma once

#include <exception>
#include <memory>
#include <string>

#include "modularbase/packs/residency.h"

namespace modularbase {

/// One immutable content of a pack, and where it is.
struct PackResidency::Generation {
  GenerationId id = 0;
  std::unique_ptr<const Pack> pack;
  int pool = -1;
  PackState state = PackState::kKnown;
  int slot = -1;  // from the moment a load is decided
  int n_leases = 0;
  bool is_pinned = false;
  bool is_retired = false;
  bool is_guess = false;           // loaded by prediction and not leased since
  std::uint64_t last_use = 0;      // ticks of the residency's clock
  std::uint64_t wanted_round = 0;  // last round in which a request waited for it
  std::uint64_t failed_at = 0;
  std::exception_ptr error;  // of the last load
  std::string error_text;
  PackClock::time_point used_at;
  std::int64_t n_hits = 0;
  std::int64_t n_loads = 0;
  double load_us = 0.0;

  std::int64_t slot_bytes() const { return static_cast<std::int64_t>(pack->layout().slot_bytes); }
};

}  // namespace modularbase
