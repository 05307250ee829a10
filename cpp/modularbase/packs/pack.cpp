#include "modularbase/packs/pack.h"

#include <chrono>
#include <cstring>

#include "modularbase/core/errors.h"
#include "modularbase/io/digest.h"

namespace modularbase {
namespace {

using Clock = std::chrono::steady_clock;

double micros_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

Pack::Pack(const std::string& path, const std::string& digest, const std::string& name,
           const PackBase& base)
    : file_(PackFile::open(path)),
      name_(name),
      layout_(file_.geometry()),
      stamp_(file_.file().stamp()) {
  const auto start = Clock::now();
  check_base(base);
  check_digest(digest);
  plan_copy();
  refuse_if_changed();  // while it was being checked
  verify_us_ = micros_since(start);
}

void Pack::check_base(const PackBase& base) const {
  if (geometry().n_embd != base.n_embd) {
    throw PackIncompatibleError(name_, "n_embd", std::to_string(base.n_embd),
                                std::to_string(geometry().n_embd));
  }
  if (geometry().sites.back() >= base.n_layer) {
    throw PackIncompatibleError(name_, "sites", "layers below " + std::to_string(base.n_layer),
                                std::to_string(geometry().sites.back()));
  }
}

void Pack::check_digest(const std::string& digest) {
  const auto bytes = file_.file().bytes();
  digest_ = "sha256:" + sha256_hex(bytes);
  file_.file().release_pages(0, bytes.size());
  if (!digest.empty() && digest != digest_) {
    throw PackFormatError(path(), "digest", digest, digest_);
  }
}

void Pack::plan_copy() {
  const auto add = [&](const GgufTensor* tensor, std::size_t slot_offset) {
    if (!tensor) return;
    Run* last = runs_.empty() ? nullptr : &runs_.back();
    // Tensors that lie in the file as they do in the slot are one run, with what is between them.
    if (last && tensor->offset - last->file_offset == slot_offset - last->slot_offset) {
      last->n_bytes = tensor->offset + tensor->n_bytes - last->file_offset;
    } else {
      runs_.push_back({tensor->offset, slot_offset, tensor->n_bytes});
    }
  };
  for (std::size_t i = 0; i < layout_.sites.size(); ++i) {
    const PackSiteTensors& from = file_.sites()[i];
    const SlotLayout::Site& to = layout_.sites[i];
    add(from.in, to.in);
    add(from.norm, to.norm);
    add(from.router, to.router);
    add(from.token_gate, to.token_gate);
    add(from.token_bias, to.token_bias);
    add(from.expert_gate, to.expert_gate);
    add(from.expert_up, to.expert_up);
    add(from.expert_down, to.expert_down);
    add(from.out, to.out);
  }
}

void Pack::refuse_if_changed() const {
  if (file_.file().stamp() == stamp_) return;
  throw PackFormatError(path(), "file", "the bytes that were checked", "a file changed since");
}

void Pack::copy_to(std::span<std::byte> slot) const {
  try {
    refuse_if_changed();
    for (const Run& run : runs_) {
      file_.file().read(run.file_offset, slot.subspan(run.slot_offset, run.n_bytes));
    }
    refuse_if_changed();
  } catch (const BaseLoadError& e) {
    throw PackFormatError(e.file, e.field, e.expected, e.found);
  }
  // A pack without token gates: zeros are the factor 1.
  for (std::size_t i = 0; i < layout_.sites.size(); ++i) {
    if (file_.sites()[i].token_gate) continue;
    std::memset(slot.data() + layout_.sites[i].token_gate, 0,
                static_cast<std::size_t>(geometry().n_embd) * sizeof(float));
    std::memset(slot.data() + layout_.sites[i].token_bias, 0, sizeof(float));
  }
}

}  // namespace modularbase
