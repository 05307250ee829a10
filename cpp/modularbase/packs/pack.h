#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "modularbase/packs/slot_layout.h"

namespace modularbase {

/// The base that packs must have been made for.
struct PackBase {
  std::int64_t n_embd = 0;
  std::int64_t n_layer = 0;
};

/// What is known of a generation, and never changes.
struct PackFacts {
  std::string name;    // for people: what errors call the pack
  std::string path;    // of the file, or the shared-memory segment, that it comes from
  std::string digest;  // names the content: kind of hash, ':' and its digits
  PackGeometry geometry;
  float scale = 1.0f;
  double verify_us = 0.0;  // reading and checking it, once
};

/// One generation of a pack, which can be copied into a slot again and again.
class Pack {
 public:
  explicit Pack(PackFacts facts) : facts_(std::move(facts)), layout_(facts_.geometry) {}
  virtual ~Pack() = default;
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;

  const std::string& name() const { return facts_.name; }
  const std::string& path() const { return facts_.path; }
  const std::string& digest() const { return facts_.digest; }
  const PackGeometry& geometry() const { return facts_.geometry; }
  const SlotLayout& layout() const { return layout_; }
  float scale() const { return facts_.scale; }
  double verify_us() const { return facts_.verify_us; }

  /// Copies the weights into a slot [layout().slot_bytes], with rests beside those who compute.
  /// Any thread. \throws PackFormatError when they cannot be had any more.
  virtual void copy_to(std::span<std::byte> slot, Pacer pacer = {}) const = 0;

 private:
  const PackFacts facts_;
  const SlotLayout layout_;
};

/// \throws PackIncompatibleError when the base has another width or too few layers.
void check_base(const std::string& name, const PackGeometry& geometry, const PackBase& base);

}  // namespace modularbase
