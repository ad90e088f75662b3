#!/usr/bin/env bash
# All tests. Needs Rust with rustfmt and clippy, a C and C++ compiler, Python 3, and for the CUDA kernels nvcc, which comes from PyPI
# where the machine has none. The page is tested in Chromium by Node.js 20; where they are missing (and cannot be installed), that is said and left
# out, but not in CI.
set -euo pipefail
cd "$(dirname "$0")/.."

# A step says how long it took, and the last line how long all of them.
step() {
    local start=$SECONDS
    printf '\n== %s\n' "$*"
    "$@"
    printf -- '-- %s s: %s\n' $((SECONDS - start)) "$*"
}

if ! command -v nvcc >/dev/null && [ -z "${NVCC:-}" ]; then
    step scripts/nvcc.sh
fi
step cargo fmt --all --check
step cargo clippy --workspace --all-targets -- -D warnings
# A test that provokes panics should not fill the log with their traces.
RUST_BACKTRACE=0 step cargo test --workspace
# Every bench once, on tiny shapes: each checks its result before it times anything.
RUST_BACKTRACE=0 step cargo test --benches
# The same on the software GPU, preloaded into the benches alone.
softcuda="['env', 'LD_PRELOAD=$PWD/target/debug/deps/libsoftcuda.so']"
RUST_BACKTRACE=0 C2C_BENCH_DEVICE=cuda step cargo test --benches --config "target.'cfg(unix)'.runner=$softcuda"
step cargo check --features nccl
# The server as other people's programs see it: the one that the tests above were built with.
export C2C_SERVE=$PWD/target/debug/serve-local
step scripts/serve_clients.py
step scripts/browser.sh
step scripts/readme.sh
printf '\n== all passed in %s min %s s\n' $((SECONDS / 60)) $((SECONDS % 60))
