#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "modularbase/channel/checksum.h"
#include "modularbase/channel/weight_channel.h"
#include "modularbase/packs/residency.h"

namespace modularbase {

/// What a channel says of the pack in it; see docs/weight-channel.md.
struct ChannelPack {
  std::string name;       // for people: what errors call the pack
  PackGeometry geometry;  // with the types that the slot shall have
  float scale = 1.0f;
};

/// A generation that was published, and what residency calls it.
struct PublishedPack {
  std::uint64_t number = 0;  // in the channel; 0: none is published yet
  GenerationId id = 0;
};

/// Makes packs of what a trainer publishes: copies a generation while it holds still, checks it,
/// and rounds it to the types of the slot. One thread at a time.
class PackReader {
 public:
  /// \param channel outlives the reader.
  /// \throws ChannelError naming the tensor that does not fit the geometry; PackIncompatibleError
  /// when the base has another shape.
  PackReader(const channel::WeightReader& channel, ChannelPack pack, const PackBase& base);

  /// Reads the newest generation and makes it known to `packs`, resting as they say.
  /// \throws ChannelError when a number is not finite or too large for its type, the content is not
  /// what was published, or the writer overtakes copies for seconds.
  PublishedPack read_into(PackResidency& packs);

 private:
  /// A tensor, where it lies in a payload, and where it goes in the slot.
  struct Part {
    std::string name;
    ggml_type source_type;
    ggml_type type;
    std::int64_t n_per_row;
    std::size_t source_offset;
    std::size_t source_bytes;
    std::size_t slot_offset;
    std::size_t slot_bytes;
    std::size_t staging_offset;  // where types differ: it waits there to be rounded
    bool is_rounded() const { return source_type != type; }
  };
  struct Expected;
  std::vector<Expected> expected_tensors() const;
  void add_part(const Expected& expected);
  void refuse_unknown() const;
  [[noreturn]] void refuse(const std::string& field, const std::string& expected,
                           const std::string& found) const;
  void make_room(Pacer& pacer);
  channel::WeightReader::Snapshot copy_newest(Pacer pacer);
  void copy(const channel::WeightReader::Snapshot& snapshot, Pacer& pacer);
  void check_and_round(Pacer pacer);
  void finish(const Part& part, Pacer& pacer);

  const channel::WeightReader& channel_;
  const ChannelPack pack_;
  const SlotLayout layout_;
  std::vector<Part> parts_;  // in the order of the payload
  std::size_t staging_bytes_ = 0;
  std::vector<std::byte> image_;    // a slot's bytes
  std::vector<std::byte> staging_;  // and those that are yet to be rounded
  channel::Xxh64 hash_;             // of the payload that they are
};

}  // namespace modularbase
