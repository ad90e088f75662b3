#!/usr/bin/env bash
# Puts nvcc into target/nvcc, from NVIDIA's PyPI packages: no GPU, driver or CUDA toolkit needed. build.rs finds it there.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=target/nvcc/nvidia/cu13/bin/nvcc
if [ -x "$nvcc" ]; then
    echo "$nvcc is there already"
    exit 0
fi
# nvcc itself, its optimiser, the headers of the device runtime and the compiler's own, and those of libcu++.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85)
rm -rf target/nvcc.part
mkdir -p target
python3 -m venv target/nvcc.part/venv
target/nvcc.part/venv/bin/python -m pip install --quiet --no-deps --target target/nvcc.part/packages "${packages[@]}"
rm -rf target/nvcc
mv target/nvcc.part/packages target/nvcc
rm -rf target/nvcc.part
# The next build looks for it again.
touch build.rs
"$nvcc" --version
