#!/usr/bin/env bash
# Everything CI checks: ruff, shellcheck, layers, pyright, the documentation site, pytest. Makes .venv (or uses the active
# environment) and installs the `dev` extra.
#   ./scripts/test.sh                        all of it
#   ./scripts/test.sh tests/test_config.py   only pytest, with these arguments
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/_env.sh
source "$ROOT/scripts/_env.sh"
cd "$ROOT"
mkdir -p runs
LOG="$ROOT/runs/test-install.log"
: >"$LOG"

# The page of the demo is tested in an environment over the first one that has gradio and playwright too: gradio wants an older
# Pillow than the golden answers. Its tests drive the system's browser, which is installed where that needs no password.
make_demo_environment() {
  local folder="$ROOT/runs/demo-environment" packages
  DEMO_PYTHON="$folder/bin/python"
  "$DEMO_PYTHON" -c 'import gradio, playwright' >/dev/null 2>&1 && return
  say "demo: installing gradio and playwright into $folder"
  {
    "$PYTHON" -m venv --without-pip --clear "$folder" &&
      packages="$("$DEMO_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &&
      "$PYTHON" -c 'import sys, sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path(sys.argv[1])!r})")' purelib \
        >"$packages/outer.pth" &&
      "$PYTHON" -m pip --python "$DEMO_PYTHON" install --disable-pip-version-check --no-input --progress-bar off \
        'gradio>=6.0' 'playwright>=1.50'
  } >>"$LOG" 2>&1
}

install_browser() {
  local with_rights=() name
  for name in chromium chromium-browser google-chrome; do command -v "$name" >/dev/null 2>&1 && return; done
  command -v apt-get >/dev/null 2>&1 || return 0
  ((EUID == 0)) || with_rights=(sudo -n)
  say "demo: installing chromium"
  { "${with_rights[@]}" apt-get update -qq && "${with_rights[@]}" apt-get install -qq -y --no-install-recommends chromium; } \
    >>"$LOG" 2>&1 </dev/null || say "demo: chromium not installed; the tests that need a browser are skipped"
}

use_environment
install_package "[dev]"
PATH="$(dirname "$PYTHON"):$PATH"
export PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false NO_MKDOCS_2_WARNING=1

if (($#)); then exec "$PYTHON" -m pytest "$@"; fi

failed=()
check() { # check NAME COMMAND...
  local name="$1" started=$SECONDS
  shift
  echo "== $name: $*"
  if "$@"; then echo "== $name passed ($((SECONDS - started)) s)"; else
    echo "== $name FAILED ($((SECONDS - started)) s)"
    failed+=("$name")
  fi
}
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "shellcheck" shellcheck --external-sources scripts/*.sh scripts/rehearse/*.sh scripts/slurm.sbatch .ci/run
check "layers" lint-imports
check "pyright" pyright
check "docs" mkdocs build --strict --quiet -f .ci/mkdocs.yml
check "pytest" "$PYTHON" -m pytest -q -n 2 --dist loadfile --durations 10

if make_demo_environment; then
  install_browser
  check "demo" "$DEMO_PYTHON" -m pytest -q tests/serving/test_demo_page.py
else
  say "demo: that did not work (see $LOG); the tests of the page are skipped"
fi

if ((${#failed[@]})); then
  printf '\nFAILED:'
  printf ' %s;' "${failed[@]}"
  printf ' see above. One test again: ./scripts/test.sh PATH::NAME\n'
  exit 1
fi
printf '\nall passed\n'
