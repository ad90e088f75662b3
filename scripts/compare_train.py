#!/usr/bin/env python3
"""Times an optimiser step of the authors' training script and ours in turn, on the same shapes with random weights. Development only.

    python3 scripts/compare_train.py --c2c CHECKOUT --python VENV/bin/python --reference bench_reference.py \\
        [--dtype bf16] [--rounds 1] [--runs 2] [--threads N] [--tiny]

256 tokens, the last 64 of them the answer, the published fuser (478 M parameters). CHECKOUT is thu-nics/C2C, VENV has torch and
transformers, bench_reference.py times the checkout's step. Needs `cargo build --release --example train_step`; theirs takes 7 GB of
memory, ours 11 (weights, gradient and both moments of the fuser in f32; theirs are bf16). A round is one process of theirs and one of
ours, each with --runs timed steps after a warm-up. Prints Markdown rows for docs/results.md: medians of the rounds, and the ratio.
--tiny shows that everything works; the two programs then differ in shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What theirs is called in its results, and in the table.
STEPS = [
    ("sft_step_as_script", "an optimiser step, as their script does it"),
    ("sft_step_plain", "the same without its debugging aids"),
]
# Theirs as parts of its step, ours as phases.
PARTS = [
    ("forward and loss", ("forward",), ("sharer", "receiver_forward", "fuse", "loss")),
    ("backward", ("backward",), ("receiver_backward", "fuser_backward")),
    ("clipping and AdamW", ("clip", "adamw"), ("norm_and_adamw",)),
]


def theirs(args):
    """{name: (seconds, {part: seconds}, peak bytes)}"""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        command = [args.python, args.reference, "--c2c", args.c2c, "--dtype", args.dtype, "--tokens", "", "--train",
                   "--repeat", str(args.runs), "--threads", str(args.threads), "--json", out]
        run(command + (["--shapes", "tiny"] if args.tiny else []))
        with open(out) as file:
            phases = json.load(file)["phases"]
    names = [name for name, _ in STEPS]
    return {p["phase"]: (p["tokens"] / p["tokens_per_s"], p["parts_s"], p["peak_rss_mib"] * 2**20)
            for p in phases if p["phase"] in names}


def ours(args):
    """{phase: seconds}, tokens, peak bytes"""
    command = [os.path.join(ROOT, "target/release/examples/train_step"), "--dtype", args.dtype, "--runs", str(args.runs),
               "--threads", str(args.threads), "--json"]
    result = json.loads(run(command + (["--tiny"] if args.tiny else [])))
    limits = ", ".join(f"{name} {rate / 1e9:.1f}e9/s" for name, rate in result["limits"].items())
    print(f"{result['device']}, {result['parameters'] / 1e6:.0f} M parameters: {limits}", file=sys.stderr)
    return {p["phase"]: p["median_s"] for p in result["phases"]}, result["tokens"], result["peak_rss_bytes"]


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout}")
    return done.stdout


def row(name, pairs, show, faster=True):
    """`pairs`: (ours, theirs) of each round. The ratio says how many times as fast ours is, or as large."""
    columns = zip(*[(mine, other, other / mine if faster else mine / other) for mine, other in pairs])
    mine, other, ratio = (statistics.median(column) for column in columns)
    print(f"| {name} | {show(mine)} | {show(other)} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c2c", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    rounds = [(ours(args), theirs(args)) for _ in range(args.rounds)]
    tokens = rounds[0][0][1]
    print(f"| {tokens} tokens, {args.dtype} | ours | theirs | ours / theirs |")
    print("|---|---|---|---|")
    for name, title in STEPS:
        pairs = [(mine["step"], other[name][0]) for (mine, _, _), other in rounds]
        row(title, pairs, lambda seconds: f"{seconds:.2f} s, {tokens / seconds:.1f} tok/s")
    for title, parts, phases in PARTS:
        pairs = [(sum(mine[phase] for phase in phases), sum(other["sft_step_plain"][1][part] for part in parts))
                 for (mine, _, _), other in rounds]
        row(f"of it {title}", pairs, lambda seconds: f"{seconds:.2f} s")
    peaks = [(peak, other["sft_step_plain"][2]) for (_, _, peak), other in rounds]
    row("peak memory", peaks, lambda size: f"{size / 2**20:.0f} MiB", faster=False)


if __name__ == "__main__":
    sys.exit(main())
