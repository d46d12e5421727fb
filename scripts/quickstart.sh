#!/usr/bin/env bash
# The main job at tiny size, from a bare machine to a table of numbers: install, make data, fine-tune under DeepSpeed,
# evaluate. Uses the GPUs when there are some, else two CPU ranks; after ten steps of training it says how long the rest
# takes on this machine. Call it again after an interruption: what is finished is reused. Arguments go to
# `scripts/quickstart.py` (see --help).
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/_env.sh
source "$ROOT/scripts/_env.sh"
cd "$ROOT"
mkdir -p runs/quickstart
LOG="$ROOT/runs/quickstart/quickstart.log"
printf '\n==== %s quickstart.sh %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >>"$LOG"
started=$SECONDS
use_environment
install_package ""
PATH="$(dirname "$PYTHON"):$PATH"
export PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" scripts/quickstart.py --install-seconds $((SECONDS - started)) "$@"
