#pragma once

#include <memory>
#include <string>
#include <vector>

#include "modularbase/graph/layer_hook.h"
#include "modularbase/models/attention.h"
#include "modularbase/models/feed_forward.h"
#include "modularbase/models/model_config.h"
#include "modularbase/models/weights.h"

namespace modularbase {

struct Layer {
  Attention attention;
  FeedForward feed_forward;
};

/// Where rows of known lower KV restart. The residual stream behind the attention of one layer is
/// kept for each token; layers from this layer's FFN on run for other packs without the layers
/// below.
struct MidRows {
  int layer;
  Tensor store;      // F32 [n_embd, n]: all rows that are kept
  Tensor write_ids;  // I64 [n_rows]: where the token rows are kept
  Tensor read_ids;   // I32 [n_mid_rows]: the rows that restart; null: none
};

/// Where the residual stream is looked at on its way.
struct TapPoint {
  int layer;
  Tensor rows = nullptr;  // set while building: the stream that enters the layer, [n_embd, n]
};

/// What a graph is built with, beside the weights. Rows that restart come behind the token rows.
struct ForwardArgs {
  KernelPath linear_path;
  AttentionPath* attention;
  LayerHook* hook;     // null: the plain base
  const MidRows* mid;  // null: nothing is kept and nothing restarts
  TapPoint* tap;       // null: nobody looks
  Tensor token_ids;    // I32 [n_rows]; null: only rows that restart
  Tensor out_rows;     // I32 [n_out]: the rows carried through the last layer's end; null: all
  bool keeps_queries = false;  // somebody keeps what the rows attend to, in every layer
};

/// A decoder-only transformer: the weights of one family, composed from the shared blocks.
struct Model {
  ModelConfig config;
  Tensor token_embd = nullptr;  // [n_embd, n_vocab]
  std::vector<Layer> layers;
  Tensor output_norm = nullptr;   // [n_embd]
  Linear output;                  // [n_embd, n_vocab]; token_embd when the file ties them
  Tensor rope_factors = nullptr;  // [rope_dim / 2], llama 3's frequency divisors; null otherwise
  WeightMemory memory;

  /// The residual stream entering layer `layer` (n_layer: leaving the last): [n_embd, n_rows], from
  /// the split on with the rows that restart: [n_embd, n_rows + n_mid_rows].
  Tensor build_hidden(GraphBuilder& g, const ForwardArgs& args, int layer) const;
  /// After the output norm: [n_embd, n_out].
  Tensor build_normed(GraphBuilder& g, const ForwardArgs& args) const;
  /// Only writes the cache of every layer, and what is kept of queries: a chunk of a prompt that no
  /// one samples from.
  void build_cache_only(GraphBuilder& g, const ForwardArgs& args) const;
};

/// Reads the weights of the file's family. The file must outlive the model (tensors may be mapped
/// from it).
/// \throws BaseLoadError naming the field, e.g. for an unknown architecture.
std::unique_ptr<Model> load_model(const GgufFile& file, const Backend& backend, DType dtype);

}  // namespace modularbase
