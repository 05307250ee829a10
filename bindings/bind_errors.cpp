// C++ errors become the classes of modularbase.errors, with the same fields.
#include <pybind11/stl.h>

#include "bindings.h"
#include "modularbase/core/errors.h"

namespace py = pybind11;

namespace modularbase::bindings {
namespace {

template <class... Fields>
void raise(const char* name, Fields&&... fields) {
  const py::object type = py::module_::import("modularbase.errors").attr(name);
  const py::object error = type(std::forward<Fields>(fields)...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr pointer) {  // NOLINT: the signature pybind11 asks for
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const BaseLoadError& e) {
    raise("BaseLoadError", e.file, e.field, e.expected, e.found);
  } catch (const PackFormatError& e) {
    raise("PackFormatError", e.file, e.field, e.expected, e.found);
  } catch (const InvalidRequestError& e) {
    raise("InvalidRequestError", e.field, e.expected, e.found);
  } catch (const ContextLengthError& e) {
    raise("ContextLengthError", e.n_tokens, e.n_ctx);
  } catch (const KvCacheFullError& e) {
    raise("KvCacheFullError", e.needed_bytes, e.limit_bytes);
  } catch (const PackNotFoundError& e) {
    raise("PackNotFoundError", e.pack_id, e.required, e.known);
  } catch (const PackIncompatibleError& e) {
    raise("PackIncompatibleError", e.pack_id, e.field, e.required, e.found);
  } catch (const BudgetExceededError& e) {
    raise("BudgetExceededError", e.pack_id, e.needed_bytes, e.budget_bytes, e.reason);
  } catch (const ChannelError& e) {
    raise("ChannelError", e.segment, e.field, e.expected, e.found);
  } catch (const CancelledError& e) {
    raise("CancelledError", e.what());
  } catch (const DeviceError& e) {
    raise("DeviceError", e.what());
  } catch (const Error& e) {
    raise("ModularBaseError", e.what());
  }
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator(translate);
}

}  // namespace modularbase::bindings
