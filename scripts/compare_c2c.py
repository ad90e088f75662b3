#!/usr/bin/env python3
"""Times the authors' PyTorch program and ours in turn on the same shapes with random weights. Development only.

    python3 scripts/compare_c2c.py --c2c CHECKOUT --python VENV/bin/python --reference bench_reference.py \\
        [--tokens 256,1024] [--dtype f32] [--rounds 2] [--runs 2] [--threads N] [--tiny]

CHECKOUT is thu-nics/C2C, VENV has torch and transformers, bench_reference.py times the checkout's phases. Needs
`cargo build --release --example pair`. A round is one process of theirs and one of ours, each with --runs timed runs
after a warm-up. Prints Markdown rows for docs/results.md: tokens per second, medians of the rounds, and the ratio. Peak
memory is that of C2C prefill and decode, with the models and, on their side, Python and PyTorch. --tiny shows that
everything works; the two programs then differ in shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What is called in the table, theirs, ours. Theirs computes the logits of all tokens of both models unless it says not.
PHASES = [
    ("receiver prefill, one row of logits", "receiver_prefill_last_logit", "receiver_prefill"),
    ("receiver prefill, as their program calls it", "receiver_prefill", "receiver_prefill"),
    ("sharer prefill", "sharer_prefill", "sharer_prefill"),
    ("C2C prefill: both and fuse", "c2c_prefill", "c2c_prefill_overlapped"),
    ("C2C prefill, ours serial", "c2c_prefill", "c2c_prefill_serial"),
    ("fuse: C2C less both prefills", "fusion", "c2c_fuse"),
    ("fuse: inside the projectors", "projector_calls", "c2c_fuse"),
    ("decode", "c2c_decode", "c2c_decode"),
]


def theirs(args):
    """{prompt tokens: {phase: tokens per second}} and {prompt tokens: peak bytes}."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        command = [args.python, args.reference, "--c2c", args.c2c, "--dtype", args.dtype, "--tokens", args.tokens,
                   "--repeat", str(args.runs), "--threads", str(args.threads), "--json", out]
        run(command + (["--shapes", "tiny"] if args.tiny else []))
        with open(out) as file:
            phases = json.load(file)["phases"]
    rates, peaks = {}, {}
    for phase in phases:
        tokens = phase["prompt_tokens"]
        rates.setdefault(tokens, {})[phase["phase"]] = phase["tokens_per_s"]
        if phase["phase"] == "c2c_prefill":
            peaks[tokens] = phase["peak_rss_mib"] * 2**20
    return rates, peaks


def ours(args):
    """As theirs."""
    command = [os.path.join(ROOT, "target/release/examples/pair"), "--dtype", args.dtype, "--tokens", args.tokens,
               "--runs", str(args.runs), "--threads", str(args.threads), "--json"]
    result = json.loads(run(command + (["--tiny"] if args.tiny else [])))
    limits = ", ".join(f"{name} {rate / 1e9:.1f}e9/s" for name, rate in result["limits"].items())
    print(f"{result['device']}: {limits}", file=sys.stderr)
    rates = {m["prompt_tokens"]: {p["phase"]: p["tokens"] / p["median_s"] for p in m["phases"]} for m in result["lengths"]}
    return rates, {m["prompt_tokens"]: m["peak_rss_bytes"] for m in result["lengths"]}


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout}")
    return done.stdout


def row(tokens, name, pairs, show):
    """`pairs`: (ours, theirs) of each round."""
    columns = zip(*[(mine, other, mine / other) for mine, other in pairs])
    mine, other, ratio = (statistics.median(column) for column in columns)
    print(f"| {tokens} | {name} | {show(mine)} | {show(other)} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c2c", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--tokens", default="256,1024")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    rounds = [ours(args) + theirs(args) for _ in range(args.rounds)]
    print(f"| prompt | {args.dtype} | ours | theirs | ours / theirs |")
    print("|---|---|---|---|---|")
    for tokens in map(int, args.tokens.split(",")):
        for name, theirs_of, ours_of in PHASES:
            pairs = [(mine[tokens][ours_of], other[tokens][theirs_of]) for mine, _, other, _ in rounds]
            row(tokens, name, pairs, lambda rate: f"{rate:.1f} tok/s")
        peaks = [(mine[tokens], other[tokens]) for _, mine, _, other in rounds]
        row(tokens, "peak memory", peaks, lambda size: f"{size / 2**20:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
