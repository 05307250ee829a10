#pragma once

#include <atomic>

#include "modularbase/kernels/pack_nodes.h"
#include "modularbase/kernels/pack_steps.h"

namespace modularbase::kernels {

inline float* floats(ggml_tensor* tensor) {
  return static_cast<float*>(tensor->data);
}

/// What the nodes of a site have in common.
class SiteNode : public CustomNode {
 public:
  SiteNode(const SiteWeights& site, PackPoolStep& step) : site_(site), step_(step) {}
  void reset() override { next_chunk_.store(0, std::memory_order_relaxed); }

 protected:
  SiteCall call(int nth) { return {site_, step_.uses, &next_chunk_, nth}; }

  const SiteWeights& site_;
  PackPoolStep& step_;

 private:
  std::atomic<int> next_chunk_{0};
};

}  // namespace modularbase::kernels
