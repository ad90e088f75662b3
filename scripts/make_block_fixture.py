#!/usr/bin/env python3
"""Writes tests/fixtures/blocks.safetensors: random blocks of every GGUF block format and their f32 values.

Values come from the `gguf` package's own dequantisation (pip install gguf numpy safetensors). Scales are drawn from
ordinary weights' range, then from the edges of f16: zeros, subnormals, the largest values, infinity, NaN.
"""

from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

# Format: (blocks, byte offsets of its f16 scales).
FORMATS = {
    "Q4_0": (48, [0]),
    "Q4_1": (48, [0, 2]),
    "Q5_0": (48, [0]),
    "Q5_1": (48, [0, 2]),
    "Q8_0": (48, [0]),
    "Q2_K": (24, [80, 82]),
    "Q3_K": (24, [108]),
    "Q4_K": (24, [0, 2]),
    "Q5_K": (24, [0, 2]),
    "Q6_K": (24, [208]),
    "IQ4_NL": (48, [0]),
}
# +-0, smallest and largest subnormal, smallest normal, +-largest, one, infinity, NaN.
EDGES = [0x0000, 0x8000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x7C00, 0x7E00]

rng = np.random.default_rng(2510_03215)
tensors = {}
for name, (count, scales) in FORMATS.items():
    kind = gguf.GGMLQuantizationType[name]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for at in scales:
        scale = (rng.standard_normal(count) * 0.01).astype(np.float16).view(np.uint16)
        # The last blocks carry the edges, each scale in an order of its own.
        scale[-len(EDGES) :] = rng.permutation(EDGES)
        blocks[:, at : at + 2] = scale.astype("<u2").view(np.uint8).reshape(count, 2)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(blocks, kind)
    tensors[f"{name}.blocks"] = blocks
    tensors[f"{name}.values"] = values.astype(np.float32)

out = Path(__file__).parent.parent / "tests/fixtures/blocks.safetensors"
out.parent.mkdir(parents=True, exist_ok=True)
save_file(tensors, out, metadata={"made_by": "scripts/make_block_fixture.py", "gguf": version("gguf")})
print(out, out.stat().st_size, "bytes")
