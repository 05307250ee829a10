#!/usr/bin/env bash
# Installs from apt what is missing for the named groups (build, test, lint) when it may; else says what is
# missing. What a machine has from elsewhere counts: it looks for the programs, not for the packages.
set -euo pipefail

python=${PYTHON:-python3}

has() { command -v "$1" >/dev/null; }

has_header() { echo "#include <$1>" | c++ -E -x c++ - >/dev/null 2>&1; }

has_python_headers() {
  "$python" -c 'import pathlib, sysconfig as s; raise SystemExit(
    not (pathlib.Path(s.get_path("include")) / "Python.h").is_file())' 2>/dev/null
}

has_fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer,address -x c++ -o /dev/null - >/dev/null 2>&1
}

# Prints the packages that the groups lack; the group "faster" holds what can be done without.
missing() {
  local group
  for group in "$@"; do
    case $group in
      build)
        has c++ || echo g++
        has cmake || echo cmake
        has ninja || echo ninja-build
        has "$python" || echo python3
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
        has_python_headers || echo python3-dev
        ;;
      test) has_header doctest/doctest.h || echo doctest-dev ;;
      lint)
        has git || echo git
        has_fuzzer || printf '%s\n' clang libclang-rt-dev
        ;;
      faster) has ccache || echo ccache ;;
    esac
  done
}

may_install() { has apt-get && { [[ $EUID == 0 ]] || sudo -n true 2>/dev/null; }; }

install_packages() {
  local as_root=()
  [[ $EUID == 0 ]] || as_root=(sudo -n)
  echo "installing from apt: $*"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
}

for group in "$@"; do
  if [[ ! $group =~ ^(build|test|lint)$ ]]; then
    echo "apt_packages.sh: expected a group of build, test, lint; found $group" >&2
    exit 2
  fi
done

mapfile -t wanted < <(missing "$@" faster)
if [[ ${#wanted[@]} -gt 0 ]] && may_install; then
  install_packages "${wanted[@]}" || echo "apt_packages.sh: apt-get failed" >&2
fi

mapfile -t lacking < <(missing "$@")
if [[ ${#lacking[@]} -gt 0 ]]; then
  echo "Missing on this machine. On Debian or Ubuntu: sudo apt-get install ${lacking[*]}" >&2
  exit 1
fi
