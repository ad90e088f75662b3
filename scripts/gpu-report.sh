#!/usr/bin/env bash
# All tests and benches on a real NVIDIA GPU; writes docs/results-gpu.md. Needs an NVIDIA driver, nvcc (or scripts/nvcc.sh) and Rust.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null; then
    echo "no NVIDIA GPU here: this report needs one" >&2
    exit 1
fi
card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1)
report=docs/results-gpu.md
log=$(mktemp)
trap 'rm -f "$log"' EXIT

C2C_TEST_DEVICE=cuda cargo test --release --test ops_cases --test cuda_pipeline 2>&1 | tee "$log"
tests=$(grep -E '^test (.* \.\.\. |result)' "$log")
C2C_BENCH_DEVICE=cuda cargo bench 2>&1 | tee "$log"
{
    echo "# On a GPU"
    echo
    echo "$card, $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD). Made by \`scripts/gpu-report.sh\`."
    echo
    echo '## Tests'
    echo
    echo '```'
    echo "$tests"
    echo '```'
    echo
    echo '## Benches'
    echo
    echo 'Shares are of what cuBLAS and copies reach on this card in the same run.'
    echo
    echo '```'
    grep -E ' = |time: |over|^cuda|^cpu' "$log" || true
    echo '```'
} >"$report.part"
mv "$report.part" "$report"
echo "wrote $report"
