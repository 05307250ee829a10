#include "modularbase/kernels/certified_head.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <thread>

#include "modularbase/kernels/head_layout.h"
#include "modularbase/kernels/head_product.h"
#include "modularbase/kernels/head_scan.h"

namespace modularbase::kernels {
namespace {

constexpr std::int64_t kTilesPerChunk = 32;
constexpr std::int64_t kIdsPerChunk = 32;
constexpr std::int64_t kProbesPerTop =
    3;  // bounds and logits do not rank alike: more probes than top_k find
constexpr std::int64_t kSpareProbes = 8;  // a threshold nearer to the top_k-th logit
constexpr std::int64_t kGroupsPerProbe =
    4;  // keeps the number of tokens above the cut near the number of probes
constexpr std::int64_t kMinCandidates = 256;
constexpr std::int64_t kCandidateShare =
    4;  // beyond n_vocab / 4 the full product, read in order, is faster
constexpr int kSpinsBeforeYield = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

class SpinLock {
 public:
  void lock() {
    while (flag_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  void unlock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag flag_ = ATOMIC_FLAG_INIT;
};

/// What is kept to choose the candidates of one row.
struct RowChoice {
  std::vector<float> group_max;
  std::vector<TokenId> probes;
  std::vector<float> probe_logits;
  std::vector<TokenId> forced;
};

std::int64_t max_candidates(std::int64_t n_vocab) {
  return std::max(kMinCandidates, n_vocab / kCandidateShare);
}

}  // namespace

class HeadWorkspace {
 public:
  std::vector<HeadRow> rows;
  std::int64_t n_rows = 0;
  std::vector<ScanRow> scan;              // [n_rows]
  std::vector<RowChoice> choice;          // [n_rows]
  std::vector<float> upper;               // [n_tiles * kTileRows, n_rows]
  std::vector<float> tile_max;            // [n_tiles, n_rows]
  std::vector<std::int64_t> open;         // rows whose query the screen can answer
  std::vector<const ScanRow*> open_scan;  // [open]
  std::vector<float*> open_upper;         // [open]
  std::vector<float*> open_tile_max;      // [open]

  SpinLock begin;  // the first thread of a step lays the workspace out while the others wait
  std::atomic<std::int64_t> next_tile{0};
  std::atomic<std::int64_t> n_tiles_left{0};
  std::atomic<std::int64_t> next_choice{0};
};

namespace {

bool can_answer(const HeadQuery& query, std::int64_t n_vocab) {
  const bool ids_valid = std::all_of(query.forced.begin(), query.forced.end(),
                                     [&](TokenId id) { return id >= 0 && id < n_vocab; });
  return !query.all && query.top_k <= max_candidates(n_vocab) && query.max_drop >= 0.0f &&
         ids_valid;
}

void begin_step(const CertifiedHeadArgs& args) {
  HeadWorkspace& space = *args.workspace;
  const HeadScreen::Data& screen = args.screen->data();
  const auto n_rows = static_cast<std::size_t>(args.n_rows);
  const std::int64_t stride = screen.n_tiles * kTileRows;
  if (space.rows.size() < n_rows) {
    space.rows.resize(n_rows);
    space.scan.resize(n_rows);
    space.choice.resize(n_rows);
  }
  // Sizes only grow: a smaller step leaves the tail as it is.
  space.upper.resize(std::max(space.upper.size(), n_rows * static_cast<std::size_t>(stride)));
  space.tile_max.resize(
      std::max(space.tile_max.size(), n_rows * static_cast<std::size_t>(screen.n_tiles)));
  space.n_rows = args.n_rows;
  space.open.clear();
  space.open_scan.clear();
  space.open_upper.clear();
  space.open_tile_max.clear();
  for (std::int64_t i = 0; i < args.n_rows; ++i) {
    HeadRow& row = space.rows[i];
    row.ids.clear();
    row.logits.clear();
    row.certified = args.queries[i].none;
    if (row.certified || !can_answer(args.queries[i], screen.n_vocab)) continue;
    prepare_scan_row(*args.head, screen, args.x + i * screen.n_embd, rest_planes(args.n_rows),
                     space.scan[i]);
    if (!space.scan[i].bounded) continue;
    space.open.push_back(i);
    space.open_scan.push_back(&space.scan[i]);
    space.open_upper.push_back(space.upper.data() + i * stride);
    space.open_tile_max.push_back(space.tile_max.data() + i * screen.n_tiles);
  }
  space.next_tile.store(0, std::memory_order_relaxed);
  space.n_tiles_left.store(space.open.empty() ? 0 : screen.n_tiles, std::memory_order_relaxed);
  space.next_choice.store(0, std::memory_order_relaxed);
}

void scan(const HeadScreen::Data& screen, HeadWorkspace& space) {
  if (space.open.empty()) return;
  for (std::int64_t first; (first = space.next_tile.fetch_add(kTilesPerChunk)) < screen.n_tiles;) {
    const std::int64_t end = std::min(first + kTilesPerChunk, screen.n_tiles);
    scan_tiles(screen, space.open_scan.data(), static_cast<int>(space.open.size()),
               rest_planes(space.n_rows), first, end, space.open_upper.data(),
               space.open_tile_max.data());
    space.n_tiles_left.fetch_sub(end - first, std::memory_order_acq_rel);
  }
  for (int spins = 0; space.n_tiles_left.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins > kSpinsBeforeYield) std::this_thread::yield();
  }
}

/// Visits the tokens whose upper bound is at least threshold, in ascending order, while visit
/// returns true.
template <class Visit>
void visit_above(const HeadScreen::Data& screen, const float* upper, const float* tile_max,
                 float threshold, Visit visit) {
  for (std::int64_t tile = 0; tile < screen.n_tiles; ++tile) {
    if (tile_max[tile] < threshold) continue;
    const std::int64_t first = tile * kTileRows;
    const std::int64_t end = std::min(first + kTileRows, screen.n_vocab);
    for (std::int64_t id = first; id < end; ++id) {
      if (upper[id] >= threshold && !visit(static_cast<TokenId>(id))) return;
    }
  }
}

/// At least min(n, n_vocab) tokens with large upper bounds. Each group of tiles has one token that
/// reaches the group's maximum, so the n-th largest maximum is a cut that n tokens pass.
void choose_probes(const HeadScreen::Data& screen, const float* upper, const float* tile_max,
                   std::int64_t n, RowChoice& choice) {
  const std::int64_t group = std::max<std::int64_t>(1, screen.n_tiles / (kGroupsPerProbe * n));
  choice.group_max.clear();
  for (std::int64_t tile = 0; tile < screen.n_tiles; tile += group) {
    choice.group_max.push_back(
        *std::max_element(tile_max + tile, tile_max + std::min(tile + group, screen.n_tiles)));
  }
  float cut = -kInfinity;
  if (n <= static_cast<std::int64_t>(choice.group_max.size())) {
    const auto nth = choice.group_max.begin() + (n - 1);
    std::nth_element(choice.group_max.begin(), nth, choice.group_max.end(), std::greater<>());
    cut = *nth;
  }
  choice.probes.clear();
  visit_above(screen, upper, tile_max, cut, [&](TokenId id) {
    choice.probes.push_back(id);
    return true;
  });
  if (static_cast<std::int64_t>(choice.probes.size()) <= n) return;
  std::nth_element(choice.probes.begin(), choice.probes.begin() + (n - 1), choice.probes.end(),
                   [&](TokenId a, TokenId b) { return upper[a] > upper[b]; });
  choice.probes.resize(static_cast<std::size_t>(n));
}

/// A value that every token of the answer reaches: what some tokens exactly reach is below or at
/// what the best reach.
float probe_threshold(const HeadQuery& query, std::vector<float>& logits) {
  if (std::any_of(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); }))
    return -kInfinity;
  const auto kth =
      std::clamp<std::int64_t>(query.top_k, 1, static_cast<std::int64_t>(logits.size())) - 1;
  std::nth_element(logits.begin(), logits.begin() + kth, logits.end(), std::greater<>());
  const float best = *std::max_element(logits.begin(), logits.end());
  const float lowest = std::nextafter(best - query.max_drop, -kInfinity);
  return std::min(logits[kth], lowest);
}

void add_forced(const HeadQuery& query, RowChoice& choice, HeadRow& row) {
  if (query.forced.empty()) return;
  choice.forced = query.forced;
  std::sort(choice.forced.begin(), choice.forced.end());
  const auto n = static_cast<std::ptrdiff_t>(row.ids.size());
  row.ids.insert(row.ids.end(), choice.forced.begin(), choice.forced.end());
  std::inplace_merge(row.ids.begin(), row.ids.begin() + n, row.ids.end());
  row.ids.erase(std::unique(row.ids.begin(), row.ids.end()), row.ids.end());
}

void choose_candidates(const CertifiedHeadArgs& args, std::int64_t i) {
  HeadWorkspace& space = *args.workspace;
  const HeadScreen::Data& screen = args.screen->data();
  const HeadQuery& query = args.queries[i];
  const float* upper = space.upper.data() + i * screen.n_tiles * kTileRows;
  const float* tile_max = space.tile_max.data() + i * screen.n_tiles;
  RowChoice& choice = space.choice[i];
  HeadRow& row = space.rows[i];

  const std::int64_t n_probes = std::min<std::int64_t>(
      kProbesPerTop * std::max(query.top_k, 1) + kSpareProbes, screen.n_vocab);
  choose_probes(screen, upper, tile_max, n_probes, choice);
  choice.probe_logits.resize(choice.probes.size());
  product_logits(*args.head, space.scan[i].product, choice.probes, choice.probe_logits.data());
  const float threshold = probe_threshold(query, choice.probe_logits);

  const auto limit = static_cast<std::size_t>(max_candidates(screen.n_vocab));
  row.certified = true;
  visit_above(screen, upper, tile_max, threshold, [&](TokenId id) {
    row.certified = row.ids.size() < limit;
    if (row.certified) row.ids.push_back(id);
    return row.certified;
  });
  if (!row.certified) return row.ids.clear();
  add_forced(query, choice, row);
  row.logits.resize(row.ids.size());
}

}  // namespace

void HeadWorkspaceDeleter::operator()(HeadWorkspace* workspace) const {
  delete workspace;
}

HeadWorkspacePtr make_head_workspace() {
  return HeadWorkspacePtr(new HeadWorkspace);
}

std::span<const HeadRow> head_rows(const HeadWorkspace& workspace) {
  return {workspace.rows.data(), static_cast<std::size_t>(workspace.n_rows)};
}

void head_screen(const CertifiedHeadArgs& args, int /*ith*/, int /*nth*/) {
  HeadWorkspace& space = *args.workspace;
  space.begin.lock();
  if (args.next_chunk->fetch_add(1) == 0) begin_step(args);
  space.begin.unlock();
  scan(args.screen->data(), space);
  const auto n_open = static_cast<std::int64_t>(space.open.size());
  for (std::int64_t next; (next = space.next_choice.fetch_add(1)) < n_open;) {
    choose_candidates(args, space.open[next]);
  }
}

void head_refine(const CertifiedHeadArgs& args, int /*ith*/, int /*nth*/) {
  HeadWorkspace& space = *args.workspace;
  std::int64_t chunk = args.next_chunk->fetch_add(1);
  std::int64_t first_chunk = 0;  // of the row at hand
  for (std::int64_t i = 0; i < args.n_rows; ++i) {
    HeadRow& row = space.rows[i];
    const auto n_ids = static_cast<std::int64_t>(row.ids.size());
    const std::int64_t end_chunk = first_chunk + (n_ids + kIdsPerChunk - 1) / kIdsPerChunk;
    for (; chunk < end_chunk; chunk = args.next_chunk->fetch_add(1)) {
      const std::int64_t first = (chunk - first_chunk) * kIdsPerChunk;
      const std::int64_t n = std::min(kIdsPerChunk, n_ids - first);
      const std::span<const TokenId> ids(row.ids.data() + first, static_cast<std::size_t>(n));
      product_logits(*args.head, space.scan[i].product, ids, row.logits.data() + first);
    }
    first_chunk = end_chunk;
  }
}

}  // namespace modularbase::kernels
