#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "modularbase/packs/slot_layout.h"

namespace modularbase {

/// The base that packs must have been made for.
struct PackBase {
  std::int64_t n_embd = 0;
  std::int64_t n_layer = 0;
};

/// One generation of a pack: a file that was read and checked once, and is kept open, so that it
/// can be copied into a slot again and again, also after its name is gone from the disk.
class Pack {
 public:
  /// Reads and checks everything: format, numbers, digest.
  /// \param digest "sha256:" and the file's digest, or empty when the caller does not know it.
  /// \param name for people: what errors call the pack.
  /// \param pacer rests between slices of the work.
  /// \throws PackFormatError; PackIncompatibleError when the base has another width or too few
  /// layers.
  Pack(const std::string& path, const std::string& digest, const std::string& name,
       const PackBase& base, Pacer pacer = {});

  const std::string& path() const { return file_.path(); }
  const std::string& name() const { return name_; }
  const std::string& digest() const { return digest_; }
  const PackGeometry& geometry() const { return file_.geometry(); }
  const SlotLayout& layout() const { return layout_; }
  float scale() const { return file_.scale(); }
  const std::string& manifest_json() const { return file_.manifest_json(); }
  double verify_us() const { return verify_us_; }

  /// Copies the weights into a slot [layout().slot_bytes]: with rests beside those who compute,
  /// else on two cores. Any thread.
  /// \throws PackFormatError when the file was changed since it was checked, or cannot be read.
  void copy_to(std::span<std::byte> slot, Pacer pacer = {}) const;

 private:
  /// Bytes of the file that go to one place of the slot; Pacer::kSliceBytes at most.
  struct Slice {
    std::size_t file_offset;
    std::size_t slot_offset;
    std::size_t n_bytes;
  };
  void check_base(const PackBase& base) const;
  void check_digest(const std::string& digest, Pacer pacer);
  void plan_copy();
  void copy_slices(std::span<std::byte> slot, std::atomic<std::size_t>& next, Pacer pacer) const;
  void refuse_if_changed() const;

  PackFile file_;
  std::string name_;
  SlotLayout layout_;
  std::string digest_;
  std::vector<Slice> slices_;
  FileStamp stamp_;
  double verify_us_ = 0.0;
};

}  // namespace modularbase
