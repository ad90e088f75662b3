#!/usr/bin/env python3
"""Where in a sharer's cache the right letter stands: a logistic regression on single columns of what `train --cache-sharer DIR` kept.

    scripts/letter_probe.py CACHES TOKENIZER.json QUESTIONS.jsonl...      development only; needs numpy, ml_dtypes, scikit-learn, tokenizers

Prints cross-validated accuracy by layer (keys and values together) for the last three tokens of the prompt, and of each layer's last column the largest
mean and the median deviation of a key's channel. The prompts are the evaluation's template, in a ChatML model's tokens, whose number of layers is the most that
a file has.
"""

import json
import pathlib
import struct
import sys

import ml_dtypes
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer

DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "U32": np.uint32, "I32": np.int32, "I64": np.int64}


def tensors(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)

    def read(name):
        begin, end = header[name]["data_offsets"]
        flat = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype=DTYPES[header[name]["dtype"]])
        return flat.reshape(header[name]["shape"])

    return header, read


def main():
    folder, tokenizer, *questions = sys.argv[1:]
    tokenizer = Tokenizer.from_file(tokenizer)
    gold = {}
    for file in questions:
        for line in pathlib.Path(file).read_text().splitlines():
            row = json.loads(line)
            gold[row["question"].strip()] = row["answer_index"]
    columns, answers = {}, {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        header, read = tensors(path)
        layers = sum(name.startswith("key.") for name in header)
        ids = read(next(name for name in header if "token" in name)).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if "following question:\n\n" not in text:
            continue
        question = text.split("following question:\n\n")[1].split("\n\nChoices:")[0].strip()
        if question not in gold:
            continue
        ends = [i for i, token in enumerate(ids) if tokenizer.id_to_token(token) == "<|im_end|>"]
        end = ends[1] if len(ends) > 1 else len(ids)
        both = lambda layer, at: np.concatenate([read(f"{half}.{layer}")[at].reshape(-1) for half in ("key", "value")])
        row = [[both(layer, end - back) for layer in range(layers)] for back in (1, 2, 3)]
        columns.setdefault(layers, []).append(np.array(row, dtype=np.float32))
        answers.setdefault(layers, []).append(gold[question])
    # A receiver's caches in the same folder are in another vocabulary and do not decode to the template.
    for layers, rows in columns.items():
        x, y = np.array(rows), np.array(answers[layers])
        print(f"{len(y)} questions, {layers} layers")
        for back in range(3):
            scores = []
            for layer in range(layers % 2, layers, 2):
                model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
                scores.append(f"{layer}: {100 * cross_val_score(model, x[:, back, layer], y, cv=5).mean():.0f} %")
            print(f"token {back + 1} from the end:", ", ".join(scores))
        keys = x[:, 0, :, : x.shape[3] // 2]
        for layer in range(layers):
            print(f"layer {layer}: keys' means up to {np.abs(keys[:, layer].mean(0)).max():.1f}, median deviation {np.median(keys[:, layer].std(0)):.2f}")


if __name__ == "__main__":
    main()
