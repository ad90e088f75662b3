#!/usr/bin/env bash
# The page in a real browser: installs what is missing (Chromium from Debian, playwright-core from npm), builds serve-local (or takes the one
# that C2C_SERVE names) and runs tests/browser. Screenshots go to target/screenshots. Arguments go to cargo build, such as --release.
set -euo pipefail
cd "$(dirname "$0")/.."

missing() {
    echo "browser.sh: skipped: the page's tests need $1" >&2
    if [ -n "${CI:-}" ]; then exit 1; fi
    exit 0
}
if ! command -v chromium >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then missing chromium; fi
    apt-get update -qq && apt-get install -y --no-install-recommends chromium
fi
command -v npm >/dev/null || missing "Node.js 20 or newer, with npm"
if [ ! -d tests/browser/node_modules/playwright-core ]; then
    PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci --prefix tests/browser --no-audit --no-fund
fi

if [ -z "${C2C_SERVE:-}" ]; then
    profile=debug
    for argument in "$@"; do
        if [ "$argument" = --release ]; then profile=release; fi
    done
    cargo build --bin serve-local "$@"
    export C2C_SERVE="${CARGO_TARGET_DIR:-target}/$profile/serve-local"
fi
node --test tests/browser/page.test.mjs
