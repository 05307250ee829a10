#pragma once

#include <functional>
#include <string_view>

namespace modularbase {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

/// Receives each message that passes the level, without a trailing newline. May be called from any
/// thread, several at once, and once more after it was replaced if a message was then on its way.
using LogSink = std::function<void(LogLevel level, std::string_view message)>;

/// Messages below this level are dropped before they reach the sink; kWarning at start.
void set_log_level(LogLevel level);
LogLevel log_level();

/// Replaces standard error as the place where messages go; an empty sink brings it back.
void set_log_sink(LogSink sink);

/// Never throws: a message that the sink fails to take goes to standard error.
void log(LogLevel level, std::string_view message) noexcept;

}  // namespace modularbase
