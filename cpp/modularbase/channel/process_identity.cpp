#include "modularbase/channel/process_identity.h"

#include <unistd.h>

#include <fstream>
#include <sstream>

namespace modularbase::channel {
namespace {

struct ProcessStat {
  char state = 'X';
  std::uint64_t start = 0;
};

/// Fields 3 and 22 of /proc/PID/stat; a state of X where there is no such process.
ProcessStat stat_of(std::uint64_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return {};
  // The program's name, in brackets, may hold spaces and brackets of its own.
  const std::size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return {};
  std::istringstream fields(line.substr(name_end + 1));
  ProcessStat stat;
  fields >> stat.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  if (!(fields >> stat.start)) return {};
  return stat;
}

}  // namespace

ProcessIdentity ProcessIdentity::self() {
  const auto pid = static_cast<std::uint64_t>(::getpid());
  return {pid, stat_of(pid).start};
}

bool ProcessIdentity::is_running() const {
  if (pid == 0) return false;
  const ProcessStat stat = stat_of(pid);
  return stat.state != 'X' && stat.state != 'Z' && stat.start == start;
}

}  // namespace modularbase::channel
