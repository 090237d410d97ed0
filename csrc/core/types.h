// The one idea: a sequence is a path in a tree of blocks.
//
//   node      up to block_size tokens of content, a parent, and for each tier the block that holds
//             its keys and values and a count of who needs it there
//   sequence  where a path ends, and how many of the last node's tokens belong to it
//   published a full node whose tokens are all known and that lookups find; others are private
//
// In each tier every block is exactly one of
//   free      in the pool
//   active    its node's count > 0: a sequence ends there, or a counted child hangs below
//   cached    its node's count == 0: published, a prefix hit, evictable
// so that always
//   free + active + cached == num_blocks
// Block 0 is padding for block tables and outside that sum: usable blocks are 1 .. num_blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pagedkv {

enum class Tier : std::uint8_t { device = 0, host = 1 };
inline constexpr int kNumTiers = 2;
inline constexpr Tier kTiers[kNumTiers] = {Tier::device, Tier::host};
inline constexpr std::size_t index(Tier tier) { return static_cast<std::size_t>(tier); }
inline constexpr Tier other(Tier tier) { return tier == Tier::device ? Tier::host : Tier::device; }
inline constexpr const char* name(Tier tier) { return tier == Tier::device ? "device" : "host"; }

using Token = std::int32_t;

// Ids that cannot be mixed up. A BlockId means nothing without its tier.
enum class NodeId : std::int32_t { none = -1 };
enum class BlockId : std::int32_t { none = 0 };
enum class SequenceId : std::int64_t {};
enum class TransferId : std::int64_t { none = 0 };

inline constexpr std::size_t index(NodeId node) { return static_cast<std::size_t>(node); }
inline constexpr std::int32_t index(BlockId block) { return static_cast<std::int32_t>(block); }

inline constexpr int kMaxBlockSize = 4096;
inline constexpr int kMaxBatch = 65535;

}  // namespace pagedkv
