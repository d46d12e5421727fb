"""Evaluates the test world with a random tiny model; one process per rank, each writes what it got."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_world import write_records

from deris_llm.evaluation.evaluator import evaluate
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config


class Failing(torch.nn.Module):
    def forward(self, batch: object) -> None:
        raise OSError("the disk is gone")


def main() -> None:
    """Arguments: rank, number of ranks, folder of pictures, output folder, overrides."""
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    folder, out, *overrides = sys.argv[3:]
    store = torch.distributed.FileStore(str(Path(out, "store")), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    model = build_model(config)
    records = write_records(Path(folder))
    processor = build_processor(config)
    result = evaluate(model, config, records, processor, device="cpu", progress=False)
    found = {"numbers": result.numbers, "predictions": [p.to_json() for p in result.answers]}
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    # rank 1 has other records: pictures shift between the shards, and one is predicted twice
    other = records if rank == 0 else [record for record in records if record.image_id != "picture_3"]
    try:
        evaluate(model, config, other, processor, device="cpu", progress=False)
    except AssertionError as error:
        Path(out, f"rank{rank}.count").write_text(str(error))
    failing = model if rank == 0 else Failing()
    try:
        evaluate(failing, config, records, processor, device="cpu", progress=False)
    except (OSError, RuntimeError) as error:
        Path(out, f"rank{rank}.failure").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
