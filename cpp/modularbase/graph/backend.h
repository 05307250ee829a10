#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace modularbase {

template <auto Free>
struct GgmlDeleter {
  template <class T>
  void operator()(T* object) const {
    Free(object);
  }
};
using ContextPtr = std::unique_ptr<ggml_context, GgmlDeleter<ggml_free>>;
using BufferPtr = std::unique_ptr<ggml_backend_buffer, GgmlDeleter<ggml_backend_buffer_free>>;
using GallocrPtr = std::unique_ptr<ggml_gallocr, GgmlDeleter<ggml_gallocr_free>>;

/// A context that holds tensor headers only (never data) for up to n_tensors tensors.
ContextPtr make_tensor_context(std::size_t n_tensors);

/// Names of the instruction sets this build uses on this CPU.
std::vector<std::string> cpu_features();

/// The device graphs run on, and its threads. Not thread-safe: one caller computes at a time.
class Backend {
 public:
  /// device is "cpu", "cuda", or "auto" (a GPU when this build has one and one is there, else the
  /// CPU).
  /// \throws DeviceError when the device is unknown, absent or not built in.
  Backend(const std::string& device, int n_threads);

  bool is_cpu() const { return is_cpu_; }
  int n_threads() const { return n_threads_; }
  std::string name() const;

  /// Memory for all tensors of a context. \throws DeviceError when it cannot be had.
  BufferPtr allocate(ggml_context* ctx, const std::string& what) const;
  GallocrPtr make_allocator() const;
  /// ggml would end the process. \throws DeviceError when the device lacks the node's operation.
  void expect_can_compute(const ggml_tensor* node) const;
  /// \throws DeviceError when the device reports a failure.
  void compute(ggml_cgraph* graph);
  /// Whether somebody computes, or did so a moment ago: between the steps of a request, too. Any
  /// thread.
  bool is_computing() const;

 private:
  using HandlePtr = std::unique_ptr<ggml_backend, GgmlDeleter<ggml_backend_free>>;
  using ThreadpoolPtr = std::unique_ptr<ggml_threadpool, GgmlDeleter<ggml_threadpool_free>>;

  int n_threads_;
  bool is_cpu_ = true;
  std::atomic<bool> computes_{false};
  std::atomic<std::chrono::steady_clock::time_point> ended_at_{};  // of the last computation
  ThreadpoolPtr threadpool_;  // declared first: outlives the backend that uses it
  HandlePtr handle_;
};

}  // namespace modularbase
