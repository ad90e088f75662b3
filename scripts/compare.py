#!/usr/bin/env python3
"""Times llama.cpp (llama-cpp-python) and `generate` in turn on the same GGUF files. Development only.

    python3 scripts/compare.py MODEL.gguf ... [--prompt-tokens 512] [--new-tokens 64] [--rounds 3] [--threads N]

Needs `pip install llama-cpp-python` and `cargo build --release`. For each model: prompt tokens per second at
--prompt-tokens, and tokens per second over --new-tokens decoded after a short prompt; medians of the rounds, and the
ratio ours / llama.cpp. Prints Markdown rows for docs/results.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards quietly study maps of distant islands. "


def ours(model, prompt, new_tokens, threads):
    command = [os.path.join(ROOT, "target/release/generate"), "--mode", "receiver", "--receiver", model, "--raw",
               "--prompt", prompt, "--max-new-tokens", str(new_tokens), "--ignore-eos", "--json", "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Peer:
    def __init__(self, model, threads, context):
        from llama_cpp import Llama
        self.llama = Llama(model, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)

    def prefill(self, ids):
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(ids)
        self.llama.scores  # logits of the last token are there
        return len(ids) / (time.perf_counter() - start)

    def decode(self, ids, new_tokens):
        self.llama.reset()
        self.llama.eval(ids)
        start = time.perf_counter()
        for _ in range(new_tokens):
            self.llama.eval([self.llama.sample(temp=0.0)])
        return new_tokens / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print("| model | prefill ours | prefill llama.cpp | ratio | decode ours | decode llama.cpp | ratio |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models:
        peer = Peer(model, args.threads, args.prompt_tokens + args.new_tokens + 64)
        ids = peer.llama.tokenize((TEXT * (args.prompt_tokens // 8)).encode(), add_bos=True)[:args.prompt_tokens]
        long = peer.llama.detokenize(ids).decode(errors="ignore")
        short_ids = peer.llama.tokenize(TEXT.encode(), add_bos=True)
        rows = []
        peer.prefill(ids)
        for _ in range(args.rounds):
            theirs_prefill, theirs_decode = peer.prefill(ids), peer.decode(short_ids, args.new_tokens)
            prefill = ours(model, long, 1, args.threads)["tokens_per_s"]["receiver_prefill"]
            decode = ours(model, TEXT, args.new_tokens, args.threads)["tokens_per_s"]["decode"]
            rows.append((prefill, theirs_prefill, prefill / theirs_prefill, decode, theirs_decode, decode / theirs_decode))
        medians = [statistics.median(column) for column in zip(*rows)]
        cells = [f"{m:.1f}" if i % 3 != 2 else f"{m:.2f}" for i, m in enumerate(medians)]
        print(f"| {os.path.basename(model)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
