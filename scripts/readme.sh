#!/usr/bin/env bash
# Runs the README's commands as they stand there, on the tiny pair of the tests unless RECEIVER and SHARER say otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
export RECEIVER=${RECEIVER:-tests/fixtures/pair/receiver} SHARER=${SHARER:-tests/fixtures/pair/sharer}

# The blocks marked `sh`; the test command is what runs this script.
commands=$(sed -n '/^```sh$/,/^```$/p' README.md | grep -v -e '^```' -e '^scripts/test.sh$')
[ -n "$commands" ] || { echo "the README has no commands" >&2; exit 1; }

# A server is asked whether it is well, then told to end.
serve() {
  local log
  log=$(mktemp)
  setsid bash -c "exec $1" </dev/null >"$log" 2>&1 &
  local server=$! address=""
  for _ in $(seq 600); do
    address=$(grep -om1 'http://[0-9.:]*' "$log" || true)
    if [ -n "$address" ] && curl -fs "$address/health" >/dev/null; then break; fi
    kill -0 "$server" 2>/dev/null || break
    sleep 1
  done
  cat "$log"
  curl -fsS "$address/health"
  kill -INT -- "-$server"
  wait "$server"
}

while read -r command; do
  printf '\n$ %s\n' "$command"
  case $command in
    *serve-local*) serve "$command" ;;
    *) bash -c "$command" </dev/null ;;
  esac
done <<<"$commands"
