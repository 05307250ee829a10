#include "modularbase/packs/file_pack.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>

#include "modularbase/core/errors.h"
#include "modularbase/io/digest.h"

namespace modularbase {
namespace {

using Clock = std::chrono::steady_clock;

double micros_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

std::string digest_of(const PackFile& file, const std::string& expected, Pacer pacer) {
  const auto bytes = file.file().bytes();
  const std::string found = "sha256:" + sha256_hex(bytes, std::move(pacer));
  file.file().release_pages(0, bytes.size());
  if (!expected.empty() && expected != found) {
    throw PackFormatError(file.path(), "digest", expected, found);
  }
  return found;
}

}  // namespace

std::unique_ptr<const FilePack> FilePack::open(const std::string& path, const std::string& digest,
                                               const std::string& name, const PackBase& base,
                                               Pacer pacer) {
  const auto start = Clock::now();
  PackFile file = PackFile::open(path, pacer);
  const FileStamp stamp = file.file().stamp();
  check_base(name, file.geometry(), base);
  PackFacts facts{.name = name,
                  .path = file.path(),
                  .digest = digest_of(file, digest, std::move(pacer)),
                  .geometry = file.geometry(),
                  .scale = file.scale()};
  facts.verify_us = micros_since(start);
  std::unique_ptr<const FilePack> pack(new FilePack(std::move(file), stamp, std::move(facts)));
  pack->refuse_if_changed();  // while it was being checked
  return pack;
}

FilePack::FilePack(PackFile file, const FileStamp& stamp, PackFacts facts)
    : Pack(std::move(facts)), file_(std::move(file)), stamp_(stamp) {
  plan_copy();
}

void FilePack::plan_copy() {
  const auto add = [&](const GgufTensor* tensor, std::size_t slot_offset) {
    if (!tensor) return;
    for (std::size_t at = 0; at < tensor->n_bytes; at += Pacer::kSliceBytes) {
      const std::size_t n = std::min(Pacer::kSliceBytes, tensor->n_bytes - at);
      slices_.push_back({tensor->offset + at, slot_offset + at, n});
    }
  };
  for (std::size_t i = 0; i < layout().sites.size(); ++i) {
    const PackSiteTensors& from = file_.sites()[i];
    const SlotLayout::Site& to = layout().sites[i];
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

void FilePack::refuse_if_changed() const {
  if (file_.file().stamp() == stamp_) return;
  throw PackFormatError(path(), "file", "the bytes that were checked", "a file changed since");
}

void FilePack::copy_slices(std::span<std::byte> slot, std::atomic<std::size_t>& next,
                           Pacer pacer) const {
  for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < slices_.size();) {
    const Slice& slice = slices_[i];
    file_.file().read(slice.file_offset, slot.subspan(slice.slot_offset, slice.n_bytes));
    pacer.rest();
  }
}

void FilePack::copy_to(std::span<std::byte> slot, Pacer pacer) const {
  try {
    refuse_if_changed();
    std::atomic<std::size_t> next{0};
    std::future<void> second;
    if (!pacer.is_busy()) {  // one core copies from the page cache at half the memory's speed
      second = std::async(std::launch::async, [&] { copy_slices(slot, next, pacer); });
    }
    copy_slices(slot, next, pacer);
    if (second.valid()) second.get();
    refuse_if_changed();
  } catch (const BaseLoadError& e) {
    throw PackFormatError(e.file, e.field, e.expected, e.found);
  }
  // A pack without token gates: zeros are the factor 1.
  for (std::size_t i = 0; i < layout().sites.size(); ++i) {
    if (file_.sites()[i].token_gate) continue;
    std::memset(slot.data() + layout().sites[i].token_gate, 0,
                static_cast<std::size_t>(geometry().n_embd) * sizeof(float));
    std::memset(slot.data() + layout().sites[i].token_bias, 0, sizeof(float));
  }
}

}  // namespace modularbase
