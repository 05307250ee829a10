#include "modularbase/core/errors.h"

#include <string_view>
#include <utility>

#include "modularbase/core/utf8.h"

namespace modularbase {
namespace {

// Parts of a message may come straight from a hostile file; Python can only show valid UTF-8.
std::string sentence(std::string_view field, std::string_view expected, std::string_view found) {
  return printable(field) + ": expected " + printable(expected) + ", found " + printable(found);
}

}  // namespace

FileError::FileError(std::string path, std::string_view name, std::string_view want,
                     std::string_view got)
    : Error(printable(path, 4096) + ": " + sentence(name, want, got)),
      file(std::move(path)),
      field(printable(name)),
      expected(printable(want)),
      found(printable(got)) {}

PackIncompatibleError::PackIncompatibleError(std::string_view id, std::string_view name,
                                             std::string_view want, std::string_view got)
    : Error("pack " + printable(id) + " does not go with this base: " + sentence(name, want, got)),
      pack_id(id),
      field(printable(name)),
      required(printable(want)),
      found(printable(got)) {}

PackNotFoundError::PackNotFoundError(std::string_view id, std::string_view why)
    : Error("pack " + printable(id) + ": " + printable(why)), pack_id(id), reason(why) {}

BudgetExceededError::BudgetExceededError(std::string_view id, std::int64_t needed,
                                         std::int64_t budget, std::string_view why)
    : Error("pack " + printable(id) + " needs " + std::to_string(needed) + " of " +
            std::to_string(budget) + " budgeted bytes: " + printable(why)),
      pack_id(id),
      needed_bytes(needed),
      budget_bytes(budget),
      reason(why) {}

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

}  // namespace modularbase
