#!/usr/bin/env bash
# Trains, resumes and predicts with the package installed from a wheel, in an empty folder, without a checkout.
#
# usage: scripts/rehearse/wheel.sh [WORK]
#
#   WORK   folder for the wheel, the environment and the runs (default: a temporary one, which is deleted)
#
# Needs the active environment with the libraries of the package. The wheel gets an environment of its own, which borrows these
# libraries but not an editable installation of the package. Takes about two minutes on two cores.
# Exit status: 0 all passed, 1 a check failed, 77 it cannot run here.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"
# shellcheck source=scripts/rehearse/_checks.sh
source "$root/scripts/rehearse/_checks.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
unset PYTHONPATH # would put a checkout before the wheel
command -v python >/dev/null || skip "expected an active environment, found no python on the PATH"
(cd / && python -c 'import torch, deepspeed, transformers, setuptools') >/dev/null 2>&1 ||
  skip "expected the package's libraries in the active environment; pip install -e . installs them"
if [[ -n ${1:-} ]]; then
  mkdir -p "$1"
  work="$(cd "$1" && pwd)"
else
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
fi

build() { # from a copy: pip would write into the checkout, and leave in the wheel what an earlier build left there
  rm -rf "$work/source" "$work/wheel" "$work/venv" "$work/empty"
  mkdir -p "$work/source" "$work/empty"
  cp -a "$root"/{deris_llm,ds_configs,pyproject.toml,README.md,LICENSE} "$work/source/"
  python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$work/source"
  wheel=("$work"/wheel/*.whl)
  du -h "${wheel[0]}" | awk '{sub(".*/", "", $2); print $2 ", " $1}'
}

install() { # a .pth file adds the folder of libraries; .pth files in that folder, as of editable installations, are not read
  python -m venv --without-pip "$work/venv"
  python - "$work/venv" <<'END'
import pathlib, sys, sysconfig
libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
folder = pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": sys.argv[1], "platbase": sys.argv[1]}))
(folder / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
END
  python -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/wheel/*.whl
  cd "$work/empty"
  "$work/venv/bin/python" -c 'import deris_llm, sys; print(deris_llm.__file__); sys.exit("/venv/" not in deris_llm.__file__)' |
    sed "s|^$work/||"
}

installed() { (cd "$work/empty" && "$work/venv/bin/deris-llm" "$@" 2>&1 | tee -a "$work/log"); }

synth() {
  installed data synth --out data/synth --num-train 24 --num-val 3 --num-test 2 >/dev/null
  find "$work/empty/data/synth" -type f | wc -l | sed 's/$/ files/'
}

train() {
  installed train --config tiny-refcoco \
    --set training.max_steps=4 training.save_every=2 training.eval_max_images=2 training.log_every=1
}

resume() { # as if the run had been interrupted after its third step
  rm -r "$work/empty/runs/tiny-refcoco/"{checkpoint-4,best}
  train | grep -F "resuming from"
}

predict() {
  local image
  image="$(find "$work/empty/data/synth/images" -type f | sort | sed -n 1p)"
  installed predict --checkpoint runs/tiny-refcoco --image "$image" --phrase "the red circle" --out answers >/dev/null
  find "$work/empty/answers" -type f -printf '%f\n' | sort | paste -sd ' '
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
check "the wheel is built" build
check "it is installed without a checkout" install
check "deris-llm data synth" synth
check "deris-llm train --config tiny-refcoco, 2 ranks" train
check "the same command resumes it" resume
check "deris-llm predict" predict
finish || exit 1
