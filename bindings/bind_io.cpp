#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "bindings.h"
#include "modularbase/io/gguf_file.h"

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

py::typing::List<TensorFacts> read_gguf_tensors(const std::string& path) {
  const GgufFile file = GgufFile::open(path);
  py::typing::List<TensorFacts> tensors;
  for (const GgufTensor& tensor : file.tensors()) {
    tensors.append(
        py::make_tuple(tensor.name, ggml_type_name(tensor.type), tensor.ne, tensor.n_bytes));
  }
  return tensors;
}

}  // namespace

void bind_io(py::module_& module) {
  module.def("read_gguf_metadata", &read_gguf_metadata, py::arg("path"),
             "All metadata of a GGUF file; strings that are not UTF-8 come as bytes.");
  module.def("read_gguf_tensors", &read_gguf_tensors, py::arg("path"),
             "(name, type, shape in ggml order, n_bytes) of every tensor of a GGUF file.");
}

}  // namespace modularbase::bindings
