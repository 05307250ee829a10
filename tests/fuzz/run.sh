#!/usr/bin/env bash
# Fuzzes the GGUF loader for SECONDS (default 60). Fails on a crash, a hang or too much memory; the input that
# did it is then kept in build/fuzz/findings.
set -euo pipefail

seconds=${1:-60}
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${MODULARBASE_FUZZ_BUILD:-$root/build/fuzz}

compiler() {  # the first of the given names that is installed
  local name
  for name in "$@"; do
    if command -v "$name"; then return; fi
  done
  echo "run.sh: needs clang with libFuzzer (looked for: $*)" >&2
  return 1
}
cc=$(compiler clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14)
cxx=$(compiler clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14)

cmake -S "$root" -B "$build" -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" \
  -DMODULARBASE_BUILD_FUZZERS=ON
cmake --build "$build" --target gguf_fuzz gguf_seeds --parallel 2

corpus=$build/corpus/gguf
mkdir -p "$corpus" "$build/findings"
"$build/tests/fuzz/gguf_seeds" "$corpus"
"$build/tests/fuzz/gguf_fuzz" "$corpus" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
  -rss_limit_mb=1024 -dict="$root/tests/fuzz/gguf.dict" -artifact_prefix="$build/findings/" \
  -print_final_stats=1
