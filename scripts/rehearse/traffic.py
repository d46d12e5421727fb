"""Counts the bytes that the ranks of a tiny run send in a step, beside what `deris-llm plan --scale` computes for it.

    python scripts/rehearse/traffic.py                       2 and 4 ranks, ZeRO 0, 1, 2 and 3
    python scripts/rehearse/traffic.py --ranks 2 --zero 3

Trains tiny-refcoco for three steps on a small synthetic world and counts every collective of the last step: its operation and the
size of its tensors. As root it also runs the ranks in a network of their own and reads from its loopback device what was sent in
all, control messages and headers included. A run takes about half a minute on two idle cores. Exit status: 0 if the counted bytes
are those of the plan, 1 if not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.01  # relative; partitions are padded to equal sizes, and a step has small collectives of its own

_ALL_REDUCE, _FIRST, _SECOND = "all_reduce", 0, 1
_COUNTED = {  # operation -> which of its arguments has the whole tensor
    "all_reduce": _FIRST,
    "reduce": _FIRST,
    "broadcast": _FIRST,
    "all_gather_into_tensor": _FIRST,
    "reduce_scatter_tensor": _SECOND,
}


@dataclass(frozen=True)
class Collective:
    """One collective of a step, as one rank calls it."""

    operation: str
    bytes: int  # of the whole tensor

    def sent(self, ranks: int) -> float:
        """Returns the bytes that a rank sends in a ring: twice the tensor's share of the others in an all-reduce, else once."""
        return (2 if self.operation == _ALL_REDUCE else 1) * self.bytes * (ranks - 1) / ranks


class Traffic:
    """Records the collectives of every training step of this process. Made before DeepSpeed, which keeps their functions.

    Attributes:
        steps: the collectives of each finished micro-step.
        wire: bytes sent over the loopback device of this network during each of them.
    """

    def __init__(self) -> None:
        from deris_llm.training.trainer import DerisTrainer  # takes seconds

        self.steps: list[list[Collective]] = []
        self.wire: list[int] = []
        self._now: list[Collective] = []
        for name, position in _COUNTED.items():
            setattr(dist, name, self._recording(getattr(dist, name), name, position))
        DerisTrainer.training_step = self._marking(DerisTrainer.training_step)

    def _recording(self, call: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        @functools.wraps(call)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            tensor = [*args, *kwargs.values()][position]
            assert isinstance(tensor, Tensor)
            self._now.append(Collective(name, tensor.numel() * tensor.element_size()))
            return call(*args, **kwargs)

        return recorded

    def _marking(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._now.clear()
            before = _loopback_bytes()
            result = step(*args, **kwargs)
            self.steps.append(list(self._now))
            self.wire.append(_loopback_bytes() - before)
            return result

        return marked

    def write(self, path: Path) -> None:
        """Writes what was recorded as JSON, and forgets it."""
        steps = [[(each.operation, each.bytes) for each in step] for step in self.steps]
        path.write_text(json.dumps({"steps": steps, "wire": self.wire}))
        self.steps, self.wire = [], []


def read_traffic(path: Path) -> tuple[list[Collective], int]:
    """Returns the collectives of the last step, and the bytes on the loopback device during it."""
    content = json.loads(path.read_text())
    return [Collective(*each) for each in content["steps"][-1]], content["wire"][-1]


def _loopback_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def rank_main(output: Path, arguments: Sequence[str]) -> int:
    """Trains as one rank, counting."""
    from deris_llm.training.__main__ import main as train

    traffic = Traffic()
    status = train(arguments)
    if os.environ["RANK"] == "0":
        traffic.write(output)
    return status


def _settings(world: Path) -> list[str]:
    return [
        f"data.root={world}",
        "data.phrases_per_image=2",
        "training.images_per_device=1",
        "training.max_steps=3",
        "training.save_every=3",
        "training.eval_max_images=1",
    ]


def _planned(settings: Sequence[str], stage: int) -> Any:
    """Returns what `plan --scale` computes for a step of this run."""
    from deris_llm.config import load_config
    from deris_llm.planning.efficiency import model_to_count
    from deris_llm.planning.plan import plan_cognition, shape_batch
    from deris_llm.planning.scaling import traffic_of_step

    config = load_config("tiny-refcoco", list(settings))
    return traffic_of_step(model_to_count(config).train(), shape_batch(config, plan_cognition(config)))[stage]


def _has_own_network() -> bool:
    made = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return made.returncode == 0


def _run(work: Path, settings: Sequence[str], *, ranks: int, stage: int, own_network: bool) -> tuple[float, float]:
    """Returns the bytes that a rank sends in a step: counted by its collectives, and on the wire."""
    counted, deepspeed = work / f"zero{stage}_{ranks}.json", work / f"deepspeed{stage}.json"
    content = json.loads((ROOT / "ds_configs" / f"zero{stage or 1}.json").read_text())
    content["zero_optimization"]["stage"] = stage
    deepspeed.write_text(json.dumps(content))
    command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), __file__, "--rank", str(counted)]
    command += ["--config", "tiny-refcoco", "--deepspeed", str(deepspeed), "--output", str(work / counted.stem)]
    command += ["--set", *settings]
    if own_network:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    collectives, wire = read_traffic(counted)
    return sum(each.sent(ranks) for each in collectives), wire / ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Prints planned and counted bytes of each stage and number of ranks."""
    parser = argparse.ArgumentParser(
        description="Counts the bytes that ranks of a tiny run send in a step, beside what `deris-llm plan --scale` computes."
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default 2 4)")
    parser.add_argument(
        "--zero", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="ZeRO stages (default all)"
    )
    parser.add_argument("--world", type=Path, help="a data root (default: a small synthetic world is made)")
    arguments = parser.parse_args(argv)
    own_network = _has_own_network()
    is_right = True
    print("| ranks | ZeRO | planned MB | counted MB | on the wire MB |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        world = arguments.world or Path(folder, "world")
        if arguments.world is None:
            from deris_llm.data.synthetic.world import write_world

            write_world(world, seed=0, num_train=24, num_val=3, num_test=2)
        settings = _settings(world)
        for stage in arguments.zero:
            planned = _planned(settings, stage)
            for ranks in arguments.ranks:
                counted, wire = _run(Path(folder), settings, ranks=ranks, stage=stage, own_network=own_network)
                expected = planned.sent(ranks)
                is_right &= abs(counted - expected) <= TOLERANCE * expected
                on_wire = f"{wire / 1e6:.2f}" if own_network else "not measured: needs root"
                print(f"| {ranks} | {stage} | {expected / 1e6:.2f} | {counted / 1e6:.2f} | {on_wire} |", flush=True)
    return int(not is_right)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank_main(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
