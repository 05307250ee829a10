#include "modularbase/kv/prefix_index.h"

#include <algorithm>

namespace modularbase {

struct PrefixIndex::Node {
  Node* parent = nullptr;
  std::vector<PrefixKey> keys;  // at most block_tokens; fewer only in a leaf
  BlockId block = -1;
  std::uint64_t last_use = 0;
  std::vector<std::unique_ptr<Node>> children;
};

namespace {

std::int64_t common_prefix(std::span<const PrefixKey> a, std::span<const PrefixKey> b) {
  const auto [end, _] = std::mismatch(
      a.begin(), a.begin() + static_cast<std::ptrdiff_t>(std::min(a.size(), b.size())), b.begin());
  return end - a.begin();
}

}  // namespace

PrefixIndex::PrefixIndex(BlockPool& pool, std::int64_t block_tokens)
    : pool_(pool), block_tokens_(block_tokens), root_(std::make_unique<Node>()) {}

PrefixIndex::~PrefixIndex() = default;

PrefixMatch PrefixIndex::match(std::span<const PrefixKey> keys) {
  PrefixMatch match;
  ++clock_;
  Node* node = root_.get();
  while (!keys.empty()) {
    Node* best = nullptr;
    std::int64_t n_best = 0;
    for (const auto& child : node->children) {
      const std::int64_t n = common_prefix(child->keys, keys);
      if (n > n_best) {
        n_best = n;
        best = child.get();
      }
    }
    if (!best) break;
    touch(*best);
    if (n_best < block_tokens_) {
      match.partial = best->block;
      match.n_partial = n_best;
      break;
    }
    pool_.retain(best->block);
    match.shared.push_back(best->block);
    keys = keys.subspan(static_cast<std::size_t>(block_tokens_));
    node = best;
  }
  return match;
}

void PrefixIndex::insert(std::span<const PrefixKey> keys, std::span<const BlockId> blocks) {
  ++clock_;
  Node* node = root_.get();
  for (std::size_t i = 0; !keys.empty(); ++i) {
    const auto n = std::min<std::size_t>(keys.size(), static_cast<std::size_t>(block_tokens_));
    const auto part = keys.first(n);
    keys = keys.subspan(n);
    Node* known = nullptr;    // holds all of part already
    Node* shorter = nullptr;  // a partly filled leaf that part continues
    for (const auto& child : node->children) {
      const std::int64_t n_same = common_prefix(child->keys, part);
      if (n_same == static_cast<std::int64_t>(n)) known = child.get();
      if (n_same == static_cast<std::int64_t>(child->keys.size()) && child->keys.size() < n) {
        shorter = child.get();
      }
    }
    if (!known && shorter) forget(*shorter);
    node = known ? known : &add_child(*node, part, blocks[i]);
    touch(*node);
  }
}

PrefixIndex::Node& PrefixIndex::add_child(Node& parent, std::span<const PrefixKey> keys,
                                          BlockId block) {
  if (parent.children.empty()) leaves_.erase({parent.last_use, &parent});
  pool_.retain(block);
  ++n_blocks_;
  Node& node = *parent.children.emplace_back(std::make_unique<Node>());
  node.parent = &parent;
  node.keys.assign(keys.begin(), keys.end());
  node.block = block;
  node.last_use = clock_;
  leaves_.insert({node.last_use, &node});
  return node;
}

void PrefixIndex::touch(Node& node) {
  if (leaves_.erase({node.last_use, &node})) leaves_.insert({clock_, &node});
  node.last_use = clock_;
}

void PrefixIndex::forget(Node& leaf) {
  leaves_.erase({leaf.last_use, &leaf});
  pool_.release(leaf.block);
  --n_blocks_;
  Node& parent = *leaf.parent;
  std::erase_if(parent.children, [&](const auto& child) { return child.get() == &leaf; });
  if (parent.children.empty() && parent.parent) leaves_.insert({parent.last_use, &parent});
}

bool PrefixIndex::evict_one() {
  const auto is_free = [&](const Node* node) { return pool_.n_holders(node->block) == 1; };
  for (const auto& [_, leaf] : leaves_) {
    if (!is_free(leaf)) continue;
    forget(*leaf);
    return true;
  }
  // Who holds a block need not hold those before it, once they were compacted.
  for (const auto& [_, leaf] : leaves_) {
    for (Node* node = leaf; node->parent; node = node->parent) {
      if (!is_free(node)) continue;
      forget_all_from(*node);
      return true;
    }
  }
  return false;
}

void PrefixIndex::forget_all_from(Node& node) {
  while (!node.children.empty()) {
    Node* last = &node;
    while (!last->children.empty()) last = last->children.back().get();
    forget(*last);
  }
  forget(node);
}

void PrefixIndex::clear() {
  while (!leaves_.empty()) forget(*leaves_.begin()->second);
}

}  // namespace modularbase
