#include "modularbase/io/pack_file.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr const char* kArchitecture = "modularbase-pack";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::int64_t kMaxWidth = 1 << 16;
constexpr std::int64_t kWidthUnit = 256;  // a K-quant block
constexpr std::int64_t kMaxExperts = 64;
constexpr std::int64_t kMaxLayer = 1 << 12;
constexpr std::int64_t kMaxCentroids = 64;
constexpr std::size_t kMaxProbe = 64;
constexpr const char* kProfile = "profile.centroids";

std::string key(const char* name) {
  return std::string(kArchitecture) + "." + name;
}

std::string site_tensor(std::size_t site, const char* name) {
  return "site." + std::to_string(site) + "." + name;
}

std::string shape_text(std::span<const std::int64_t> ne) {
  std::string text;
  for (const std::int64_t n : ne) text += (text.empty() ? "[" : ", ") + std::to_string(n);
  return text + "]";
}

std::string shape_text(const GgufTensor& tensor) {
  std::size_t n_dims = 4;
  while (n_dims > 1 && tensor.ne[n_dims - 1] == 1) --n_dims;
  return shape_text(std::span(tensor.ne).first(n_dims));
}

bool has_shape(const GgufTensor& tensor, std::initializer_list<std::int64_t> ne) {
  std::array<std::int64_t, 4> wanted{1, 1, 1, 1};
  std::copy(ne.begin(), ne.end(), wanted.begin());
  return tensor.ne == wanted;
}

// Empty where the value is no array of integers.
std::vector<std::int64_t> integers(const GgufValue* value) {
  const auto* array = value ? std::get_if<GgufArray>(value) : nullptr;
  if (!array) return {};
  if (const auto* s = std::get_if<std::vector<std::int64_t>>(array)) return *s;
  std::vector<std::int64_t> found;
  if (const auto* u = std::get_if<std::vector<std::uint64_t>>(array)) {
    for (const std::uint64_t v : *u) found.push_back(static_cast<std::int64_t>(v));
  }
  return found;
}

// Empty where the value is no array of floats.
std::vector<float> floats(const GgufValue* value) {
  const auto* array = value ? std::get_if<GgufArray>(value) : nullptr;
  const auto* found = array ? std::get_if<std::vector<double>>(array) : nullptr;
  return found ? std::vector<float>(found->begin(), found->end()) : std::vector<float>{};
}

std::vector<int> read_layers(const GgufFile& file) {
  const std::string name = key("sites");
  const GgufValue* value = file.find(name);
  const std::vector<std::int64_t> layers = integers(value);
  const bool ascending =
      std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<>()) == layers.end();
  if (layers.empty() || !ascending || layers.front() < 0 || layers.back() >= kMaxLayer) {
    throw PackFormatError(file.path(), name, "ascending layer numbers, at least one",
                          value ? "something else" : "no such key");
  }
  return {layers.begin(), layers.end()};
}

std::int64_t read_width(const GgufFile& file, const char* name) {
  const std::int64_t width = file.required_int(key(name), kWidthUnit, kMaxWidth);
  if (width % kWidthUnit != 0) {
    throw PackFormatError(file.path(), key(name), "a multiple of 256", std::to_string(width));
  }
  return width;
}

}  // namespace

PackFile PackFile::open(const std::string& path, Pacer pacer) {
  try {
    PackFile pack(GgufFile::open(path));
    pack.read_geometry();
    pack.read_sites(pacer);
    pack.read_profile();
    pack.read_probe();
    pack.refuse_unknown_tensors();
    return pack;
  } catch (const BaseLoadError& e) {  // the reader's word for a file that is not sound
    throw PackFormatError(e.file, e.field, e.expected, e.found);
  }
}

void PackFile::read_geometry() {
  const std::string family = file_.required_string("general.architecture");
  if (family != kArchitecture) {
    throw PackFormatError(path(), "general.architecture", kArchitecture, family);
  }
  file_.required_int(key("format_version"), kFormatVersion, kFormatVersion);
  geometry_.n_embd = file_.required_int(key("n_embd"), 1, kMaxWidth);
  geometry_.d_inner = read_width(file_, "d_inner");
  geometry_.d_ff = read_width(file_, "d_ff");
  geometry_.n_expert = file_.required_int(key("n_expert"), 1, kMaxExperts);
  geometry_.n_expert_used = file_.required_int(key("n_expert_used"), 1, geometry_.n_expert);
  geometry_.sites = read_layers(file_);
  geometry_.norm_eps = static_cast<float>(file_.required_float(key("norm_eps")));
  scale_ = static_cast<float>(file_.required_float(key("scale")));
  if (!std::isfinite(scale_)) {
    throw PackFormatError(path(), key("scale"), "a finite number", std::to_string(scale_));
  }
  if (!(geometry_.norm_eps > 0.0f && geometry_.norm_eps < 1.0f)) {
    throw PackFormatError(path(), key("norm_eps"), "a number between 0 and 1",
                          std::to_string(geometry_.norm_eps));
  }
  geometry_.adapter_type = type_of("in", {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32});
  geometry_.expert_type =
      type_of("expert_gate", {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16});
  manifest_json_ = file_.required_string(key("manifest"));
}

// The type of the first site's tensor stands for all: a pool holds one type.
ggml_type PackFile::type_of(const char* name, std::initializer_list<ggml_type> allowed) const {
  const GgufTensor* first = file_.find_tensor(site_tensor(0, name) + ".weight");
  if (!first) {
    throw PackFormatError(path(), site_tensor(0, name) + ".weight", "a tensor", "none");
  }
  if (std::find(allowed.begin(), allowed.end(), first->type) != allowed.end()) return first->type;
  std::string names;
  for (const ggml_type type : allowed) {
    names += (names.empty() ? "" : ", ") + std::string(ggml_type_name(type));
  }
  throw PackFormatError(path(), first->name + " type", "one of " + names,
                        ggml_type_name(first->type));
}

const GgufTensor* PackFile::tensor(const std::string& full, std::initializer_list<std::int64_t> ne,
                                   ggml_type type) const {
  const GgufTensor* found = file_.find_tensor(full);
  if (!found) throw PackFormatError(path(), full, "a tensor " + shape_text(std::span(ne)), "none");
  if (!has_shape(*found, ne)) {
    throw PackFormatError(path(), full + " shape", shape_text(std::span(ne)), shape_text(*found));
  }
  if (found->type != type) {
    throw PackFormatError(path(), full + " type", ggml_type_name(type),
                          ggml_type_name(found->type));
  }
  const auto data = file_.tensor_bytes(*found);
  if (!ggml_validate_row_data(type, data.data(), data.size())) {
    throw PackFormatError(path(), full, "finite numbers", "NaN or infinity");
  }
  return found;
}

void PackFile::read_sites(Pacer& pacer) {
  const auto& [n_embd, d_inner, d_ff, n_expert, n_used, layers, eps, adapter, expert] = geometry_;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const bool has_gate = file_.find_tensor(site_tensor(i, "token_gate.weight")) != nullptr;
    const auto read = [&](const char* name, std::initializer_list<std::int64_t> ne,
                          ggml_type type) {
      const GgufTensor* found = tensor(site_tensor(i, name), ne, type);
      pacer.rest();
      return found;
    };
    sites_.push_back(
        {.in = read("in.weight", {n_embd, d_inner}, adapter),
         .norm = read("norm.weight", {d_inner}, GGML_TYPE_F32),
         .router = read("router.weight", {d_inner, n_expert}, GGML_TYPE_F32),
         .expert_gate = read("expert_gate.weight", {d_inner, d_ff, n_expert}, expert),
         .expert_up = read("expert_up.weight", {d_inner, d_ff, n_expert}, expert),
         .expert_down = read("expert_down.weight", {d_ff, d_inner, n_expert}, expert),
         .out = read("out.weight", {d_inner, n_embd}, adapter),
         .token_gate = has_gate ? read("token_gate.weight", {n_embd}, GGML_TYPE_F32) : nullptr,
         .token_bias = has_gate ? read("token_gate.bias", {1}, GGML_TYPE_F32) : nullptr});
  }
}

void PackFile::read_profile() {
  const GgufTensor* found = file_.find_tensor(kProfile);
  if (!found) return;
  if (found->ne[1] > kMaxCentroids) {
    throw PackFormatError(path(), std::string(kProfile) + " shape", "at most 64 centroids",
                          shape_text(*found));
  }
  profile_ = tensor(kProfile, {geometry_.n_embd, found->ne[1]}, GGML_TYPE_F32);
}

void PackFile::read_probe() {
  const GgufValue* tokens = file_.find(key("probe.tokens"));
  const GgufValue* effect = file_.find(key("probe.effect"));
  if (!tokens && !effect) return;
  const std::vector<std::int64_t> ids = integers(tokens);
  const auto is_id = [](std::int64_t id) { return id >= 0 && id <= INT32_MAX; };
  if (ids.empty() || ids.size() > kMaxProbe || !std::all_of(ids.begin(), ids.end(), is_id)) {
    throw PackFormatError(path(), key("probe.tokens"), "1 to 64 token ids",
                          tokens ? "something else" : "an effect without tokens");
  }
  probe_tokens_.assign(ids.begin(), ids.end());
  probe_effect_ = floats(effect);
  const auto is_size = [](float size) { return std::isfinite(size) && size >= 0.0f; };
  if (probe_effect_.size() != ids.size() ||
      !std::all_of(probe_effect_.begin(), probe_effect_.end(), is_size)) {
    throw PackFormatError(path(), key("probe.effect"),
                          std::to_string(ids.size()) + " finite numbers from 0, one a token",
                          effect ? "something else" : "tokens without an effect");
  }
}

// A tensor nobody reads would be a pack that silently does less than it says.
void PackFile::refuse_unknown_tensors() const {
  std::set<const GgufTensor*> known{profile_};
  for (const PackSiteTensors& site : sites_) {
    known.insert({site.in, site.norm, site.router, site.expert_gate, site.expert_up,
                  site.expert_down, site.out, site.token_gate, site.token_bias});
  }
  for (const GgufTensor& tensor : file_.tensors()) {
    if (!known.contains(&tensor)) {
      throw PackFormatError(path(), tensor.name, "no such tensor in a pack of this geometry",
                            shape_text(tensor));
    }
  }
}

}  // namespace modularbase
