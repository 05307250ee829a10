#include "modularbase/graph/backend.h"

#include <sys/mman.h>

#include <cstdint>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::chrono::milliseconds kBetweenSteps{2};

ggml_backend_t init_gpu() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
  return device ? ggml_backend_dev_init(device, nullptr) : nullptr;
}

// Weights and KV are read whole, step after step: with 4 KiB pages the address translation is what
// they wait for. A hint; where the system refuses, nothing changes.
void prefer_large_pages([[maybe_unused]] void* base, [[maybe_unused]] std::size_t n_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2u << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(base) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(base) + n_bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

ContextPtr make_tensor_context(std::size_t n_tensors) {
  const ggml_init_params params{
      .mem_size = n_tensors * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true};
  return ContextPtr(ggml_init(params));
}

std::vector<std::string> cpu_features() {
  const std::pair<const char*, int> known[] = {
      {"AVX2", ggml_cpu_has_avx2()},
      {"F16C", ggml_cpu_has_f16c()},
      {"FMA", ggml_cpu_has_fma()},
      {"AVX512", ggml_cpu_has_avx512()},
      {"AVX512_VNNI", ggml_cpu_has_avx512_vnni()},
      {"AVX512_BF16", ggml_cpu_has_avx512_bf16()},
      {"AMX_INT8", ggml_cpu_has_amx_int8()},
      {"NEON", ggml_cpu_has_neon()},
      {"DOTPROD", ggml_cpu_has_dotprod()},
      {"SVE", ggml_cpu_has_sve()},
  };
  std::vector<std::string> names;
  for (const auto& [name, present] : known) {
    if (present) names.emplace_back(name);
  }
  return names;
}

Backend::Backend(const std::string& device, int n_threads) : n_threads_(n_threads) {
  if (device != "cpu" && device != "cuda" && device != "auto") {
    throw DeviceError("device: expected 'auto', 'cpu' or 'cuda', found '" + device + "'");
  }
  if (device != "cpu") {
    handle_.reset(init_gpu());
    is_cpu_ = handle_ == nullptr;
    if (is_cpu_ && device == "cuda") {
      throw DeviceError("device 'cuda': no GPU backend in this build, or no GPU found");
    }
  }
  if (is_cpu_) {
    handle_.reset(ggml_backend_cpu_init());
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    threadpool_.reset(ggml_threadpool_new(&params));
    if (!handle_ || !threadpool_) throw DeviceError("cpu: could not start the compute threads");
    ggml_backend_cpu_set_n_threads(handle_.get(), n_threads);
    ggml_backend_cpu_set_threadpool(handle_.get(), threadpool_.get());
  }
}

std::string Backend::name() const {
  return ggml_backend_name(handle_.get());
}

BufferPtr Backend::allocate(ggml_context* ctx, const std::string& what) const {
  BufferPtr buffer(ggml_backend_alloc_ctx_tensors(ctx, handle_.get()));
  if (!buffer) throw DeviceError(name() + ": could not allocate " + what);
  if (is_cpu_)
    prefer_large_pages(ggml_backend_buffer_get_base(buffer.get()),
                       ggml_backend_buffer_get_size(buffer.get()));
  return buffer;
}

GallocrPtr Backend::make_allocator() const {
  return GallocrPtr(ggml_gallocr_new(ggml_backend_get_default_buffer_type(handle_.get())));
}

void Backend::expect_can_compute(const ggml_tensor* node) const {
  if (ggml_backend_supports_op(handle_.get(), node)) return;
  throw DeviceError(name() + ": cannot compute " + ggml_op_desc(node) + " (node '" +
                    ggml_get_name(node) + "')");
}

bool Backend::is_computing() const {
  return computes_ || std::chrono::steady_clock::now() - ended_at_.load() < kBetweenSteps;
}

void Backend::compute(ggml_cgraph* graph) {
  computes_ = true;
  const ggml_status status = ggml_backend_graph_compute(handle_.get(), graph);
  ended_at_ = std::chrono::steady_clock::now();
  computes_ = false;
  if (status != GGML_STATUS_SUCCESS) {
    throw DeviceError(name() + ": graph failed: " + ggml_status_to_string(status));
  }
}

}  // namespace modularbase
