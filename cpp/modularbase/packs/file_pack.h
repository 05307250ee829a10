#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "modularbase/packs/pack.h"

namespace modularbase {

/// A pack file that was read and checked once, and is kept open, so that it can be copied also
/// after its name is gone from the disk.
class FilePack : public Pack {
 public:
  /// Reads and checks everything: format, numbers, digest.
  /// \param digest "sha256:" and the file's digest, or empty when the caller does not know it.
  /// \param pacer rests between slices of the work.
  /// \throws PackFormatError; PackIncompatibleError, see check_base().
  static std::unique_ptr<const FilePack> open(const std::string& path, const std::string& digest,
                                              const std::string& name, const PackBase& base,
                                              Pacer pacer = {});

  /// On two cores where nobody computes. \throws PackFormatError when the file was changed since it
  /// was checked, or cannot be read.
  void copy_to(std::span<std::byte> slot, Pacer pacer = {}) const override;

 private:
  /// Bytes of the file that go to one place of the slot; Pacer::kSliceBytes at most.
  struct Slice {
    std::size_t file_offset;
    std::size_t slot_offset;
    std::size_t n_bytes;
  };
  FilePack(PackFile file, const FileStamp& stamp, PackFacts facts);
  void plan_copy();
  void copy_slices(std::span<std::byte> slot, std::atomic<std::size_t>& next, Pacer pacer) const;
  void refuse_if_changed() const;

  PackFile file_;
  FileStamp stamp_;
  std::vector<Slice> slices_;
};

}  // namespace modularbase
