#include "modularbase/core/log.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <utility>

namespace modularbase {
namespace {

std::atomic<LogLevel> g_level{LogLevel::kWarning};

struct SinkHolder {
  std::mutex mutex;
  std::shared_ptr<const LogSink> sink;  // null: standard error
};

// Leaked on purpose: threads may log while static objects are being destroyed.
SinkHolder& holder() {
  static SinkHolder* const instance = new SinkHolder;
  return *instance;
}

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    default:
      return "error";
  }
}

void write_to_stderr(LogLevel level, std::string_view message) noexcept {
  // One call, so that lines of different threads do not mix.
  std::fprintf(stderr, "modularbase %s: %.*s\n", level_name(level),
               static_cast<int>(message.size()), message.data());
}

}  // namespace

void set_log_level(LogLevel level) {
  g_level.store(level, std::memory_order_relaxed);
}

LogLevel log_level() {
  return g_level.load(std::memory_order_relaxed);
}

void set_log_sink(LogSink sink) {
  auto next = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
  const std::lock_guard lock(holder().mutex);
  holder().sink.swap(next);  // the old sink dies with `next`, which outlives the lock's scope
}

void log(LogLevel level, std::string_view message) noexcept {
  if (level < log_level() || level == LogLevel::kOff) return;
  try {
    std::shared_ptr<const LogSink> sink;
    {
      const std::lock_guard lock(holder().mutex);
      sink = holder().sink;
    }
    // Called without the lock, so that a sink may itself log or replace the sink.
    if (sink) return (*sink)(level, message);
  } catch (...) {
    write_to_stderr(LogLevel::kError, "the log sink failed on the next message");
  }
  write_to_stderr(level, message);
}

}  // namespace modularbase
