#!/usr/bin/env python3
"""Drives `serve-local` with other people's clients: the official openai package, lm_eval, schemathesis.

    scripts/serve_clients.py [openai] [lm_eval] [schemathesis]      (all three where none is named)

The server is target/debug/serve-local, or what C2C_SERVE names, with the built-in pair. The clients are installed once into
target/clients from PyPI. Exits with 1 where a client met something that it should not.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "target" / "clients"
PACKAGES = ["openai==3.57.0", "lm_eval[api]==0.4.13", "transformers==5.24.0", "schemathesis==4.32.5"]
PAIR = ROOT / "assets" / "pair"
QUESTIONS = 40


def install():
    """Goes on as the Python of an environment that has the clients."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "installed"
    if not done.exists() or done.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text(" ".join(PACKAGES))
    if pathlib.Path(sys.prefix) != ENVIRONMENT:
        os.execv(python, [python, __file__, *sys.argv[1:]])


class Server:
    def __enter__(self):
        command = os.environ.get("C2C_SERVE", str(ROOT / "target" / "debug" / "serve-local")).split()
        self.process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+", line).group(0)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health")
                return self
            except OSError:
                time.sleep(0.1)
        sys.exit("the server does not become ready")

    def __exit__(self, *_):
        assert self.process.poll() is None, "the server has ended"
        self.process.terminate()
        assert self.process.wait(60) == 0, "the server did not end well"


def questions():
    """Held-out questions with their options, as the pair is asked, and the letter that is right."""
    for line in (PAIR / "heldout.jsonl").read_text().splitlines()[:: 462 // QUESTIONS][:QUESTIONS]:
        row = json.loads(line)
        options = ", ".join(f"{letter} {choice}" for letter, choice in zip("ABCD", row["choices"]))
        yield f"{row['question'].rstrip('?')}: {options}?", row["answer_index"]


def openai_client(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["receiver", "sharer", "receiver+sharer"]
    right = dict.fromkeys(["receiver", "sharer", "t2t", "c2c"], 0)
    asked = list(questions())[:12]
    for question, answer in asked:
        for mode in right:
            messages = [{"role": "user", "content": question}]
            extra = {"c2c": {"mode": mode}}
            whole = client.chat.completions.create(model="receiver+sharer", messages=messages, max_tokens=8, extra_body=extra)
            text = whole.choices[0].message.content
            stream = client.chat.completions.create(
                model="receiver+sharer", messages=messages, max_tokens=8, stream=True,
                stream_options={"include_usage": True}, extra_body=extra,
            )
            chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
            # How much of the prompt was cached may differ, and does.
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and chunks[-1].c2c["mode"] == mode
            right[mode] += re.search(r"\b([A-D])\b", text + " A" * (text == "")).group(1) == "ABCD"[answer]
    print(f"openai: right of {len(asked)}:", right)
    assert right["c2c"] > right["receiver"] and right["sharer"] >= 10, "the modes do not differ as they should"

    scored = client.chat.completions.create(
        model="sharer", messages=messages, max_tokens=4, n=2, logprobs=True, top_logprobs=2, seed=3, temperature=1, stop=["."],
    )
    assert len(scored.choices) == 2 and scored.choices[0].logprobs.content[0].top_logprobs[1].logprob <= 0
    plain = client.completions.create(model="receiver", prompt=["In which", "What is"], max_tokens=3, echo=True, logprobs=1)
    assert plain.choices[1].text.startswith("What is") and plain.choices[0].logprobs.token_logprobs[0] is None
    for error, request in [
        (openai.NotFoundError, {"model": "gpt-9"}),
        (openai.BadRequestError, {"max_tokens": 10**12}),
        (openai.BadRequestError, {"messages": []}),
    ]:
        try:
            client.chat.completions.create(**({"model": "receiver", "messages": messages} | request))
        except error as refused:
            assert refused.body["param"] in request, refused.body
        else:
            raise AssertionError(f"{request} was accepted")


def lm_eval_client(server):
    import lm_eval

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = [{"question": question, "answer": answer} for question, answer in questions()]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "pair", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "answer",
            "doc_to_choice": ["It is A.", "It is B.", "It is C.", "It is D."], "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / "pair.yaml").write_text(json.dumps(task))
        os.environ.update(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        accuracy = {}
        for model in ["receiver", "sharer"]:
            arguments = {
                "model": model, "base_url": f"{server.url}/v1/completions", "num_concurrent": 8, "max_retries": 1,
                "tokenizer": str(PAIR / model), "tokenizer_backend": "huggingface", "tokenized_requests": True,
                "max_length": 512,
            }
            results = lm_eval.simple_evaluate(
                model="local-completions", model_args=arguments, tasks=["pair"], apply_chat_template=True,
                task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
                bootstrap_iters=0,
            )
            accuracy[model] = results["results"]["pair"]["acc,none"]
        print(f"lm_eval: accuracy on {len(rows)} questions:", accuracy)
        # What the pair is made to be: the one knows, the other guesses.
        assert accuracy["sharer"] > 0.9 and accuracy["receiver"] < 0.6, accuracy


def schemathesis_client(server):
    command = [
        ENVIRONMENT / "bin" / "schemathesis", "run", f"{server.url}/openapi.json", "--max-examples", "10",
        # One worker: two make hypothesis parse in two threads at once, at which Python 3.11 sometimes fails.
        "--workers", "1", "--request-timeout", "20", "--seed", "1", "--generation-database", "none",
        # A field that is not listed is ignored, not refused; JSON in other types than asked is refused.
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]
    found = subprocess.run(command, cwd=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("schemathesis:", *found.stdout.strip().splitlines()[-3:], sep="\n")
    if found.returncode != 0:
        print(found.stdout)
        raise AssertionError("schemathesis found answers that are not as described")


CLIENTS = {"openai": openai_client, "lm_eval": lm_eval_client, "schemathesis": schemathesis_client}

if __name__ == "__main__":
    install()
    with Server() as server:
        for name in sys.argv[1:] or CLIENTS:
            began = time.time()
            CLIENTS[name](server)
            print(f"{name}: fine, {time.time() - began:.0f} s")
