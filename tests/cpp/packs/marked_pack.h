#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cstring>
#include <span>

#include "modularbase/packs/slot_pool.h"
#include "tools/temp_file.h"
#include "tools/tiny_pack.h"

namespace modularbase::testing {

inline constexpr PackBase kSmallBase{.n_embd = 16, .n_layer = 4};

inline TinyPack small_shape(std::uint32_t n_expert = 2) {
  TinyPack shape;
  shape.n_embd = 16;
  shape.n_expert = n_expert;
  shape.sites = {2};
  shape.adapter_type = GGML_TYPE_F32;
  return shape;
}

inline void set_float(Tensor& tensor, std::size_t i, float value) {
  std::memcpy(tensor.data.data() + i * sizeof(float), &value, sizeof(float));
}

/// A small pack whose first, middle and last weights in a slot say which one it is.
inline GgufWriter marked_pack(float marker, std::uint32_t n_expert = 2) {
  static const GgufWriter two = tiny_pack_file(small_shape(2));  // random weights take their time
  GgufWriter writer = n_expert == 2 ? two : tiny_pack_file(small_shape(n_expert));
  set_float(writer.tensor("site.0.in.weight"), 0, marker);
  set_float(writer.tensor("site.0.token_gate.bias"), 0, marker);
  Tensor& out = writer.tensor("site.0.out.weight");
  set_float(out, out.data.size() / sizeof(float) - 1, marker);
  return writer;
}

inline float float_of(const ggml_tensor* tensor, int slot, int stride_dim, std::size_t i) {
  float value = 0.0f;
  const auto* data = static_cast<const std::byte*>(tensor->data) +
                     static_cast<std::size_t>(slot) * tensor->nb[stride_dim];
  std::memcpy(&value, data + i * sizeof(float), sizeof(float));
  return value;
}

/// The marker of the pack in a slot; -1 where its weights do not agree.
inline float marker_of(const SlotPool& pool, int slot) {
  const SiteWeights& site = pool.site(0);
  const auto n_out = static_cast<std::size_t>(site.out->ne[0] * site.out->ne[1]);
  const float first = float_of(site.in, slot, 2, 0);
  const float middle = float_of(site.token_bias, slot, 1, 0);
  const float last = float_of(site.out, slot, 2, n_out - 1);
  return first == middle && middle == last ? first : -1.0f;
}

/// As if somebody had written to the file.
inline void touch(const std::string& path, std::int64_t seconds = 1) {
  const timespec time{.tv_sec = seconds, .tv_nsec = 0};
  const timespec times[2] = {time, time};
  if (::utimensat(AT_FDCWD, path.c_str(), times, 0) != 0) throw std::runtime_error(path);
}

}  // namespace modularbase::testing
