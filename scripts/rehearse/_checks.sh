# shellcheck shell=bash
# Sourced by the shell scripts of this folder, after ../_env.sh: options, what a machine must have, checks and their table.
# shellcheck disable=SC2034 # variables that the scripts read

names=()
outcomes=()
details=()
skip() { # skip REASON: this machine cannot run the script
  printf 'not run: %s\n' "$1"
  exit 77
}

result() { # result passed|FAILED NAME [DETAIL]
  outcomes+=("$1")
  names+=("$2")
  details+=("${3:-}")
  printf '%6s  %s%s\n' "$1" "$2" "${3:+: $3}"
}

only="" # a regular expression: checks of other names are left out
check() { # check NAME COMMAND...: passed if the command succeeds; the last line that it prints is the detail
  local name="$1" said status=0
  shift
  [[ $name =~ $only ]] || return 0
  said="$("$@" 2>&1)" || status=$?
  said="${said##*$'\n'}"
  if ((status == 0)); then result passed "$name" "$said"; else result FAILED "$name" "$said (exit status $status)"; fi
}

finish() { # prints the table as Markdown; status 1 if a check failed or none was made
  local i failures=0
  printf '\n| check | outcome | detail |\n| --- | --- | --- |\n'
  for i in "${!names[@]}"; do
    printf '| %s | %s | %s |\n' "${names[i]}" "${outcomes[i]}" "${details[i]}"
    [[ ${outcomes[i]} == passed ]] || failures=$((failures + 1))
  done
  printf '\n%d of %d passed\n' "$((${#names[@]} - failures))" "${#names[@]}"
  ((failures == 0 && ${#names[@]} > 0))
}

# -- scripts that start daemons as root -------------------------------------------------------------------------------

start_rehearsal() { # start_rehearsal "$@": reads --install, --world DIR, --only REGEX and WORK; sets install, world, work, is_temporary
  install="" world="" work="" is_temporary=""
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --install) install=yes && shift ;;
      --world) world="$(realpath "${2:?--world needs a folder}")" && shift 2 ;;
      --only) only="${2:?--only needs a regular expression}" && shift 2 ;;
      -*) printf 'error: expected --install, --world, --only or a folder, got %s; see --help\n' "$1" >&2 && exit 2 ;;
      *) work="$1" && shift ;;
    esac
  done
  if [[ -z $work ]]; then
    work="$(mktemp -d)"
    is_temporary=yes
  fi
  mkdir -p "$work"
  work="$(cd "$work" && pwd)"
}

needs_programs() { # needs_programs "DEBIAN_PACKAGE..." PROGRAM...: installs the packages if --install is given
  local packages="$1" program
  shift
  ((EUID == 0)) || skip "expected root, for daemons in namespaces of their own; got user $(id -un)"
  if [[ -n $install ]]; then
    command -v apt-get >/dev/null || skip "--install: expected Debian or Ubuntu, found no apt-get; install these programs: $*"
    # shellcheck disable=SC2086 # several packages
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages; } >/dev/null 2>&1 ||
      skip "apt-get could not install $packages; it says why: apt-get install $packages"
  fi
  for program in "$@"; do
    command -v "$program" >/dev/null || skip "expected the program $program, found none; --install, or: apt-get install $packages"
  done
  python -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("torch", "deepspeed", "deris_llm"))))' \
    2>/dev/null || skip "expected the package and its libraries in the active environment; pip install -e . installs them"
}

make_world() { # unless --world gave one
  [[ -z $world ]] || return 0
  world="$work/world"
  [[ -d $world ]] || python -m deris_llm.cli data synth --out "$world" --num-train 24 --num-val 3 --num-test 2 >/dev/null
}

free_ports() { # free_ports N: N ports that nobody listens on right now
  python -c '
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))' "$1"
}

wait_until() { # wait_until SECONDS COMMAND...: polls it every second
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 1
  done
}
