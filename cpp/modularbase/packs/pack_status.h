#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace modularbase {

using GenerationId = std::int32_t;
using PackClock = std::chrono::steady_clock;

enum class PackState { kKnown, kLoading, kResident };

/// What is known of one generation.
struct PackStatus {
  GenerationId id = 0;
  std::string name;
  std::string path;
  std::string digest;
  PackState state = PackState::kKnown;
  std::int64_t n_bytes = 0;  // of its slot
  int pool = -1;             // packs of one geometry share a pool
  int slot = -1;             // when resident
  int n_leases = 0;
  bool is_pinned = false;
  bool is_retired = false;
  std::int64_t n_hits = 0;   // leases given
  std::int64_t n_loads = 0;  // into a slot
  double idle_s = -1.0;      // since the last lease ended or began; -1: never leased
  double verify_us = 0.0;    // checking the file, once
  double load_us = 0.0;      // last copy into a slot
  std::string last_error;    // of the last load, when it failed
};

/// Counters since the engine started.
struct ResidencyCounts {
  std::int64_t n_loads = 0;
  std::int64_t n_evictions = 0;
  std::int64_t n_failed_loads = 0;
  std::int64_t n_preloads = 0;        // loads that were guesses
  std::int64_t n_preload_hits = 0;    // of those, leased before they were evicted
  std::int64_t n_preload_wastes = 0;  // of those, evicted before they were leased
};

struct ResidencyStatus {
  std::int64_t budget_bytes = 0;
  std::int64_t used_bytes = 0;
  std::vector<PackStatus> packs;
  ResidencyCounts counts;
};

}  // namespace modularbase
