#pragma once

#include <span>
#include <vector>

#include "modularbase/graph/site_weights.h"
#include "modularbase/packs/pack.h"

namespace modularbase {

/// Memory for packs of one geometry, and tensors that stack its slots, for graphs to index. Slot 0
/// is the zero pack: all weights zero, it changes nothing. Slots hold no memory until written.
/// Which slot holds what, and who may write it, is PackResidency's business.
class SlotPool {
 public:
  /// n_slots includes the zero slot.
  SlotPool(const PackGeometry& geometry, int n_slots, const Backend& backend);
  ~SlotPool();
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  const PackGeometry& geometry() const { return geometry_; }
  const SlotLayout& layout() const { return layout_; }
  int n_slots() const { return n_slots_; }

  const SiteWeights& site(std::size_t i) const { return sites_[i]; }
  /// Index of a layer among geometry().sites, or -1.
  int site_of_layer(int layer) const;

  /// Loads a pack into a slot that no one reads, with rests. Any thread.
  void write(int slot, const Pack& pack, Pacer pacer = {});
  /// Gives the memory of a slot that no one reads back to the system, where it can be.
  void release_memory(int slot);

 private:
  struct Mapping {
    void* data = nullptr;
    std::size_t n_bytes = 0;
  };
  void map_host_memory();
  void add_site(const SlotLayout::Site& at);
  void fill_expert_ids(const Backend& backend);

  const PackGeometry geometry_;
  const SlotLayout layout_;
  const int n_slots_;
  Mapping mapping_;  // of a CPU's slots: fresh pages are zero and cost nothing until touched
  ContextPtr ctx_;
  ContextPtr ids_ctx_;
  BufferPtr buffer_;
  BufferPtr ids_buffer_;
  Tensor slots_ = nullptr;  // I8 [slot_bytes, S]
  Tensor expert_ids_ = nullptr;
  std::vector<SiteWeights> sites_;
};

}  // namespace modularbase
