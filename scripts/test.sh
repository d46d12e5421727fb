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
check "shellcheck" shellcheck --external-sources scripts/*.sh scripts/slurm.sbatch .ci/run
check "layers" lint-imports
check "pyright" pyright
check "docs" mkdocs build --strict --quiet -f .ci/mkdocs.yml
check "pytest" "$PYTHON" -m pytest -q -n 2 --dist loadfile --durations 10

if ((${#failed[@]})); then
  printf '\nFAILED:'
  printf ' %s;' "${failed[@]}"
  printf ' see above. One test again: ./scripts/test.sh PATH::NAME\n'
  exit 1
fi
printf '\nall passed\n'
