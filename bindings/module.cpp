#include <ggml.h>

#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "ModularBase's C++ runtime; use the modularbase package, not this.";
  module.attr("__version__") = MODULARBASE_VERSION;
  module.attr("ggml_version") = ggml_version();
  modularbase::bindings::bind_errors(module);
  modularbase::bindings::bind_io(module);
  modularbase::bindings::bind_request(module);
  modularbase::bindings::bind_channel(module);
  modularbase::bindings::bind_packs(module);
  modularbase::bindings::bind_engine(module);
}
