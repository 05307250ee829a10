#include "modularbase/packs/pack.h"

#include "modularbase/core/errors.h"

namespace modularbase {

void check_base(const std::string& name, const PackGeometry& geometry, const PackBase& base) {
  if (geometry.n_embd != base.n_embd) {
    throw PackIncompatibleError(name, "n_embd", std::to_string(base.n_embd),
                                std::to_string(geometry.n_embd));
  }
  if (geometry.sites.back() >= base.n_layer) {
    throw PackIncompatibleError(name, "sites", "layers below " + std::to_string(base.n_layer),
                                std::to_string(geometry.sites.back()));
  }
}

}  // namespace modularbase
