#include "modularbase/models/weights.h"

#include "modularbase/core/errors.h"
#include "modularbase/models/convert.h"

namespace modularbase {
namespace {

constexpr std::size_t kTensorAlignment = 32;  // what ggml's CPU kernels expect

std::string shape_text(const GgufTensor& tensor) {
  return "[" + std::to_string(tensor.ne[0]) + ", " + std::to_string(tensor.ne[1]) + ", " +
         std::to_string(tensor.ne[2]) + ", " + std::to_string(tensor.ne[3]) + "]";
}

bool is_float(ggml_type type) {
  return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// Integers and ggml's intermediate types would end the process in the first product.
bool is_weight(ggml_type type) {
  return is_float(type) || (ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float);
}

}  // namespace

DType parse_dtype(std::string_view name) {
  if (name == "auto") return DType::kAuto;
  if (name == "keep") return DType::kKeep;
  if (name == "f16") return DType::kF16;
  if (name == "bf16") return DType::kBF16;
  if (name == "f32") return DType::kF32;
  throw InvalidRequestError("dtype", "auto, keep, f16, bf16 or f32", name);
}

WeightLoader::WeightLoader(const GgufFile& file, const Backend& backend, DType dtype)
    : file_(file),
      backend_(backend),
      dtype_(dtype),
      mapped_ctx_(make_tensor_context(file.tensors().size() + 1)),
      owned_ctx_(make_tensor_context(file.tensors().size() + 1)) {}

ggml_type WeightLoader::matrix_type(ggml_type source) const {
  switch (dtype_) {
    case DType::kKeep:
      return source;
    case DType::kF16:
      return GGML_TYPE_F16;
    case DType::kBF16:
      return GGML_TYPE_BF16;
    case DType::kF32:
      return GGML_TYPE_F32;
    case DType::kAuto:
      break;
  }
  if (!is_float(source) || !backend_.is_cpu()) return source;
  const bool native_bf16 = ggml_cpu_has_avx512_bf16() || ggml_cpu_has_amx_int8();
  return native_bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F16;
}

bool WeightLoader::can_map(const GgufTensor& source, ggml_type type) const {
  return backend_.is_cpu() && type == source.type && source.offset % kTensorAlignment == 0;
}

Tensor WeightLoader::declare(const std::string& name, bool required, std::int64_t ne0,
                             std::int64_t ne1, ggml_type type) {
  const GgufTensor* source = file_.find_tensor(name);
  if (!source) {
    if (!required) return nullptr;
    throw BaseLoadError(file_.path(), "tensor " + name, "present", "missing");
  }
  if (source->ne != std::array<std::int64_t, 4>{ne0, ne1, 1, 1}) {
    throw BaseLoadError(file_.path(), "tensor " + name + " shape",
                        "[" + std::to_string(ne0) + ", " + std::to_string(ne1) + ", 1, 1]",
                        shape_text(*source));
  }
  if (const auto known = declared_.find(name); known != declared_.end()) return known->second;
  if (type == GGML_TYPE_COUNT) type = matrix_type(source->type);
  if (!is_weight(source->type)) {
    throw BaseLoadError(file_.path(), "tensor " + name + " type", "floats, plain or quantised",
                        ggml_type_name(source->type));
  }
  const bool mapped = can_map(*source, type);
  Tensor tensor = ggml_new_tensor_2d(mapped ? mapped_ctx_.get() : owned_ctx_.get(), type, ne0, ne1);
  ggml_set_name(tensor, name.c_str());
  (mapped ? mapped_ : owned_).push_back({source, tensor});
  declared_[name] = tensor;
  return tensor;
}

Tensor WeightLoader::matrix(const std::string& name, std::int64_t n_in, std::int64_t n_out) {
  return declare(name, true, n_in, n_out, GGML_TYPE_COUNT);
}

Tensor WeightLoader::vector(const std::string& name, std::int64_t n) {
  return declare(name, true, n, 1, GGML_TYPE_F32);
}

Tensor WeightLoader::optional_matrix(const std::string& name, std::int64_t n_in,
                                     std::int64_t n_out) {
  return declare(name, false, n_in, n_out, GGML_TYPE_COUNT);
}

Tensor WeightLoader::optional_vector(const std::string& name, std::int64_t n) {
  return declare(name, false, n, 1, GGML_TYPE_F32);
}

WeightMemory WeightLoader::finish() {
  for (const GgufTensor& tensor : file_.tensors()) {
    if (!declared_.contains(tensor.name)) {
      throw BaseLoadError(file_.path(), "tensor " + tensor.name, "a tensor of this family",
                          "one that nothing reads");
    }
  }
  WeightMemory memory;
  map_tensors(memory);
  convert_tensors(memory);
  return memory;
}

void WeightLoader::map_tensors(WeightMemory& memory) {
  if (mapped_.empty()) return;
  const auto bytes = file_.file().bytes();
  // ggml takes a mutable pointer, but nothing ever writes to a weight; the mapping is read-only.
  auto* base = const_cast<std::byte*>(bytes.data());
  BufferPtr buffer(ggml_backend_cpu_buffer_from_ptr(base, bytes.size()));
  ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  for (const Entry& entry : mapped_) {
    ggml_backend_tensor_alloc(buffer.get(), entry.tensor, base + entry.source->offset);
    memory.n_bytes += entry.source->n_bytes;
    memory.n_bytes_mapped += entry.source->n_bytes;
    file_.file().will_need(entry.source->offset, entry.source->n_bytes);
  }
  memory.buffers.push_back(std::move(buffer));
  memory.contexts.push_back(std::move(mapped_ctx_));
}

void WeightLoader::convert_tensors(WeightMemory& memory) {
  if (owned_.empty()) return;
  BufferPtr buffer = backend_.allocate(owned_ctx_.get(), "weights");
  ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  for (const Entry& entry : owned_) {
    convert_tensor(file_, *entry.source, entry.tensor, backend_);
    memory.n_bytes += ggml_nbytes(entry.tensor);
    file_.file().release_pages(entry.source->offset, entry.source->n_bytes);
  }
  memory.buffers.push_back(std::move(buffer));
  memory.contexts.push_back(std::move(owned_ctx_));
}

}  // namespace modularbase
