#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "bindings.h"
#include "modularbase/io/gguf_file.h"
#include "modularbase/io/pack_file.h"
#include "modularbase/io/quantize.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

// Token pieces may be any bytes: text where they are UTF-8, else bytes.
py::object to_python(const std::string& text) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "strict");
  if (decoded) return py::reinterpret_steal<py::object>(decoded);
  PyErr_Clear();
  return py::bytes(text);
}

py::object to_python(const GgufScalar& scalar) {
  return std::visit(
      [](const auto& value) -> py::object {
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::string>) {
          return to_python(value);
        } else {
          return py::cast(value);
        }
      },
      scalar);
}

py::object to_python(const GgufArray& array) {
  return std::visit(
      [](const auto& values) -> py::object {
        py::list list(values.size());
        for (std::size_t i = 0; i < values.size(); ++i) {
          if constexpr (std::is_same_v<std::decay_t<decltype(values)>, std::vector<std::string>>) {
            list[i] = to_python(values[i]);
          } else {
            list[i] = py::cast(
                static_cast<typename std::decay_t<decltype(values)>::value_type>(values[i]));
          }
        }
        return list;
      },
      array);
}

py::typing::Dict<py::str, py::object> read_gguf_metadata(const std::string& path) {
  const GgufFile file = GgufFile::open(path);
  py::typing::Dict<py::str, py::object> metadata;
  for (const auto& [key, value] : file.metadata()) {
    metadata[py::str(key)] = std::visit([](const auto& v) { return to_python(v); }, value);
  }
  return metadata;
}

using TensorFacts =
    py::typing::Tuple<std::string, std::string, std::vector<std::int64_t>, std::size_t>;

py::typing::List<TensorFacts> tensor_facts(const std::vector<GgufTensor>& tensors) {
  py::typing::List<TensorFacts> facts;
  for (const GgufTensor& tensor : tensors) {
    facts.append(
        py::make_tuple(tensor.name, ggml_type_name(tensor.type), tensor.ne, tensor.n_bytes));
  }
  return facts;
}

py::typing::List<TensorFacts> read_gguf_tensors(const std::string& path) {
  return tensor_facts(GgufFile::open(path).tensors());
}

using FloatRows = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteRows = py::array_t<std::uint8_t, py::array::c_style | py::array::forcecast>;

template <class Rows>
std::span<const typename Rows::value_type> all_of(const Rows& rows) {
  if (rows.ndim() != 2) throw py::value_error("expected rows: an array of two dimensions");
  return {rows.data(), static_cast<std::size_t>(rows.size())};
}

// As many rows as came in, of whatever width the answer has.
template <class Value>
py::array_t<Value> in_rows(py::ssize_t n_rows, const Value* values, std::size_t n_values) {
  const py::ssize_t width = n_rows ? static_cast<py::ssize_t>(n_values) / n_rows : 0;
  return py::array_t<Value>({n_rows, width}, values);
}

py::array_t<std::uint8_t> quantize_rows(const FloatRows& rows, const std::string& type_name) {
  const std::span<const float> values = all_of(rows);
  std::vector<std::byte> bytes;
  {
    const py::gil_scoped_release release;
    bytes = quantize(values, rows.shape(1), type_name);
  }
  return in_rows(rows.shape(0), reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

py::array_t<float> dequantize_rows(const ByteRows& rows, const std::string& type_name) {
  const std::span<const std::byte> bytes = std::as_bytes(all_of(rows));
  std::vector<float> values;
  {
    const py::gil_scoped_release release;
    values = dequantize(bytes, type_name);
  }
  return in_rows(rows.shape(0), values.data(), values.size());
}

py::array_t<float> read_gguf_rows(const std::string& path, const std::string& name) {
  std::vector<float> values;
  py::ssize_t n_rows = 0;
  {
    const py::gil_scoped_release release;
    const GgufFile file = GgufFile::open(path);
    values = read_floats(file, name);
    n_rows = static_cast<py::ssize_t>(file.find_tensor(name)->ne[1]);
  }
  return in_rows(n_rows, values.data(), values.size());
}

py::array_t<std::uint8_t> pack_tensor_bytes(const PackFile& pack, const std::string& name) {
  const GgufTensor* tensor = pack.find_tensor(name);
  if (!tensor) throw py::key_error(name);
  const auto bytes = pack.bytes(*tensor);
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(bytes.size()),
                                   reinterpret_cast<const std::uint8_t*>(bytes.data()));
}

template <auto Member>
auto geometry_field() {
  return [](const PackFile& pack) { return pack.geometry().*Member; };
}

void bind_pack_file(py::module_& module) {
  py::class_<PackFile>(module, "PackFile")
      .def_property_readonly("n_embd", geometry_field<&PackGeometry::n_embd>())
      .def_property_readonly("d_inner", geometry_field<&PackGeometry::d_inner>())
      .def_property_readonly("d_ff", geometry_field<&PackGeometry::d_ff>())
      .def_property_readonly("n_expert", geometry_field<&PackGeometry::n_expert>())
      .def_property_readonly("n_expert_used", geometry_field<&PackGeometry::n_expert_used>())
      .def_property_readonly("sites", geometry_field<&PackGeometry::sites>())
      .def_property_readonly("norm_eps", geometry_field<&PackGeometry::norm_eps>())
      .def_property_readonly(
          "adapter_type",
          [](const PackFile& pack) { return ggml_type_name(pack.geometry().adapter_type); })
      .def_property_readonly(
          "expert_type",
          [](const PackFile& pack) { return ggml_type_name(pack.geometry().expert_type); })
      .def_property_readonly("scale", &PackFile::scale)
      .def_property_readonly("manifest_json",
                             [](const PackFile& pack) { return to_python(pack.manifest_json()); })
      .def_property_readonly("probe_tokens", &PackFile::probe_tokens)
      .def_property_readonly("probe_effect", &PackFile::probe_effect)
      .def_property_readonly("tensors",
                             [](const PackFile& pack) { return tensor_facts(pack.tensors()); })
      .def("tensor_bytes", &pack_tensor_bytes, py::arg("name"));
}

}  // namespace

void bind_io(py::module_& module) {
  bind_pack_file(module);
  module.def("read_gguf_metadata", &read_gguf_metadata, py::arg("path"),
             "All metadata of a GGUF file; strings that are not UTF-8 come as bytes.");
  module.def("read_gguf_tensors", &read_gguf_tensors, py::arg("path"),
             "(name, type, shape in ggml order, n_bytes) of every tensor of a GGUF file.");
  module.def("read_gguf_rows", &read_gguf_rows, py::arg("path"), py::arg("name"),
             "A matrix of a GGUF file as F32 [n_rows, n_per_row], whatever its type.");
  module.def(
      "read_pack", [](const std::string& path) { return PackFile::open(path); }, py::arg("path"),
      py::call_guard<py::gil_scoped_release>(), "A pack file, once it has been checked.");
  module.def("quantize", &quantize_rows, py::arg("rows"), py::arg("type_name"),
             "Bytes of each row, rounded to f32, f16, bf16, q8_0, q4_0 or q4_k.");
  module.def("dequantize", &dequantize_rows, py::arg("rows"), py::arg("type_name"),
             "Numbers that the bytes of each row stand for.");
}

}  // namespace modularbase::bindings
