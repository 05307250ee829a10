#pragma once

#include <optional>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/engine/engine.h"

namespace modularbase {

// What comes of it lies with the caller alone once that is told, an exception, too.
template <class Errand>
std::invoke_result_t<Errand> Engine::on_engine_thread(Errand errand) {
  std::optional<std::invoke_result_t<Errand>> result;
  std::exception_ptr error;
  std::mutex mutex;
  std::condition_variable told;
  bool is_over = false;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw CancelledError("the engine is closed");
    errands_.push_back([&](bool is_open) {
      try {
        if (is_open) result.emplace(errand());
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard telling(mutex);
      is_over = true;
      told.notify_all();
    });
  }
  wake_.notify_all();
  std::unique_lock lock(mutex);
  told.wait(lock, [&] { return is_over; });
  if (error) std::rethrow_exception(error);
  if (!result) throw CancelledError("the engine is closed");
  return std::move(*result);
}

}  // namespace modularbase
