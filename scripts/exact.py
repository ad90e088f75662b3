#!/usr/bin/env python3
"""Logits of `generate --dtype f32` beside those of Hugging Face transformers on the same GGUF files. Development only.

    pip install torch transformers gguf accelerate safetensors
    cargo build --release && python scripts/exact.py MODEL.gguf...

transformers expands the file's weights to f32 as we do, so both compute the same function: what is left is rounding.
Both read 64 seeded random token ids; the largest difference of any logit is printed, and the exit code is 1 if one is
over 1e-3 of the largest logit.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BINARY = Path(__file__).parent.parent / "target/release/generate"


def ours(model, ids):
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "ids.safetensors", Path(folder) / "found.safetensors"
        save_file({"input_ids": ids}, given)
        command = [BINARY, "--mode", "receiver", "--receiver", model, "--dtype", "f32", "--max-new-tokens", "1"]
        command += ["--input", given, "--dump", found]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        return load_file(found)["logits"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    args = parser.parse_args()
    exact = True
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)
        with torch.no_grad():
            theirs = model(ids).logits
        found = ours(path, ids)
        difference, largest = (found - theirs).abs().max().item(), theirs.abs().max().item()
        exact &= difference <= 1e-3 * largest
        print(f"{path.stem}: {list(found.shape)} logits up to {largest:.1f} differ by at most {difference:.2g}", flush=True)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
