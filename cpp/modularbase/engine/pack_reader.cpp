#include "modularbase/engine/pack_reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <future>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/io/quantize.h"
#include "modularbase/packs/memory_pack.h"

namespace modularbase {

using channel::PlacedTensor;
using channel::WeightReader;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::chrono::seconds kPatience{10};  // with a writer that overtakes copies

std::string shape_text(std::span<const std::int64_t> ne) {
  std::string text;
  for (const std::int64_t n : ne) text += (text.empty() ? "[" : ", ") + std::to_string(n);
  return text + "]";
}

bool is_plain(ggml_type type) {
  return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

/// A slice of numbers that are checked, or rounded: a fraction of a millisecond.
std::int64_t slice_values(ggml_type type, bool is_rounded) {
  return is_rounded && type == GGML_TYPE_Q4_K ? 4096 : 65536;
}

std::span<std::byte> slice(std::span<std::byte> bytes, std::size_t i, std::size_t n_bytes) {
  const auto rest = bytes.subspan(i * n_bytes);
  return rest.first(std::min(n_bytes, rest.size()));
}

/// What of a pack's meaning is not in its payload.
std::string description(const ChannelPack& pack) {
  const PackGeometry& g = pack.geometry;
  std::string text;
  for (const std::int64_t n : {g.n_embd, g.d_inner, g.d_ff, g.n_expert, g.n_expert_used,
                               std::int64_t{g.adapter_type}, std::int64_t{g.expert_type}}) {
    text += std::to_string(n) + " ";
  }
  for (const int site : g.sites) text += std::to_string(site) + " ";
  return text + std::to_string(g.norm_eps) + " " + std::to_string(pack.scale);
}

std::string digest_text(std::uint64_t digest) {
  char text[24];
  std::snprintf(text, sizeof text, "xxh64:%016" PRIx64, digest);
  return text;
}

// Of memory that is reserved; without them the kernel hands out thousands of pages one by one.
void advise_huge_pages(const std::vector<std::byte>& bytes) {
  constexpr std::size_t kPage = 4096;
  const auto begin = (reinterpret_cast<std::uintptr_t>(bytes.data()) + kPage - 1) / kPage * kPage;
  const auto end =
      (reinterpret_cast<std::uintptr_t>(bytes.data()) + bytes.capacity()) / kPage * kPage;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace

/// A tensor that a pack of this geometry has.
struct PackReader::Expected {
  std::string name;
  std::vector<std::int64_t> ne;
  ggml_type type;
  std::size_t slot_offset;
  enum { kPlain, kMatrix, kTokenGate } kind = kPlain;  // kMatrix: may be rounded
  bool may_be_absent() const { return kind == kTokenGate; }
};

PackReader::PackReader(const WeightReader& channel, ChannelPack pack, const PackBase& base)
    : channel_(channel), pack_(std::move(pack)), layout_(pack_.geometry) {
  check_base(pack_.name, pack_.geometry, base);
  for (const Expected& expected : expected_tensors()) add_part(expected);
  refuse_unknown();
  std::ranges::sort(parts_, {}, &Part::source_offset);
}

std::vector<PackReader::Expected> PackReader::expected_tensors() const {
  const auto& [n_embd, d_inner, d_ff, n_expert, n_used, layers, eps, adapter, expert] =
      pack_.geometry;
  std::vector<Expected> all;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const SlotLayout::Site& at = layout_.sites[i];
    const auto add = [&](const char* name, std::vector<std::int64_t> ne, ggml_type type,
                         std::size_t offset, auto kind) {
      all.push_back({"site." + std::to_string(i) + "." + name, std::move(ne), type, offset, kind});
    };
    add("in.weight", {n_embd, d_inner}, adapter, at.in, Expected::kMatrix);
    add("norm.weight", {d_inner}, GGML_TYPE_F32, at.norm, Expected::kPlain);
    add("router.weight", {d_inner, n_expert}, GGML_TYPE_F32, at.router, Expected::kPlain);
    add("expert_gate.weight", {d_inner, d_ff, n_expert}, expert, at.expert_gate, Expected::kMatrix);
    add("expert_up.weight", {d_inner, d_ff, n_expert}, expert, at.expert_up, Expected::kMatrix);
    add("expert_down.weight", {d_ff, d_inner, n_expert}, expert, at.expert_down, Expected::kMatrix);
    add("out.weight", {d_inner, n_embd}, adapter, at.out, Expected::kMatrix);
    add("token_gate.weight", {n_embd}, GGML_TYPE_F32, at.token_gate, Expected::kTokenGate);
    add("token_gate.bias", {1}, GGML_TYPE_F32, at.token_bias, Expected::kTokenGate);
  }
  return all;
}

void PackReader::refuse(const std::string& field, const std::string& expected,
                        const std::string& found) const {
  throw ChannelError(channel_.path(), field, expected, found);
}

void PackReader::add_part(const Expected& expected) {
  const auto& tensors = channel_.tensors();
  const auto found = std::ranges::find(tensors, expected.name, &PlacedTensor::name);
  if (found == tensors.end()) {
    if (expected.may_be_absent()) return;  // zeros: the factor 1
    refuse(expected.name, "a tensor " + shape_text(expected.ne), "none");
  }
  if (found->ne != expected.ne) {
    refuse(expected.name + " shape", shape_text(expected.ne), shape_text(found->ne));
  }
  const auto source = static_cast<ggml_type>(found->type);
  const bool is_matrix = expected.kind == Expected::kMatrix;
  if (source != expected.type && !(is_matrix && is_plain(source))) {
    const std::string wanted = ggml_type_name(expected.type);
    refuse(expected.name + " type", is_matrix ? wanted + ", or plain numbers to round" : wanted,
           ggml_type_name(source));
  }
  std::size_t n_values = 1;
  for (const std::int64_t n : expected.ne) n_values *= static_cast<std::size_t>(n);
  const std::int64_t n_per_row = expected.ne[0];
  const std::size_t n_rows = n_values / static_cast<std::size_t>(n_per_row);
  parts_.push_back({.name = expected.name,
                    .source_type = source,
                    .type = expected.type,
                    .n_per_row = n_per_row,
                    .source_offset = found->offset,
                    .source_bytes = found->n_bytes,
                    .slot_offset = expected.slot_offset,
                    .slot_bytes = n_rows * ggml_row_size(expected.type, n_per_row),
                    .staging_offset = staging_bytes_});
  if (parts_.back().is_rounded()) staging_bytes_ += (found->n_bytes + 63) / 64 * 64;
}

// A tensor nobody reads would be a pack that silently does less than it says.
void PackReader::refuse_unknown() const {
  for (const PlacedTensor& tensor : channel_.tensors()) {
    if (std::ranges::find(parts_, tensor.name, &Part::name) == parts_.end()) {
      refuse(tensor.name, "no such tensor in a pack of this geometry", shape_text(tensor.ne));
    }
  }
  for (std::size_t i = 0; i < layout_.sites.size(); ++i) {
    const std::string gate = "site." + std::to_string(i) + ".token_gate.";
    const auto has = [&](const char* name) {
      return std::ranges::find(parts_, gate + name, &Part::name) != parts_.end();
    };
    if (has("weight") != has("bias")) refuse(gate + "bias", "with its weight, or neither", "one");
  }
}

// The kernel hands out pages as they are touched, which takes its time.
void PackReader::make_room(Pacer& pacer) {
  const auto grow = [&](std::vector<std::byte>& bytes, std::size_t n) {
    bytes.reserve(n);
    advise_huge_pages(bytes);
    while (bytes.size() < n) {
      bytes.resize(std::min(n, bytes.size() + Pacer::kSliceBytes));
      pacer.rest();
    }
  };
  grow(image_, layout_.slot_bytes);
  grow(staging_, staging_bytes_);
}

void PackReader::copy(const WeightReader::Snapshot& snapshot, Pacer& pacer) {
  hash_ = {};
  std::size_t at = 0;  // behind what was hashed: the digest is of the gaps, too
  std::vector<std::byte> gap;
  const auto take = [&](std::size_t offset, std::span<std::byte> out) {
    channel_.copy(snapshot, offset, out);
    hash_.update(out);
    at = offset + out.size();
  };
  for (const Part& part : parts_) {
    gap.resize(part.source_offset - at);
    take(at, gap);
    const auto place = part.is_rounded() ? std::span(staging_).subspan(part.staging_offset)
                                         : std::span(image_).subspan(part.slot_offset);
    for (std::size_t done = 0; done < part.source_bytes; done += Pacer::kSliceBytes) {
      const std::size_t n = std::min(Pacer::kSliceBytes, part.source_bytes - done);
      take(part.source_offset + done, place.subspan(done, n));
      pacer.rest();
    }
  }
  gap.resize(channel_.payload_bytes() - at);
  take(at, gap);
}

WeightReader::Snapshot PackReader::copy_newest(Pacer pacer) {
  const auto end = Clock::now() + kPatience;
  for (;;) {
    const WeightReader::Snapshot snapshot = channel_.begin();
    if (snapshot.generation == 0) return snapshot;
    copy(snapshot, pacer);
    if (channel_.holds(snapshot)) {
      if (hash_.digest() == snapshot.digest) return snapshot;
      refuse("digest of generation " + std::to_string(snapshot.generation),
             std::to_string(snapshot.digest), std::to_string(hash_.digest()));
    }
    if (Clock::now() > end) {
      refuse("copy", "a generation that stays while it is copied",
             "one that is overwritten each time");
    }
    pacer = {};  // rests are what the writer overtakes
  }
}

void PackReader::finish(const Part& part, Pacer& pacer) {
  const auto n_rows = static_cast<std::size_t>(
      std::max<std::int64_t>(1, slice_values(part.type, part.is_rounded()) / part.n_per_row));
  const std::size_t source_bytes = n_rows * ggml_row_size(part.source_type, part.n_per_row);
  const std::size_t slot_bytes = n_rows * ggml_row_size(part.type, part.n_per_row);
  const auto slot = std::span(image_).subspan(part.slot_offset, part.slot_bytes);
  const auto source = part.is_rounded()
                          ? std::span(staging_).subspan(part.staging_offset, part.source_bytes)
                          : slot;
  for (std::size_t i = 0; i * source_bytes < source.size(); ++i) {
    const auto from = slice(source, i, source_bytes);
    const bool fits = part.is_rounded() ? convert_rows(part.source_type, from, part.type,
                                                       slice(slot, i, slot_bytes), part.n_per_row)
                                        : all_finite(part.type, from);
    if (!fits) {
      refuse(part.name, "finite numbers that fit " + std::string(ggml_type_name(part.type)),
             "NaN, infinity or one too large");
    }
    pacer.rest();
  }
}

// On two cores where nobody computes.
void PackReader::check_and_round(Pacer pacer) {
  std::atomic<std::size_t> next{0};
  const auto work = [&](Pacer own) {
    for (std::size_t i; (i = next.fetch_add(1)) < parts_.size();) finish(parts_[i], own);
  };
  std::future<void> second;
  if (!pacer.is_busy()) second = std::async(std::launch::async, work, pacer);
  work(pacer);
  if (second.valid()) second.get();
}

PublishedPack PackReader::read_into(PackResidency& packs) {
  const auto start = Clock::now();
  Pacer pacer = packs.pacer();
  make_room(pacer);
  const WeightReader::Snapshot snapshot = copy_newest(pacer);
  if (snapshot.generation == 0) return {};
  check_and_round(pacer);
  const std::string meaning = description(pack_);
  hash_.update(std::as_bytes(std::span(meaning)));
  PackFacts facts{.name = pack_.name,
                  .path = channel_.path(),
                  .digest = digest_text(hash_.digest()),
                  .geometry = pack_.geometry,
                  .scale = pack_.scale};
  facts.verify_us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  auto pack = std::make_unique<const MemoryPack>(std::move(facts), std::exchange(image_, {}));
  return {snapshot.generation, packs.adopt(std::move(pack))};
}

}  // namespace modularbase
