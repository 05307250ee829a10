#pragma once

#include <atomic>

#include "modularbase/kernels/pack_route.h"

/// The parts of a site's computation, as the nodes of pack_nodes.h put them together. Functions
/// that take a counter (zero before the call) share their work among the threads that call them.
namespace modularbase::kernels {

/// One part's site, uses and share of the work.
struct SiteCall {
  const SiteWeights& site;
  const PackUses& uses;
  std::atomic<int>* next_chunk;
  int nth;
};

/// x [n_embd, n_rows] -> W_in x [d_inner, n_uses]
void site_in(const SiteCall& call, const float* x, float* z);
/// z [d_inner, n_uses] -> silu(W_gate z) * (W_up z) of the chosen experts
/// [d_ff, n_expert_used * n_uses]
void site_expert_up(const SiteCall& call, const PackRoutes& routes, const float* z, float* hidden);
/// [d_ff, n_expert_used * n_uses] -> W_down of the chosen experts [d_inner, n_expert_used * n_uses]
void site_expert_down(const SiteCall& call, const PackRoutes& routes, const float* hidden,
                      float* parts);
/// y = z + sum of the chosen experts' parts, each times its gain, for the uses [begin, end).
void site_mix(const SiteWeights& site, const PackRoutes& routes, const float* z, const float* parts,
              std::int64_t begin, std::int64_t end, float* y);
/// y [d_inner, n_uses] -> W_out y [n_embd, n_uses]
void site_out(const SiteCall& call, const float* y, float* delta);
/// h [n_embd, n_rows] += amount * W_out y of each use, in its row; no row has two uses.
void site_out_add(const SiteCall& call, const float* y, const float* amounts, float* h);

}  // namespace modularbase::kernels
