#!/usr/bin/env bash
# Runs the README's commands as they stand there, on the tiny pair of the tests unless RECEIVER and SHARER say otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
export RECEIVER=${RECEIVER:-tests/fixtures/pair/receiver} SHARER=${SHARER:-tests/fixtures/pair/sharer}

# The blocks marked `sh`; the test command is what runs this script.
commands=$(sed -n '/^```sh$/,/^```$/p' README.md | grep -v -e '^```' -e '^scripts/test.sh$')
[ -n "$commands" ] || { echo "the README has no commands" >&2; exit 1; }
while read -r command; do
  printf '\n$ %s\n' "$command"
  bash -c "$command" </dev/null
done <<<"$commands"
