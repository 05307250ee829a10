#include "modularbase/engine/request.h"

namespace modularbase {

void Ticket::rethrow_locked() const {
  if (error_) std::rethrow_exception(error_);
}

std::vector<GeneratedToken> Ticket::wait_tokens(std::size_t n_seen,
                                                std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [&] { return finished_ || result_.tokens.size() > n_seen; });
  rethrow_locked();
  const auto first = static_cast<std::ptrdiff_t>(std::min(n_seen, result_.tokens.size()));
  return {result_.tokens.begin() + first, result_.tokens.end()};
}

bool Ticket::wait_finished(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  const bool finished = changed_.wait_for(lock, timeout, [&] { return finished_; });
  rethrow_locked();
  return finished;
}

bool Ticket::finished() const {
  const std::lock_guard lock(mutex_);
  return finished_;
}

RequestResult Ticket::result() const {
  const std::lock_guard lock(mutex_);
  rethrow_locked();
  return result_;
}

void Ticket::update(const std::function<void(RequestResult&)>& change) {
  {
    const std::lock_guard lock(mutex_);
    change(result_);
  }
  changed_.notify_all();
}

void Ticket::finish(FinishReason reason) {
  {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    result_.finish_reason = reason;
  }
  changed_.notify_all();
}

void Ticket::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    error_ = std::move(error);
  }
  changed_.notify_all();
}

}  // namespace modularbase
