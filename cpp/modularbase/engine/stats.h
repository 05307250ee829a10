#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace modularbase {

/// What an engine is, fixed at load.
struct EngineInfo {
  std::string path;
  std::string family;
  std::string device;
  std::string weight_type;  // of the layers' matrices
  int n_threads = 0;
  std::int64_t n_vocab = 0;
  std::int64_t n_ctx = 0;
  std::int64_t n_ctx_train = 0;
  std::int64_t n_embd = 0;
  std::int64_t n_layer = 0;
  std::int64_t n_head = 0;
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  std::int64_t n_ff = 0;
  std::int64_t n_params = 0;
  std::size_t weight_bytes = 0;
  std::size_t mapped_bytes = 0;  // of weight_bytes, still in the file's pages
  std::size_t screen_bytes = 0;  // the certified head's low-bit copy
  std::size_t kv_bytes = 0;      // all blocks
  std::int64_t n_kv_blocks = 0;
  std::int64_t n_kv_tokens = 0;  // the longest sequence they have room for
  bool kv_in_rows = false;       // 4-bit tiles are ggml's rows, for graphs of its ops
  int first_site = -1;  // layers up to it share their KV between packs; -1: the engine has no packs
  double load_us = 0.0;
};

/// What an engine is doing; a consistent copy as of the last step.
struct EngineStats {
  std::size_t n_waiting = 0;
  std::size_t n_running = 0;
  std::int64_t n_free_blocks = 0;    // in the group of layers that has fewer
  std::int64_t n_cached_blocks = 0;  // in the group that has more
  std::size_t graph_bytes = 0;
  std::int64_t n_steps = 0;
  std::int64_t n_rows = 0;            // token rows, computed in all steps
  std::int64_t n_mid_rows = 0;        // rows of all steps that only the upper layers computed
  std::int64_t n_head_fallbacks = 0;  // rows whose shortlist was not certified
};

}  // namespace modularbase
