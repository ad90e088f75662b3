#!/usr/bin/env bash
# All tests. Needs Rust with rustfmt and clippy, and a C compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; "$@"; }

step cargo fmt --all --check
step cargo clippy --all-targets -- -D warnings
# A test that provokes panics should not fill the log with their traces.
RUST_BACKTRACE=0 step cargo test
# Every bench once, on tiny shapes: each checks its result before it times anything.
RUST_BACKTRACE=0 step cargo test --benches
step scripts/readme.sh
