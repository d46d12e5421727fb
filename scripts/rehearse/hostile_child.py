"""Reads one hostile input in a forked process, and says what happened: `read_in_child`.

The child has its own working directory, home and temporary folder, programs that leave a mark when they are started, a limit of
address space, and an audit hook that notes what is opened, started and connected to.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deris_llm
from scripts.rehearse.hostile_content import EXECUTED

PACKAGE = str(Path(deris_llm.__file__).parent)
LIMIT_CPU_S = 10.0
LIMIT_WALL_S = 120.0  # the machine may be busy
LIMIT_GROWTH = 768 * 2**20  # bytes of resident memory, for inputs of a normal size
GROWTH_PER_BYTE = 8  # a file of 100 MB may take so many times its size
LIMIT_IDLE_S = 15.0  # without any work, as of a process that waits for a pipe
_ADDRESS_SPACE = 4 * 2**30  # bytes above what the process has
_PROGRAMS = ("gs", "gswin32c", "touch", "ffmpeg", "git", "curl", "inkscape", "evil")


@dataclass
class Outcome:
    """What became of an input."""

    kind: str = "crash"  # clear error, accepted, or the name of a fault
    message: str = ""  # the error, or what the fault is
    where: str = ""  # file and line that raised
    cpu_s: float = 0.0
    growth: int = 0  # bytes of resident memory at the peak
    modules: list[str] = field(default_factory=list)  # that the child had at the end

    @property
    def is_fault(self) -> bool:
        """Whether the package did something wrong."""
        return self.kind not in ("clear error", "accepted")


def make_case(folder: Path) -> None:
    """Makes the folders of a case, with what must not be read or run."""
    for name in ("in", "out", "outside", "home", "tmp", "programs"):
        (folder / name).mkdir(parents=True)
    (folder / "evil.py").write_text(f"open({EXECUTED!r}, 'w')\n\n\nclass Backend:\n    pass\n")
    (folder / "outside/secret.yaml").write_text("base: tiny-refcoco\nname: secret\n")
    for name in _PROGRAMS:
        program = folder / "programs" / name
        program.write_text(f"#!/bin/sh\n: >{folder / EXECUTED}\n")
        program.chmod(0o755)


def read_in_child(run: Callable[[], int], folder: Path, *, may_write: tuple[str, ...], must_fail: bool) -> Outcome:
    """Runs a reader in a forked process and judges what it did.

    Args:
        run: of the reader.
        folder: of the case, with the spoiled source in `in`.
        may_write: folders of the case.
        must_fail: an exit status of 0 is a fault.
    """
    before = dict(_snapshot(folder))
    size = sum(path.stat().st_size for path in (folder / "in").rglob("*") if path.is_file() and not path.is_symlink())
    report = tempfile.mkstemp(prefix="hostile-")
    pid = os.fork()
    if pid == 0:
        try:
            _run_child(run, folder, report[0])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    status = _waited(pid, LIMIT_WALL_S)
    text = Path(report[1]).read_text()
    os.close(report[0])
    os.unlink(report[1])
    outcome = _judged(json.loads(text) if text else {}, status, folder, size=size, must_fail=must_fail)
    return outcome if outcome.is_fault else _with_traces(outcome, before, folder, may_write)


# -- in the child ------------------------------------------------------------------------------------------------------


def _run_child(run: Callable[[], int], folder: Path, report: int) -> None:
    os.setsid()  # its own processes end with it
    os.chdir(folder)
    os.environ |= {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PATH": f"{folder / 'programs'}:{os.environ['PATH']}",
        "COLUMNS": "80",
    }
    tempfile.tempdir = None
    sys.path.insert(0, "")  # as of a command that is started here
    out = os.open(folder / "stdout", os.O_CREAT | os.O_WRONLY)
    err = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", write_through=True)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    limit = _memory("VmSize") + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT_CPU_S + sum(os.times()[:2])) + 2, resource.RLIM_INFINITY))
    known = set(sys.modules)
    events: list[str] = []
    is_watching = [True]
    sys.addaudithook(lambda event, arguments: _note(events, event, arguments, folder) if is_watching[0] else None)
    started = time.process_time()
    found: dict[str, Any] = {}
    try:
        found["status"] = run()
    except SystemExit as error:
        found["status"] = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        is_watching[0] = False
        found |= _described(error)
    is_watching[0] = False
    found |= {
        "cpu_s": time.process_time() - started,
        "growth": max(0, _memory("VmHWM") - before),
        "events": events[:20],
        "modules": [name for name in sys.modules if name not in known],
    }
    os.write(report, json.dumps(found).encode("utf-8", "backslashreplace"))
    os._exit(0)


def _described(error: BaseException) -> dict[str, Any]:
    """An exception as data, with the main function's own text for it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    ours = next((frame for frame in reversed(frames) if frame.filename.startswith(PACKAGE)), last)
    with contextlib.suppress(Exception):
        from deris_llm.cli.main import print_error

        print_error(error)  # what a user would have seen
    return {
        "error": type(error).__name__,
        "is_user_error": isinstance(error, ValueError),
        "is_ours": last is not None and last.filename.startswith(PACKAGE),
        "message": str(error)[:3000],
        "where": f"{Path(ours.filename).name}:{ours.lineno}" if ours else "",
    }


def _memory(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _note(events: list[str], event: str, arguments: tuple[Any, ...], folder: Path) -> None:
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        events.append(f"started {arguments[0]!r}"[:200])
    elif event in ("socket.connect", "socket.sendto", "urllib.Request"):
        events.append(f"connected to {arguments[1:]!r}"[:200])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.path.join(folder, os.fsdecode(arguments[0])))
        is_written = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(str(folder / "outside")):
            events.append(f"opened {path}")
        elif is_written and not path.startswith((str(folder), "/dev/null", "/dev/shm/", "/proc/self")):
            events.append(f"opened {path} to write")


# -- in the parent -----------------------------------------------------------------------------------------------------


def _waited(pid: int, limit_s: float) -> int | None:
    """The wait status of a child; None if it had to be killed."""
    started = last_work = time.monotonic()
    used = 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it started
            return status
        now, ticks = time.monotonic(), _ticks(pid)
        last_work, used = (last_work, used) if ticks == used else (now, ticks)
        if now - started > limit_s or now - last_work > LIMIT_IDLE_S:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def _ticks(pid: int) -> int:
    """What a process has used of the processor so far, and a little for each time that it could run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) + time.monotonic_ns() * (fields[0] in "RD")


def _judged(found: dict[str, Any], status: int | None, folder: Path, *, size: int, must_fail: bool) -> Outcome:
    said = b"".join((folder / name).read_bytes() for name in ("stdout", "stderr") if (folder / name).exists())
    shown = said.decode("utf-8", "replace")
    tell = Outcome(message=found.get("message", ""), where=found.get("where", ""), cpu_s=found.get("cpu_s", 0.0))
    tell.growth, tell.modules = found.get("growth", 0), found.get("modules", [])
    faults: list[tuple[str, str]] = []
    events = found.get("events", [])
    if (folder / EXECUTED).exists() or any(event.startswith("started") for event in events):
        faults.append(("execution", f"something was run: {events}"))
    if elsewhere := [event for event in events if event.startswith(("opened", "connected"))]:
        faults.append(("foreign file", f"{elsewhere[:3]}"))
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU) or tell.cpu_s > LIMIT_CPU_S:
        faults.append(("hang", f"no answer within {LIMIT_CPU_S:g} s; {shown[-300:]}"))
    elif os.WIFSIGNALED(status):
        faults.append(("crash", f"signal {os.WTERMSIG(status)}; {shown[-300:]}"))
    elif not found:
        faults.append(("crash", f"ended without a report; {shown[-300:]}"))
    if tell.growth > max(LIMIT_GROWTH, GROWTH_PER_BYTE * size):
        faults.append(("memory", f"{tell.growth / 2**20:,.0f} MiB for {size:,} bytes; {tell.message}"))
    if controls := re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown):
        faults.append(("terminal", f"control characters were printed: {sorted(set(controls))}; {tell.message}"))
    if len(said) > 200_000:
        faults.append(("flood", f"{len(said):,} bytes were printed; {tell.message[:200]}"))
    if "error" in found:
        if found["error"] == "MemoryError":
            faults.append(("memory", f"MemoryError {tell.message}"))
        elif not (found["is_user_error"] and found["is_ours"]):
            faults.append(("traceback", f"{found['error']}: {tell.message}"))
        elif not re.search(
            r"expected|did you mean|unknown field|cannot be used|problems? in|at most|was not uploaded|There is|line \d+, column \d+: ",
            tell.message,
        ):
            faults.append(("unclear error", tell.message))
    elif found.get("status") == 0 and must_fail:
        faults.append(("nonsense accepted", shown[-300:]))
    if faults:
        tell.kind, tell.message = faults[0][0], "; ".join(f"{kind}: {text}" for kind, text in faults)
    else:
        tell.kind = "accepted" if found.get("status") == 0 else "clear error"
        tell.message = tell.message or shown[-2000:]
    return tell


def _with_traces(
    outcome: Outcome, before: dict[str, tuple[int, ...]], folder: Path, may_write: tuple[str, ...]
) -> Outcome:
    """The outcome, or the fault that files were left, changed or removed where nothing may be written."""
    after = dict(_snapshot(folder))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    allowed = ("stdout", "stderr", *may_write)
    foreign = [name for name in changed if not any(name == each or name.startswith(f"{each}/") for each in allowed)]
    if foreign:
        outcome.kind, outcome.message = "foreign write", f"{sorted(foreign)[:5]}; {outcome.message[:200]}"
    return outcome


def _snapshot(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            yield str(path.relative_to(folder)), () if is_folder else (status.st_size, status.st_mtime_ns)


def removed(folder: Path) -> None:
    """Removes a case."""
    shutil.rmtree(folder, ignore_errors=True)
