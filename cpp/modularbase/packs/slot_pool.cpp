#include "modularbase/packs/slot_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::size_t kTensorsPerSite = 9;

}  // namespace

SlotPool::SlotPool(const PackGeometry& geometry, int n_slots, const Backend& backend)
    : geometry_(geometry),
      layout_(geometry),
      n_slots_(n_slots),
      ctx_(make_tensor_context(1 + kTensorsPerSite * geometry.sites.size())),
      ids_ctx_(make_tensor_context(1)) {
  slots_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_I8,
                              static_cast<std::int64_t>(layout_.slot_bytes), n_slots);
  ggml_set_name(slots_, "pack_slots");
  if (backend.is_cpu()) {
    map_host_memory();
  } else {
    buffer_ = backend.allocate(ctx_.get(), "the slots of packs");
    ggml_backend_buffer_clear(buffer_.get(), 0);
  }
  fill_expert_ids(backend);
  for (const SlotLayout::Site& site : layout_.sites) add_site(site);
}

SlotPool::~SlotPool() {
  if (mapping_.data) ::munmap(mapping_.data, mapping_.n_bytes);
}

void SlotPool::map_host_memory() {
  mapping_.n_bytes = ggml_nbytes(slots_);
  void* data = ::mmap(nullptr, mapping_.n_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    throw DeviceError("cpu: could not reserve " + std::to_string(mapping_.n_bytes) +
                      " bytes for packs");
  }
  mapping_.data = data;
  ::madvise(data, mapping_.n_bytes, MADV_HUGEPAGE);
  buffer_.reset(ggml_backend_cpu_buffer_from_ptr(data, mapping_.n_bytes));
  ggml_backend_buffer_set_usage(buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  ggml_backend_tensor_alloc(buffer_.get(), slots_, data);
}

void SlotPool::add_site(const SlotLayout::Site& at) {
  const auto& [n_embd, d_inner, d_ff, n_expert, n_used, layers, eps, adapter, expert] = geometry_;
  // A view of another type than its source: ggml makes views of the source's type, so the header
  // is written here.
  const auto view = [&](ggml_type type, std::size_t offset, std::size_t stride, std::int64_t ne0,
                        std::int64_t ne1, std::int64_t n) {
    Tensor tensor = ggml_new_tensor_3d(ctx_.get(), type, ne0, ne1, n);
    tensor->nb[2] = stride;
    tensor->nb[3] = stride * static_cast<std::size_t>(n);
    tensor->view_src = slots_;
    tensor->view_offs = offset;
    ggml_backend_view_init(tensor);
    return tensor;
  };
  const auto stacked = [&](ggml_type type, std::size_t offset, std::int64_t ne0, std::int64_t ne1) {
    return view(type, offset, layout_.slot_bytes, ne0, ne1, n_slots_);
  };
  const auto rows = [&](std::size_t offset, std::int64_t ne0) {
    Tensor tensor = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_F32, ne0, n_slots_);
    tensor->nb[1] = layout_.slot_bytes;
    tensor->nb[2] = tensor->nb[3] = layout_.slot_bytes * static_cast<std::size_t>(n_slots_);
    tensor->view_src = slots_;
    tensor->view_offs = offset;
    ggml_backend_view_init(tensor);
    return tensor;
  };
  const std::size_t n_matrices =
      static_cast<std::size_t>(n_slots_ - 1) * layout_.experts_per_slot() +
      static_cast<std::size_t>(n_expert);
  const auto experts = [&](std::size_t offset, std::int64_t n_in, std::int64_t n_out) {
    return view(expert, offset, layout_.expert_bytes, n_in, n_out,
                static_cast<std::int64_t>(n_matrices));
  };
  sites_.push_back({.in = stacked(adapter, at.in, n_embd, d_inner),
                    .norm = rows(at.norm, d_inner),
                    .router = stacked(GGML_TYPE_F32, at.router, d_inner, n_expert),
                    .token_gate = rows(at.token_gate, n_embd),
                    .token_bias = rows(at.token_bias, 1),
                    .expert_gate = experts(at.expert_gate, d_inner, d_ff),
                    .expert_up = experts(at.expert_up, d_inner, d_ff),
                    .expert_down = experts(at.expert_down, d_ff, d_inner),
                    .out = stacked(adapter, at.out, d_inner, n_embd),
                    .expert_ids = expert_ids_,
                    .n_expert_used = n_used,
                    .norm_eps = eps});
}

void SlotPool::fill_expert_ids(const Backend& backend) {
  expert_ids_ = ggml_new_tensor_2d(ids_ctx_.get(), GGML_TYPE_I32, geometry_.n_expert, n_slots_);
  ids_buffer_ = backend.allocate(ids_ctx_.get(), "the numbers of experts");
  std::vector<std::int32_t> ids;
  for (int slot = 0; slot < n_slots_; ++slot) {
    for (std::int64_t e = 0; e < geometry_.n_expert; ++e) {
      const auto first = static_cast<std::int64_t>(layout_.experts_per_slot()) * slot;
      ids.push_back(static_cast<std::int32_t>(first + e));
    }
  }
  ggml_backend_tensor_set(expert_ids_, ids.data(), 0, ggml_nbytes(expert_ids_));
}

int SlotPool::site_of_layer(int layer) const {
  const auto at = std::lower_bound(geometry_.sites.begin(), geometry_.sites.end(), layer);
  if (at == geometry_.sites.end() || *at != layer) return -1;
  return static_cast<int>(at - geometry_.sites.begin());
}

void SlotPool::write(int slot, const Pack& pack, Pacer pacer) {
  const std::size_t offset = static_cast<std::size_t>(slot) * layout_.slot_bytes;
  if (mapping_.data) {
    pack.copy_to({static_cast<std::byte*>(mapping_.data) + offset, layout_.slot_bytes},
                 std::move(pacer));
    return;
  }
  std::vector<std::byte> staging(layout_.slot_bytes);
  pack.copy_to(staging, std::move(pacer));
  ggml_backend_tensor_set(slots_, staging.data(), offset, staging.size());
}

void SlotPool::release_memory(int slot) {
  if (!mapping_.data) return;
  // Whole pages: a slot's first and last may be shared with its neighbours.
  constexpr std::size_t kPage = 4096;
  const std::size_t begin = static_cast<std::size_t>(slot) * layout_.slot_bytes;
  const std::size_t first = (begin + kPage - 1) / kPage * kPage;
  const std::size_t last = (begin + layout_.slot_bytes) / kPage * kPage;
  ::madvise(static_cast<std::byte*>(mapping_.data) + first, last - first, MADV_DONTNEED);
}

}  // namespace modularbase
