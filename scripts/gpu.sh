#!/usr/bin/env bash
# Everything of this repository that needs a GPU, one after the other; it goes on when a step fails. For the record of a machine.
#   scripts/gpu.sh [OUT]          results in OUT (default runs/gpu): a .txt for each step, machine.txt, summary.txt
#   scripts/gpu.sh --tiny [OUT]   the same steps at tiny size on a CPU (default runs/gpu-tiny): tests this script, no GPU
#
#   true_size    rehearse/true_size.py: DeRIS-7B's commands on random weights of its size: train, resume, eval, predict, merge, export
#   tests        pytest -m gpu: CPU = GPU, bf16, kernels of attention, 4 bits
#   perception   bench/perception.py: plain formulations against ours, deformable attention in every formulation
#   shared       bench/shared.py: one phrase at a time against all of a picture, float32 and bf16, SDPA's kernels
#   7b           bench/deris_7b.py: DeRIS-7B's phrases/s, MFU, ms per phrase, peak memory, what costs most, what fits 24 GiB
#
# Uses the active environment, else .venv, as ./scripts/test.sh does. How long it takes is not known: nothing has run on a GPU
# yet. Exit status: 0 all steps passed, 1 one failed, 2 wrong arguments or no GPU.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/_env.sh
source "$ROOT/scripts/_env.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }
refuse() { # refuse WHAT WHAT_TO_DO
  printf 'gpu.sh: %s\n  What to do: %s\n' "$1" "$2" >&2
  exit 2
}

tiny=""
OUT=""
while (($#)); do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --tiny) tiny=yes ;;
    -*) refuse "expected --tiny, --help or a folder, got $1" "see scripts/gpu.sh --help" ;;
    *)
      [[ -z $OUT ]] || refuse "expected one folder, got $OUT and $1" "see scripts/gpu.sh --help"
      OUT="$1"
      ;;
  esac
  shift
done
if [[ -z $tiny && -z "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]]; then
  refuse "expected a CUDA GPU, nvidia-smi lists none" \
    "run it on a machine with one; scripts/gpu.sh --tiny runs the same steps at tiny size on a CPU"
fi

OUT="${OUT:-$ROOT/runs/gpu${tiny:+-tiny}}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd -P)"
cd "$ROOT"
LOG="$OUT/machine.txt"
: >"$LOG"
use_environment
install_package "[dev]"
PATH="$(dirname "$PYTHON"):$PATH"
export PATH TOKENIZERS_PARALLELISM=false
[[ -z $tiny ]] || export OMP_NUM_THREADS=1
if [[ -z $tiny ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  refuse "expected a CUDA GPU, torch $(python -c 'import torch; print(torch.__version__)') sees none" \
    "install a torch built for this driver: https://pytorch.org/get-started/locally"
fi
say "commit: $(git -C "$ROOT" describe --always --dirty 2>/dev/null || echo "no repository")"
say "$(nvidia-smi 2>/dev/null || echo "no GPU: tiny sizes on a CPU")"
say "$(python -m pip list --disable-pip-version-check 2>/dev/null |
  grep -iE '^(torch|torchvision|transformers|peft|accelerate|deepspeed|bitsandbytes|flash[_-]attn|kernels|triton) ' || true)"

failed=()
summary="$OUT/summary.txt"
: >"$summary"
step() { # step NAME COMMAND...
  local name="$1" started=$SECONDS result
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  if "$@" 2>&1 | tee "$OUT/$name.txt"; then result=passed; else
    result=FAILED
    failed+=("$name")
  fi
  printf '%-10s %s, %d s, %s\n' "$name" "$result" $((SECONDS - started)) "$*" >>"$summary"
}
if [[ -n $tiny ]]; then
  step true_size python scripts/rehearse/true_size.py --config tiny-refcoco --work "$OUT/true_size"
  step tests python -m pytest -q -m gpu tests/test_gpu.py
  step perception python scripts/bench/perception.py --quick
  step shared python scripts/bench/shared.py --layers 1 --phrases 1 2 --repeats 1
  step 7b python scripts/bench/deris_7b.py --tiny --phrases 2 --repeats 1 --profile --budget-gib 24
else
  step true_size python scripts/rehearse/true_size.py --config deris-7b-refcoco --work "$OUT/true_size"
  step tests python -m pytest -q -m gpu
  step perception python scripts/bench/perception.py --device cuda
  step shared python scripts/bench/shared.py --device cuda
  step 7b python scripts/bench/deris_7b.py --profile --budget-gib 24
fi

printf '\n'
cat "$summary"
printf 'results: %s\n' "$OUT"
if ((${#failed[@]})); then
  printf 'FAILED: %s; see the .txt of each step there\n' "${failed[*]}" >&2
  exit 1
fi
