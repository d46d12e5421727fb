"""Log lines of commands, and the messages of libraries that are silenced."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys, warnings
from deris_llm.common.messages import log_to_stderr, quiet_libraries
quiet_libraries()
log_to_stderr(rank=int(sys.argv[1]), quiet=sys.argv[2] == "quiet")
logging.getLogger("deris_llm.training").info("step 1")
logging.getLogger("deris_llm.training").warning("no objects")
logging.getLogger("library").info("details")
logging.getLogger("library").error("broken")
accelerate = logging.getLogger("accelerate.accelerator")
accelerate.warning("[RANK 0] Gradient accumulation steps mismatch: 1, 2")
accelerate.warning("[RANK 0] mixed precision")
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use x", FutureWarning)
warnings.warn("weights are old", FutureWarning)
"""


@pytest.mark.parametrize(
    ("rank", "verbosity", "expected"),
    [
        (0, "all", [" step 1", " WARNING deris_llm.training: no objects", " ERROR library: broken"]),
        (1, "all", [" rank 1: WARNING deris_llm.training: no objects", " rank 1: ERROR library: broken"]),
        (0, "quiet", [" ERROR library: broken"]),
    ],
)
def test_what_reaches_the_terminal(rank, verbosity, expected):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(rank), verbosity], capture_output=True, text=True)
    assert done.stdout == ""
    lines = [line.partition(" ") for line in done.stderr.splitlines() if line[:2].isdigit()]
    shown = [f" {text}" for _, _, text in lines]
    assert shown[: len(expected)] == expected
    rest = " ".join([*shown[len(expected) :], done.stderr])
    for text in ("mixed precision", "weights are old"):
        assert (text in rest) == (verbosity == "all"), text
    for text in ("details", "accumulation", "all_gather_into_tensor"):
        assert text not in rest, text


def test_bars_of_libraries_that_finish_in_a_moment_are_not_shown():
    script = (
        "import json, time\n"
        "from deris_llm.common.messages import quiet_libraries\n"
        "quiet_libraries()\n"
        "from tqdm.auto import tqdm\n"
        "print(json.dumps(tqdm(range(3)).delay))\n"
        "for _ in tqdm(range(3), desc='Loading weights'): time.sleep(0.11)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert json.loads(done.stdout) == 5
    assert "Loading weights" not in done.stderr
