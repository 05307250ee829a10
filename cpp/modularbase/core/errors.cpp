#include "modularbase/core/errors.h"

#include <string_view>
#include <system_error>
#include <utility>

#include "modularbase/core/utf8.h"

namespace modularbase {
namespace {

// Parts of a message may come straight from a hostile file; Python can only show valid UTF-8.
std::string sentence(std::string_view field, std::string_view expected, std::string_view found) {
  return printable(field) + ": expected " + printable(expected) + ", found " + printable(found);
}

std::string pack_not_found(std::string_view pack_id, std::string_view required,
                           const std::vector<std::string>& known) {
  std::string text = "no pack " + printable(pack_id);
  if (!required.empty()) text += " " + printable(required);
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + printable(name);
  return text + "; known packs: " + (names.empty() ? "none" : names);
}

}  // namespace

FileError::FileError(std::string path, std::string_view name, std::string_view want,
                     std::string_view got)
    : Error(printable(path, 4096) + ": " + sentence(name, want, got)),
      file(std::move(path)),
      field(printable(name)),
      expected(printable(want)),
      found(printable(got)) {}

InvalidRequestError::InvalidRequestError(std::string_view name, std::string_view want,
                                         std::string_view got)
    : Error(sentence(name, want, got)),
      field(printable(name)),
      expected(printable(want)),
      found(printable(got)) {}

ContextLengthError::ContextLengthError(std::int64_t tokens, std::int64_t ctx)
    : Error("the request needs " + std::to_string(tokens) + " tokens of context, n_ctx is " +
            std::to_string(ctx)),
      n_tokens(tokens),
      n_ctx(ctx) {}

KvCacheFullError::KvCacheFullError(std::int64_t needed, std::int64_t limit)
    : Error("the request needs " + std::to_string(needed) + " bytes of KV cache, the limit is " +
            std::to_string(limit)),
      needed_bytes(needed),
      limit_bytes(limit) {}

PackNotFoundError::PackNotFoundError(std::string_view pack, std::string_view want,
                                     std::vector<std::string> others)
    : Error(pack_not_found(pack, want, others)),
      pack_id(printable(pack)),
      required(printable(want)),
      known(std::move(others)) {}

PackIncompatibleError::PackIncompatibleError(std::string_view pack, std::string_view name,
                                             std::string_view want, std::string_view got)
    : Error("pack " + printable(pack) + ": " + printable(name) + ": required " + printable(want) +
            ", found " + printable(got)),
      pack_id(printable(pack)),
      field(printable(name)),
      required(printable(want)),
      found(printable(got)) {}

BudgetExceededError::BudgetExceededError(std::string_view pack, std::int64_t needed,
                                         std::int64_t budget, std::string_view why)
    : Error("pack " + printable(pack) + " needs " + std::to_string(needed) +
            " bytes, the budget is " + std::to_string(budget) + ": " + printable(why)),
      pack_id(printable(pack)),
      needed_bytes(needed),
      budget_bytes(budget),
      reason(printable(why)) {}

ChannelError::ChannelError(std::string_view name, std::string_view part, std::string_view want,
                           std::string_view got)
    : Error("segment " + printable(name) + ": " + sentence(part, want, got)),
      segment(printable(name)),
      field(printable(part)),
      expected(printable(want)),
      found(printable(got)) {}

std::string system_error_text(int code) {
  return std::generic_category().message(code);
}

}  // namespace modularbase
