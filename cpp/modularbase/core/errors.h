#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace modularbase {

/// Root of every error this library throws. Anything else that escapes is a bug.
/// The same tree, with the same fields, is defined for Python in python/modularbase/errors.py.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that cannot be used: names the file, the field, and what was expected and found.
class FileError : public Error {
 public:
  FileError(std::string file, std::string_view field, std::string_view expected,
            std::string_view found);
  const std::string file;
  const std::string field;
  const std::string expected;
  const std::string found;
};

class BaseLoadError : public FileError {
 public:
  using FileError::FileError;
};

class PackFormatError : public FileError {
 public:
  using FileError::FileError;
};

/// A request that makes no sense (negative temperature, empty prompt, token id out of range).
class InvalidRequestError : public Error {
 public:
  InvalidRequestError(std::string_view field, std::string_view expected, std::string_view found);
  const std::string field;
  const std::string expected;
  const std::string found;
};

/// Prompt plus requested tokens do not fit the context.
class ContextLengthError : public Error {
 public:
  ContextLengthError(std::int64_t n_tokens, std::int64_t n_ctx);
  const std::int64_t n_tokens;
  const std::int64_t n_ctx;
};

/// The KV cache can never hold this request, however long it waits.
class KvCacheFullError : public Error {
 public:
  KvCacheFullError(std::int64_t needed_bytes, std::int64_t limit_bytes);
  const std::int64_t needed_bytes;
  const std::int64_t limit_bytes;
};

/// No pack of this name in a version that suits; `known` lists those there are.
class PackNotFoundError : public Error {
 public:
  PackNotFoundError(std::string_view pack_id, std::string_view required,
                    std::vector<std::string> known);
  const std::string pack_id;
  const std::string required;
  const std::vector<std::string> known;
};

/// A sound pack that does not go with this base.
class PackIncompatibleError : public Error {
 public:
  PackIncompatibleError(std::string_view pack_id, std::string_view field, std::string_view required,
                        std::string_view found);
  const std::string pack_id;
  const std::string field;
  const std::string required;
  const std::string found;
};

/// A pack found no place among the resident ones.
class BudgetExceededError : public Error {
 public:
  BudgetExceededError(std::string_view pack_id, std::int64_t needed_bytes,
                      std::int64_t budget_bytes, std::string_view reason);
  const std::string pack_id;
  const std::int64_t needed_bytes;
  const std::int64_t budget_bytes;
  const std::string reason;
};

/// A shared-memory segment that cannot be made, or used: names the segment, the field, and what was
/// expected and found.
class ChannelError : public Error {
 public:
  ChannelError(std::string_view segment, std::string_view field, std::string_view expected,
               std::string_view found);
  const std::string segment;
  const std::string field;
  const std::string expected;
  const std::string found;
};

/// The request was cancelled by its owner or by the engine closing.
class CancelledError : public Error {
 public:
  using Error::Error;
};

/// The compute device is missing, out of memory, or failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// What the system says of an errno.
std::string system_error_text(int code);

}  // namespace modularbase
