"""What the tests run on two ranks, in one job: `deepspeed --num_gpus 2 worker.py FOLDER`.

FOLDER holds plan.json: a list of {"name", "overrides", "deepspeed" (JSON content or null), "resume_from"}. Each entry is
trained in FOLDER/NAME; what was raised goes to FOLDER/NAME/error.txt, the collectives of each step to FOLDER/NAME/traffic.json.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

from deris_llm.common.ranks import barrier, rank
from deris_llm.config import load_config
from deris_llm.training.run import train
from deris_llm.training.start import join_ranks, leave_ranks
from scripts.rehearse.traffic import Traffic


def main() -> None:
    folder = Path(sys.argv[-1])
    traffic = Traffic()
    join_ranks(uses_deepspeed=True)
    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.WARNING)
    for entry in json.loads((folder / "plan.json").read_text()):
        output = folder / entry["name"]
        if rank() == 0:
            output.mkdir()
            (output / "deepspeed.json").write_text(json.dumps(entry["deepspeed"]))
            if entry["resume_from"]:
                source = folder / entry["resume_from"]
                shutil.copytree(source, output / source.name)
        barrier()
        try:
            train(load_config("tiny-refcoco", entry["overrides"]), output=output, deepspeed=output / "deepspeed.json")
        except ValueError as error:
            if rank() == 0:
                (output / "error.txt").write_text(str(error))
        if rank() == 0:
            traffic.write(output / "traffic.json")
    barrier()
    leave_ranks()


if __name__ == "__main__":
    main()
