#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace modularbase {

/// True when every byte belongs to a well-formed UTF-8 sequence (no overlong forms, no surrogates).
bool is_valid_utf8(std::string_view text);

/// Text from an untrusted file, made fit for a message: control characters and bytes that are not
/// UTF-8 become \xNN, and what exceeds `max_bytes` is cut and marked with "...".
std::string printable(std::string_view text, std::size_t max_bytes = 400);

}  // namespace modularbase
