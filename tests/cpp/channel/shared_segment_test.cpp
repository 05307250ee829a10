#include "modularbase/channel/shared_segment.h"

#include <doctest/doctest.h>
#include <signal.h>

#include <array>
#include <chrono>
#include <thread>

#include "cpp/channel/small_channel.h"
#include "modularbase/core/log.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kBytes = 8192;

auto open_weights(std::string_view name) {
  return SharedSegment::open(name, kWeightMagic, SharedSegment::Access::kRead);
}

std::string fault_of_opening(std::string_view name) {
  return fault_of([&] { open_weights(name); });
}

std::string fault_of_creating(std::string_view name, std::size_t n_bytes = kBytes) {
  return fault_of([&] { SharedSegment::create(name, n_bytes); });
}

std::shared_ptr<SharedSegment> make(std::string_view name) {
  auto segment = SharedSegment::create(name, kBytes);
  segment->publish_header(kWeightMagic);
  return segment;
}

}  // namespace

TEST_CASE("names are plain") {
  CHECK(segment_path("a.B_c-9") == "/modularbase-" + std::to_string(::geteuid()) + "-a.B_c-9");
  for (const std::string bad : {"", "a/b", "a b", "ä", "a\n"}) {
    CHECK_THROWS_AS(segment_path(bad), InvalidRequestError);
  }
  CHECK_THROWS_AS(segment_path(std::string(65, 'a')), InvalidRequestError);
  CHECK_THROWS_AS(segment_path(std::string_view("a\0b", 3)), InvalidRequestError);
}

TEST_CASE("a segment is private to its owner, shared with who opens it, and gone with its owner") {
  const ChannelName name;
  {
    const auto made = make(name);
    struct ::stat status{};
    REQUIRE(::stat(("/dev/shm" + name.path()).c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == 0600);
    CHECK(made->notice().empty());
    const auto opened = open_weights(name);
    CHECK(opened->n_bytes() == kBytes);
    CHECK(opened->is_live());
    made->data()[kBytes - 1] = std::byte{7};
    CHECK(opened->data()[kBytes - 1] == std::byte{7});
    std::byte last{};
    opened->read(kBytes - 1, std::span(&last, 1));
    CHECK(last == std::byte{7});
    made->close();
    CHECK_FALSE(name.exists());
    CHECK_FALSE(opened->is_live());
    CHECK(opened->state() == State::kClosed);
  }
  CHECK(fault_of_opening(name) == "file");
}

TEST_CASE("an owner's name is not removed by its children, nor a name that another has by now") {
  const ChannelName name;
  auto first = make(name);
  CHECK(in_child([&] { first.reset(); }) == 0);
  CHECK(name.exists());
  CHECK(in_child([&] { ::_exit(fault_of([&] { first->check_writable(); }) != "owner"); }) == 0);
  ::shm_unlink(name.path().c_str());
  const auto second = make(name);
  first.reset();
  CHECK(name.exists());
}

TEST_CASE("a second owner is refused, in the same process and in another") {
  const ChannelName name;
  const auto made = make(name);
  CHECK(fault_of_creating(name) == "owner");
  CHECK(in_child([&] { ::_exit(fault_of_creating(name) != "owner"); }) == 0);
  CHECK(open_weights(name)->is_live());
  try {
    make(name);
  } catch (const ChannelError& error) {
    CHECK(error.segment == name.path());
    CHECK(error.found == "process " + std::to_string(::getpid()));
  }
}

TEST_CASE("what a killed owner left behind is removed, and said") {
  const ChannelName name;
  const int status = in_child([&] {
    const auto left = make(name);
    ::kill(::getpid(), SIGKILL);
  });
  REQUIRE(WIFSIGNALED(status));
  REQUIRE(name.exists());
  CHECK_FALSE(open_weights(name)->is_live());

  std::string logged;
  set_log_sink([&](LogLevel, std::string_view message) { logged = message; });
  const auto made = make(name);
  set_log_sink({});
  CHECK(made->notice().find(name.path()) != std::string::npos);
  CHECK(made->notice().find("left behind") != std::string::npos);
  CHECK(logged == made->notice());
  CHECK(open_weights(name)->is_live());
}

TEST_CASE("an owner that has been killed but not waited for is gone") {
  const ChannelName name;
  const ::pid_t child = ::fork();
  if (child == 0) {
    const auto left = make(name);
    ::kill(::getpid(), SIGKILL);
  }
  ::siginfo_t info{};
  ::waitid(P_PID, static_cast<::id_t>(child), &info, WEXITED | WNOWAIT);
  CHECK_FALSE(make(name)->notice().empty());
  ::waitpid(child, nullptr, 0);
}

TEST_CASE("a process with the number of one that has ended is another") {
  const ChannelName name;
  const ProcessIdentity self = ProcessIdentity::self();
  CHECK(self.is_running());
  CHECK_FALSE(ProcessIdentity{self.pid, self.start + 1}.is_running());
  CHECK_FALSE(ProcessIdentity{}.is_running());
}

TEST_CASE("a segment whose making was cut short is removed") {
  const ChannelName name;
  ::close(name.open(O_RDWR | O_CREAT | O_EXCL));
  CHECK(fault_of_opening(name) == "size");
  CHECK_FALSE(make(name)->notice().empty());
}

TEST_CASE("one that lives without the lock keeps its segment") {
  const ChannelName name;
  ::close(name.open(O_RDWR | O_CREAT | O_EXCL));
  name.shrink(kBytes);
  name.poke(0, kWeightMagic);
  name.poke(24, ProcessIdentity::self());
  CHECK(fault_of_creating(name) == "owner");
  CHECK(name.exists());
}

TEST_CASE("a segment that is still being made cannot be opened") {
  const ChannelName name;
  const auto made = SharedSegment::create(name, kBytes);
  CHECK(fault_of_opening(name) == "state");
  made->publish_header(kWeightMagic);
  CHECK(fault_of_opening(name) == "no error");
}

TEST_CASE("headers of another make are named errors") {
  const ChannelName name;
  const auto made = make(name);
  const auto with = [&](std::size_t offset, auto value, auto right) {
    name.poke(offset, value);
    const std::string fault = fault_of_opening(name);
    name.poke(offset, right);
    return fault;
  };
  CHECK(with(0, std::uint64_t{1}, kWeightMagic) == "magic");
  CHECK(with(0, kRingMagic, kWeightMagic) == "magic");
  CHECK(with(8, std::uint32_t{2}, kLayoutVersion) == "layout version");
  CHECK(with(12, std::uint32_t{0x04030201}, kByteOrderMark) == "byte order");
  CHECK(with(16, std::uint64_t{kBytes + 1}, std::uint64_t{kBytes}) == "size");
  CHECK(with(40, std::uint32_t{9}, std::uint32_t{1}) == "state");
  CHECK(fault_of_opening(name) == "no error");
}

TEST_CASE("a file of something else is left alone") {
  const ChannelName name;
  ::close(name.open(O_RDWR | O_CREAT | O_EXCL));
  name.shrink(kBytes);
  name.poke(0, std::uint64_t{42});
  CHECK(fault_of_creating(name) == "magic");
  CHECK(name.exists());
}

TEST_CASE("a segment that others own, or may touch, is refused") {
  const ChannelName name;
  auto made = make(name);
  const int fd = name.open();
  REQUIRE(::fchmod(fd, 0644) == 0);
  CHECK(fault_of_opening(name) == "mode");
  REQUIRE(::fchmod(fd, 0600) == 0);
  if (::geteuid() == 0) {  // nobody else may give files away
    REQUIRE(::fchown(fd, 12345, 12345) == 0);
    CHECK(fault_of_opening(name) == "owner");
    CHECK(fault_of_creating(name) == "owner");
  }
  ::close(fd);
}

TEST_CASE("a segment that got shorter is an error, not a signal") {
  const ChannelName name;
  auto made = make(name);
  const auto opened = open_weights(name);
  name.shrink(100);
  CHECK(fault_of([&] { opened->check_size(); }) == "size");
  CHECK(fault_of([&] { made->check_writable(); }) == "size");
  std::array<std::byte, 200> bytes;
  CHECK(fault_of([&] { opened->read(0, bytes); }) == "size");
  CHECK(fault_of_opening(name) == "size");
  name.shrink(0);
  CHECK(fault_of([&] { (void)opened->is_live(); }) == "size");
  made.reset();  // touches nothing that is not there
  CHECK_FALSE(name.exists());
}

TEST_CASE("more than there is room for is an error, and leaves nothing") {
  const ChannelName name;
  CHECK(fault_of_creating(name, kMaxSegmentBytes) == "size");
  CHECK_FALSE(name.exists());
}

TEST_CASE("of many who make one name at once, one at a time has it") {
  const ChannelName name;
  std::atomic<int> n_owners{0}, n_made{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        try {
          const auto made = make(name);
          CHECK(n_owners.fetch_add(1) == 0);
          ++n_made;
          --n_owners;
        } catch (const ChannelError&) {  // another has it
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(n_made > 0);
  CHECK_FALSE(name.exists());
}
