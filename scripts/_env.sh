# shellcheck shell=bash
# Sourced first by every script of this folder: an unexpected failure names its line and command, never a silent exit.
# For quickstart.sh, test.sh and gpu.sh it also picks the Python environment (sets PYTHON) and installs this package in it;
# those functions expect ROOT (this repository) and LOG (a writable log file).

set -Eeuo pipefail # -E: the trap also holds inside functions and command substitutions
name_failure() { # name_failure STATUS FILE LINE COMMAND
  printf 'FAILED: %s, line %s, status %s: %s\n' "${2##*/}" "$3" "$1" "$4" >&2
}
trap 'name_failure "$?" "${BASH_SOURCE[0]:-$0}" "$LINENO" "$BASH_COMMAND"' ERR

PROGRESS_EVERY=10 # seconds between two lines while pip works

say() { printf '%s\n' "$*" | tee -a "$LOG"; }

fail() { # fail WHAT WHAT_TO_DO
  say ""
  say "FAILED: $1"
  say "  What to do: $2"
  say "  Log: $LOG"
  exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The active virtual (or conda) environment, else .venv, made on the first call.
use_environment() {
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" candidate
  if [[ -n "$active" && -x "$active/bin/python" ]]; then
    PYTHON="$active/bin/python"
    is_new_enough "$PYTHON" || fail "the active environment $active has $("$PYTHON" --version 2>&1); expected Python >= 3.11" \
      "activate another environment, or deactivate it and call this again: .venv is made then"
    say "environment: $active (active)"
    return
  fi
  PYTHON="$ROOT/.venv/bin/python"
  if ! is_new_enough "$PYTHON"; then
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 ""; do
      [[ -z "$candidate" ]] && fail "no Python >= 3.11 on the PATH (found: $(python3 --version 2>&1 || true))" \
        "install Python 3.11 or later, or activate an environment that has one"
      command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate" && break
    done
    say "environment: making .venv with $("$candidate" --version 2>&1)"
    "$candidate" -m venv --clear "$ROOT/.venv" >>"$LOG" 2>&1 || fail "\`$candidate -m venv .venv\` did not work" \
      "install the venv module (Debian, Ubuntu: apt install python3-venv), or activate an environment of your own"
  fi
  say "environment: $ROOT/.venv"
}

# install_package EXTRAS ("" or "[dev]"): pip only runs when pyproject.toml changed or the package is not there.
install_package() {
  local extras="$1" stamp key origin started
  stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.deris_llm-installed"
  key="$ROOT $(cksum <"$ROOT/pyproject.toml")"
  origin="$(cd / && "$PYTHON" -c 'import deris_llm; print(deris_llm.__path__[0])' 2>/dev/null || true)"
  # What was installed with [dev] also serves those who ask for no extra.
  if [[ "$origin" == "$ROOT/deris_llm" ]] && { grep -qxF "$key [dev]" "$stamp" || grep -qxF "$key $extras" "$stamp"; } 2>/dev/null; then
    say "package: installed already"
    return
  fi
  say "package: installing deris-llm$extras and its libraries (torch among them: some minutes, about 6 GB)"
  started=$SECONDS
  (cd "$ROOT" && exec "$PYTHON" -m pip install --disable-pip-version-check --no-input --progress-bar off -e ".$extras") >>"$LOG" 2>&1 &
  pip_pid=$!
  trap 'kill "$pip_pid" 2>/dev/null || true' EXIT # an interrupted script leaves no pip behind
  while kill -0 "$pip_pid" 2>/dev/null; do
    sleep 1
    if (((SECONDS - started) % PROGRESS_EVERY == 0)); then
      # Whatever pip said last; where everything is installed already, that may be nothing for a while.
      printf '  %4d s  %s\n' $((SECONDS - started)) "$(tail -n 1 "$LOG" | cut -c 1-100)"
    fi
  done
  trap - EXIT
  wait "$pip_pid" || {
    tail -n 15 "$LOG"
    fail "pip could not install the package (its last lines are above)" \
      "check the network and the free disk space ($(df -Pk "$ROOT" | awk 'NR == 2 {printf "%.1f", $4 / 1e6}') GB free, about 8 needed), then call this again"
  }
  printf '%s\n' "$key $extras" >"$stamp"
  say "package: installed in $((SECONDS - started)) s"
}
