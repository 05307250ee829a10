#!/usr/bin/env bash
# Fuzzes the GGUF loader and the reader of packs beside each other, for SECONDS (default 60) together. Fails on a
# crash, a hang or too much memory; the input that did it is then kept in build/fuzz/findings.
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
cmake --build "$build" --target gguf_fuzz pack_fuzz fuzz_seeds --parallel 2

corpus=$build/corpus
mkdir -p "$corpus/gguf" "$corpus/pack" "$build/findings"
"$build/tests/fuzz/fuzz_seeds" "$corpus/gguf" "$corpus/pack"

fuzz() {  # target, most bytes of an input
  "$build/tests/fuzz/$1_fuzz" "$corpus/$1" -max_total_time=$((seconds / 2)) -max_len="$2" -timeout=10 \
    -rss_limit_mb=1024 -dict="$root/tests/fuzz/gguf.dict" -artifact_prefix="$build/findings/" \
    -print_final_stats=1 2>&1 | sed -u "s/^/$1: /"
}
fuzz gguf 4096 &
gguf=$!
status=0
fuzz pack 262144 || status=1
wait "$gguf" || status=1
exit "$status"
