#!/usr/bin/env python3
"""What the server adds to the time of `generate`, and what many streams at once gain over one.

    scripts/serve_speed.py [MODEL AND MACHINE FLAGS]      e.g. --receiver smol.gguf --device cpu

Runs target/release/generate and target/release/serve-local with those flags. Prints medians; needs curl and a quiet machine.
"""

import http.client
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time

TARGET = pathlib.Path(__file__).resolve().parent.parent / "target" / "release"
QUESTION = "In which country is Grenoble: A Spain, B Poland, C Greece, D France?"
MODE = "receiver"
TOKENS = 128


def stream(address, tokens, salt):
    """Seconds to the first byte of text, to the end, and the server's own time to the first token."""
    body = {
        "model": "receiver", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "cache_salt": salt,
    }
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    first, own = None, None
    for line in connection.getresponse():
        if first is None and re.search(rb'"content":"[^"]', line):
            first = time.perf_counter() - began
        if b'"timings_ms"' in line:
            own = json.loads(line[6:])["c2c"]["timings_ms"]["first_token"] / 1e3
    return first, time.perf_counter() - began, own


def main():
    flags = sys.argv[1:]
    alone = []
    for _ in range(9):
        command = [TARGET / "generate", *flags, "--mode", MODE, "--prompt", QUESTION, "--max-new-tokens", "8", "--json"]
        alone.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["timings_ms"]["first_token"] / 1e3)
    server = subprocess.Popen([TARGET / "serve-local", "--port", "0", *flags], stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip().removeprefix("http://")
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection(address)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        # A salt of its own for each: nothing is cached, as nothing is for `generate`.
        runs = [stream(address, 8, f"a{i}") for i in range(31)]
        first, own = (statistics.median(run[i] for run in runs) for i in (0, 2))
        print(f"first token: generate {statistics.median(alone) * 1e3:.2f} ms, server {own * 1e3:.2f} ms, "
              f"on the wire {first * 1e3:.2f} ms")
        # Some seconds of one stream.
        answers = max(1, round(5 / stream(address, TOKENS, "c")[1]))
        rates = {}
        for streams in (1, 8):
            # curl counts nothing, so that it takes little of the machine; one connection a stream is kept for all answers.
            body = {"model": "receiver", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
            command = ["curl", "-sNf", "-o", "/dev/null", "-H", "Content-Type: application/json", "-d", json.dumps(body),
                       f"http://{address}/v1/chat/completions?answer=[1-{answers}]"]
            began = time.perf_counter()
            readers = [subprocess.Popen(command) for _ in range(streams)]
            assert all(reader.wait() == 0 for reader in readers), "curl failed"
            rates[streams] = streams * answers * TOKENS / (time.perf_counter() - began)
            print(f"{streams} streams: {rates[streams]:.0f} tokens/s")
        print(f"8 streams give {rates[8] / rates[1]:.2f} times the tokens of one")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
