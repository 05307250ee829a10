#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "modularbase/channel/activation_ring.h"
#include "modularbase/channel/weight_channel.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

using namespace channel;
using ByteArray = py::array_t<std::uint8_t, py::array::c_style>;
using Milliseconds = std::int64_t;

// Name, ggml's number of the type, shape in ggml's order.
using TensorFacts = std::tuple<std::string, std::uint32_t, std::vector<std::int64_t>>;
// The same, offset in a payload, bytes.
using PlacedFacts =
    std::tuple<std::string, std::uint32_t, std::vector<std::int64_t>, std::size_t, std::size_t>;

std::unique_ptr<WeightWriter> make_writer(const std::string& name,
                                          const std::vector<TensorFacts>& facts,
                                          const std::string& json) {
  std::vector<ChannelTensor> tensors;
  tensors.reserve(facts.size());
  for (const auto& [tensor, type, ne] : facts) {
    tensors.push_back({tensor, static_cast<TensorType>(type), ne});
  }
  return std::make_unique<WeightWriter>(name, tensors, json);
}

std::vector<PlacedFacts> facts_of(const std::vector<PlacedTensor>& tensors) {
  std::vector<PlacedFacts> facts;
  facts.reserve(tensors.size());
  for (const PlacedTensor& tensor : tensors) {
    facts.emplace_back(tensor.name, static_cast<std::uint32_t>(tensor.type), tensor.ne,
                       tensor.offset, tensor.n_bytes);
  }
  return facts;
}

/// An array that is these bytes, and keeps what they lie in.
ByteArray view_of(std::span<const std::byte> bytes, std::shared_ptr<const void> owner) {
  const auto release = [](void* held) { delete static_cast<std::shared_ptr<const void>*>(held); };
  const py::capsule base(new std::shared_ptr<const void>(std::move(owner)), release);
  return ByteArray(static_cast<py::ssize_t>(bytes.size()),
                   reinterpret_cast<const std::uint8_t*>(bytes.data()), base);
}

std::span<const std::byte> bytes_of(const ByteArray& array) {
  return {reinterpret_cast<const std::byte*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::uint64_t read_into(const WeightReader& reader, ByteArray& into, bool verify) {
  const std::span bytes(reinterpret_cast<std::byte*>(into.mutable_data()),
                        static_cast<std::size_t>(into.size()));
  const py::gil_scoped_release release;
  return reader.read(bytes, verify ? WeightReader::Verify::kDigest : WeightReader::Verify::kNo);
}

void bind_weights(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<WeightWriter>(module, "WeightWriter")
      .def(py::init(&make_writer), py::arg("name"), py::arg("tensors"), py::arg("json"),
           release_gil)
      .def_property_readonly("path", &WeightWriter::path)
      .def_property_readonly("notice", &WeightWriter::notice)
      .def_property_readonly("tensors",
                             [](const WeightWriter& writer) { return facts_of(writer.tensors()); })
      .def_property_readonly("generation", &WeightWriter::generation)
      .def(
          "buffer",
          [](WeightWriter& writer, const std::string& tensor) {
            return view_of(writer.buffer(tensor), writer.mapping());
          },
          py::arg("tensor"))
      .def("publish", &WeightWriter::publish, release_gil)
      .def("close", &WeightWriter::close);
  py::class_<WeightReader>(module, "WeightReader")
      .def(py::init<const std::string&>(), py::arg("name"), release_gil)
      .def_property_readonly("path", &WeightReader::path)
      .def_property_readonly("tensors",
                             [](const WeightReader& reader) { return facts_of(reader.tensors()); })
      .def_property_readonly("json", &WeightReader::json)
      .def_property_readonly("payload_bytes", &WeightReader::payload_bytes)
      .def("is_live", &WeightReader::is_live)
      .def("is_closed", &WeightReader::is_closed)
      .def("generation", &WeightReader::generation)
      .def(
          "wait",
          [](const WeightReader& reader, std::uint64_t newer_than, Milliseconds timeout_ms) {
            return reader.wait(newer_than, std::chrono::milliseconds(timeout_ms));
          },
          py::arg("newer_than"), py::arg("timeout_ms"), release_gil)
      .def("read", &read_into, py::arg("into").noconvert(), py::arg("verify"));
}

template <class Number>
auto shape_field(Number RingShape::* member) {
  return [member](const ActivationConsumer& ring) { return ring.shape().*member; };
}

void bind_ring(py::module_& module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ActivationProducer>(module, "ActivationProducer")
      .def(py::init([](const std::string& name, std::int64_t n_embd, std::uint32_t row_type,
                       std::int64_t n_records) {
             const RingShape shape{n_embd, static_cast<TensorType>(row_type), n_records};
             return std::make_unique<ActivationProducer>(name, shape);
           }),
           py::arg("name"), py::arg("n_embd"), py::arg("row_type"), py::arg("n_records"))
      .def_property_readonly("path", &ActivationProducer::path)
      .def_property_readonly("notice", &ActivationProducer::notice)
      .def_property_readonly("n_dropped", &ActivationProducer::n_dropped)
      .def(
          "push",
          [](ActivationProducer& ring, std::uint64_t sequence, std::uint32_t position,
             std::int32_t token, const ByteArray& row) {
            return ring.push({sequence, position, token}, bytes_of(row));
          },
          py::arg("sequence"), py::arg("position"), py::arg("token"), py::arg("row").noconvert())
      .def("close", &ActivationProducer::close);
  py::class_<ActivationConsumer>(module, "ActivationConsumer")
      .def(py::init<const std::string&>(), py::arg("name"))
      .def_property_readonly("path", &ActivationConsumer::path)
      .def_property_readonly("n_embd", shape_field(&RingShape::n_embd))
      .def_property_readonly("n_records", shape_field(&RingShape::n_records))
      .def_property_readonly("row_type",
                             [](const ActivationConsumer& ring) {
                               return static_cast<std::uint32_t>(ring.shape().row_type);
                             })
      .def_property_readonly(
          "record_bytes",
          [](const ActivationConsumer& ring) { return ring.shape().record_bytes(); })
      .def_property_readonly("n_dropped", &ActivationConsumer::n_dropped)
      .def_property_readonly("n_waiting", &ActivationConsumer::n_waiting)
      .def("is_live", &ActivationConsumer::is_live)
      .def(
          "wait",
          [](const ActivationConsumer& ring, Milliseconds timeout_ms) {
            return ring.wait(std::chrono::milliseconds(timeout_ms));
          },
          py::arg("timeout_ms"), release_gil)
      .def(
          "batch",
          [](const ActivationConsumer& ring, std::size_t max_records) {
            return view_of(ring.batch(max_records), ring.mapping());
          },
          py::arg("max_records"))
      .def("advance", &ActivationConsumer::advance, py::arg("n_records"));
}

}  // namespace

void bind_channel(py::module_& module) {
  bind_weights(module);
  bind_ring(module);
}

}  // namespace modularbase::bindings
