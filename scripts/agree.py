#!/usr/bin/env python3
"""Greedy continuations of `generate` and of llama.cpp on the same GGUF files, as a Markdown table.

    pip install llama-cpp-python
    cargo build --release && python scripts/agree.py MODEL.gguf...

Both continue 10 raw prompts by 32 tokens. Where they part, both tokens are shown with the log-probability that each
program gives to each. The last row of a model has the largest and the median gap between the two, for llama.cpp and for
us: both round activations to 8 bits (we with --dtype bf16), which decides near-ties.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

PROMPTS = [
    "The capital of France is",
    "Why is the sky blue? Because",
    "def fibonacci(n):\n    ",
    "In 1969, the first human being",
    "The three laws of robotics are:\n1.",
    "Water boils at 100 degrees",
    "import numpy as np\n\n# Solve a linear system\n",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 12 times 12?\nA:",
    "Die Hauptstadt von Deutschland ist",
]
BINARY = Path(__file__).parent.parent / "target/release/generate"


def ours(model, prompt, args):
    command = [BINARY, "--mode", "receiver", "--receiver", model, "--raw", "--prompt", prompt, "--ignore-eos"]
    command += ["--max-new-tokens", str(args.tokens), "--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--json", "--logprobs", "5"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def theirs(llama, prompt, tokens):
    """Token ids, and the log-probabilities of the whole vocabulary that each was drawn from."""
    ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
    llama.reset()
    llama.eval(ids)
    drawn, logprobs = [], []
    for _ in range(tokens):
        scores = log_softmax(np.array(llama._scores[-1]))
        logprobs.append(scores)
        drawn.append(int(scores.argmax()))
        llama.eval(drawn[-1:])
    return len(ids), drawn, logprobs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f32"])
    args = parser.parse_args()

    print("| model | prompt | equal tokens | llama.cpp's token (llama.cpp, ours) | ours (llama.cpp, ours) |")
    print("|---|---|---|---|---|", flush=True)
    for model in args.models:
        llama = Llama(str(model), n_ctx=128, n_threads=args.threads, logits_all=True, verbose=False)
        whole, gaps = 0, ([], [])
        for prompt in PROMPTS:
            answer = ours(model, prompt, args)
            length, drawn, logprobs = theirs(llama, prompt, args.tokens)
            if length != answer["prompt_tokens"]:
                sys.exit(f"{model}: {prompt!r} is {length} tokens for llama.cpp, {answer['prompt_tokens']} for us")
            found = answer["tokens"]
            pairs = zip(drawn, found)
            at = next((n for n, (a, b) in enumerate(pairs) if a != b), args.tokens)
            whole += at == args.tokens
            row = [model.stem, json.dumps(prompt, ensure_ascii=False), f"{at}"]
            if at < args.tokens:
                top = dict(map(tuple, answer["logprobs"][at]["top"]))
                gaps[0].append(logprobs[at][drawn[at]] - logprobs[at][found[at]])
                if drawn[at] in top and found[at] in top:
                    gaps[1].append(top[found[at]] - top[drawn[at]])
                for token in (drawn[at], found[at]):
                    text = json.dumps(llama.detokenize([token]).decode(errors="replace"), ensure_ascii=False)
                    here = f"{top[token]:.3f}" if token in top else "not in our top 5"
                    row.append(f"{text} ({logprobs[at][token]:.3f}, {here})")
            else:
                row += ["", ""]
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |", flush=True)
        most = [f"gap at most {max(g):.2f}, median {np.median(g):.2f}" if g else "" for g in gaps]
        print(f"| **{model.stem}** | all | {whole} of {len(PROMPTS)} whole | {most[0]} | {most[1]} |", flush=True)
        llama.close()


if __name__ == "__main__":
    main()
