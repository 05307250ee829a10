#include "modularbase/core/log.h"

#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace modularbase;

namespace {

/// Gives the log back as it was.
struct LogReset {
  ~LogReset() {
    set_log_sink({});
    set_log_level(LogLevel::kWarning);
  }
};

}  // namespace

TEST_CASE("a sink receives what reaches the level, and nothing below it") {
  const LogReset reset;
  std::vector<std::pair<LogLevel, std::string>> seen;
  set_log_sink(
      [&](LogLevel level, std::string_view message) { seen.emplace_back(level, message); });
  CHECK(log_level() == LogLevel::kWarning);
  log(LogLevel::kInfo, "dropped");
  log(LogLevel::kWarning, "kept");
  set_log_level(LogLevel::kDebug);
  log(LogLevel::kDebug, "kept too");
  set_log_level(LogLevel::kOff);
  log(LogLevel::kError, "dropped");
  log(LogLevel::kOff, "dropped");
  REQUIRE(seen.size() == 2);
  CHECK(seen[0] == std::pair{LogLevel::kWarning, std::string("kept")});
  CHECK(seen[1] == std::pair{LogLevel::kDebug, std::string("kept too")});
}

TEST_CASE(
    "a sink may log and replace itself, and a failing one loses nothing but the message's place") {
  const LogReset reset;
  int n_calls = 0;
  set_log_sink([&](LogLevel, std::string_view) {
    ++n_calls;
    set_log_sink([&](LogLevel, std::string_view) { n_calls += 10; });
    log(LogLevel::kError, "from the sink");
  });
  log(LogLevel::kError, "first");
  CHECK(n_calls == 11);

  set_log_sink([&](LogLevel, std::string_view) { throw std::runtime_error("broken"); });
  log(LogLevel::kError, "this line belongs to a test of failing sinks");  // must not terminate
}

TEST_CASE("threads may log while the sink is replaced") {
  const LogReset reset;
  std::atomic<int> n_messages = 0;
  const auto count = [&](LogLevel, std::string_view) { ++n_messages; };
  set_log_sink(count);
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([] {
        for (int i = 0; i < 500; ++i) log(LogLevel::kError, "message");
      });
    }
    for (int i = 0; i < 100; ++i) set_log_sink(count);
  }
  CHECK(n_messages == 2000);
}
