#!/usr/bin/env python
"""Records the golden numbers of tests/golden/losses: the loss of each training step and the answers of a checkpoint.

    python scripts/golden_losses.py                                # record everything into tests/golden/losses
    python scripts/golden_losses.py --out OUT --runs form-p2c   # record one run elsewhere
    python scripts/loss_compare.py tests/golden/losses OUT      # compare it with the stored ones

Each run takes 8 steps on a small synthetic world, in one process without DeepSpeed and on two ranks under ZeRO-2. Losses
are stored unrounded: a float32 survives the trip through JSON. Record on an unchanged working tree; a commit that
records new numbers explains in its message why they changed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

for _name, _value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)  # read when torch and transformers are imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts import each other as `scripts.*`
GOLDEN = ROOT / "tests" / "golden"
LOSSES = GOLDEN / "losses"
CHECKPOINT = ROOT / "deris_llm" / "builtin" / "tiny"  # shipped as `builtin:tiny`
CHECKPOINT_FILES = ("config.yaml", "base_weights.json", "metrics.json", "protocol.json")
NUM_STEPS = 8
NUM_PHRASES = 20
PARITY = "parity-extract"
PREDICTIONS = "quickstart-predictions"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "numpy", "pillow")


class Run(NamedTuple):
    """A training run whose losses are recorded."""

    config: str
    overrides: tuple[str, ...] = ()


RUNS = {
    "tiny-refcoco": Run("tiny-refcoco"),  # also loopback.form=loopback and loopback.structure=integrated, the defaults
    "tiny-grefcoco": Run("tiny-grefcoco"),
    "tiny-beit3-refcoco": Run("tiny-beit3-refcoco"),
    "deris-2025": Run("tiny-beit3-refcoco", ("compat=deris-2025", "cognition.drop_path=0.1")),
    "form-p2c": Run("tiny-refcoco", ("loopback.form=p2c",)),
    "form-c2p": Run("tiny-refcoco", ("loopback.form=c2p", "criterion.presence_weight=0")),
    "form-hierarchical": Run("tiny-refcoco", ("loopback.form=hierarchical", "loopback.cognition_weights=shared")),
    "structure-perception_centric": Run(
        "tiny-refcoco",
        (
            "loopback.structure=perception_centric",
            "cognition.prompt=<|im_start|>user\n{phrase}\n<image><|im_end|>\n",
            "cognition.prompt_order=text_first",
            "cognition.text_features=phrase",
        ),
    ),
    "structure-cognition_centric": Run(
        "tiny-refcoco", ("loopback.structure=cognition_centric", "loopback.presence_source=cls")
    ),
}


def run_overrides(run: Run, world: Path, *, num_ranks: int) -> list[str]:
    """Returns the overrides of a golden run: two images a step over all ranks, every loss logged."""
    return [
        f"data.root={world}",
        "data.phrases_per_image=4",
        "data.check_images=never",
        "perception.image_size=64",
        f"training.images_per_device={2 // num_ranks}",
        f"training.max_steps={NUM_STEPS}",
        f"training.save_every={NUM_STEPS}",
        "training.log_every=1",
        "training.eval_max_images=1",
        # A fifth of the shipped rates: with those, losses under other rounding (no AVX2) drift by up to 3e-5 in 8 steps.
        "training.learning_rate=2e-4",
        "training.pixel_decoder_learning_rate=1e-4",
        *run.overrides,
    ]


def write_golden_world(folder: Path) -> Path:
    """Writes the small synthetic world of all runs and returns its folder."""
    from deris_llm.data.synthetic.world import write_world

    write_world(folder / "world", seed=3, num_train=16, num_val=3, num_test=3)
    return folder / "world"


def trained_losses(folder: Path, name: str, world: Path, *, num_ranks: int = 1) -> list[float]:
    """Trains a run in this process, as one of `num_ranks` ranks, and returns its loss at each step."""
    from deris_llm.config import load_config
    from deris_llm.training.run import train

    run = RUNS[name]
    output = folder / f"{name}-{num_ranks}"
    deepspeed = None if num_ranks == 1 else ROOT / "ds_configs" / "zero2.json"
    config = load_config(run.config, run_overrides(run, world, num_ranks=num_ranks))
    checkpoint = train(config, output=output, deepspeed=deepspeed).checkpoint
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == NUM_STEPS, losses
    return losses


def two_rank_losses(folder: Path, names: Sequence[str], world: Path) -> dict[str, list[float]]:
    """Trains the runs one after the other in one job on two ranks, because a job takes longer to start than they take."""
    out = folder / "two_ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--as-rank", str(folder), "--world", str(world), "--runs", *names]
    # DeepSpeed's Muon, which is not used here, would otherwise import inductor: 5 CPU seconds on each rank.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout[-8000:]}")
    return json.loads(out.read_text())


def _train_as_rank(folder: Path, names: Sequence[str], world: Path) -> None:
    """Is what each of the two ranks executes."""
    import torch.distributed as dist

    losses = {name: trained_losses(folder, name, world, num_ranks=2) for name in names}
    if dist.get_rank() == 0:
        (folder / "two_ranks.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()  # without it a finished run sometimes aborts at exit


def parity_losses(num_steps: int = NUM_STEPS) -> list[float]:
    """Returns the losses of DeRIS-B at its true size with the weights, inputs and masks of tests/golden/parity.

    The first k losses do not depend on `num_steps`. A step takes about 13 CPU seconds.
    """
    import numpy as np
    import torch

    from deris_llm.config import load_config
    from deris_llm.losses.criterion import build_criterion
    from scripts.parity.arrays import build_parity_model, parity_batch
    from scripts.parity.losses import read_case
    from scripts.parity.recipe import MODELS, recipe_inputs, recipe_state_dict

    extract = GOLDEN / "parity"
    run_config, seeds = MODELS["B_refcoco"]
    model = build_parity_model(run_config, recipe_state_dict(extract, "B_refcoco")[0])
    batch = parity_batch(recipe_inputs(seeds))
    targets = read_case(np.load(extract / "losses.npz"), "A", [[0, 2], [1]]).targets
    criterion = build_criterion(load_config(run_config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for step in range(num_steps):
        loss = criterion(model(batch), targets, generator=torch.Generator().manual_seed(step)).total
        losses.append(float(loss.detach()))
        if step < num_steps - 1:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.15)
            optimizer.step()
    return losses


def write_checkpoint(best: Path, out: Path = CHECKPOINT) -> None:
    """Copies the checkpoint of a quickstart with its trained weights rounded to float16, which halves it to 3 MB."""
    from safetensors.torch import load_file, save_file

    out.mkdir(exist_ok=True)
    for name in CHECKPOINT_FILES:
        shutil.copyfile(best / name, out / name)
    trained = load_file(best / "trainable.safetensors")
    save_file({name: tensor.half() for name, tensor in trained.items()}, out / "trainable.safetensors")


def predictions(world: Path, checkpoint: Path = CHECKPOINT) -> list[dict[str, Any]]:
    """Returns what a checkpoint answers to the first 20 phrases of the golden world's grefcoco/val and test splits."""
    import numpy as np
    from pycocotools import mask as rle

    from deris_llm import DerisPipeline

    pipeline = DerisPipeline.from_pretrained(checkpoint, device="cpu")
    found = []
    for image, phrases in _asked(world).items():
        (path,) = world.rglob(image)
        for phrase, answer in zip(phrases, pipeline(path, phrases), strict=True):
            encoded = rle.encode(np.asfortranarray(answer.mask, dtype=np.uint8))
            found.append(
                {
                    "image": image,
                    "phrase": phrase,
                    "score": float(answer.score),
                    "presence": float(answer.presence),
                    "best_query": int(answer.referring_scores.argmax()),
                    "area": int(answer.mask.sum()),
                    "size_hw": list(answer.mask.shape),
                    "mask": encoded["counts"].decode(),
                }
            )
    return found


def _asked(world: Path) -> dict[str, list[str]]:
    """Returns image file name -> phrases; 20 phrases in all."""
    refs = json.loads((world / "grefcoco" / "grefs(unc).json").read_text())
    asked: dict[str, list[str]] = {}
    pairs = [
        (ref["file_name"], sentence["sent"]) for ref in refs if ref["split"] != "train" for sentence in ref["sentences"]
    ]
    for image, phrase in pairs[:NUM_PHRASES]:
        asked.setdefault(image, []).append(phrase)
    return asked


def machine() -> dict[str, Any]:
    """Returns what the rounding of a result depends on, libraries aside."""
    import torch

    info = Path("/proc/cpuinfo")
    fields = ("model name", "cpu family", "model", "stepping", "cache size")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": known.get("model name", platform.processor() or platform.machine()),
        "cpu_details": ", ".join(f"{field} {known[field]}" for field in fields[1:] if field in known),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "mkl_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
    }


def libraries() -> dict[str, str]:
    """Returns the versions of the libraries that compute."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def recording(name: str, command: str, **content: Any) -> dict[str, Any]:
    """Returns the content of a file of tests/golden/losses."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    header = {"run": name, "command": command, "commit": commit, "libraries": libraries(), "machine": machine()}
    return header | content


def main(argv: Sequence[str] | None = None) -> None:
    """Records the runs asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RUNS, PARITY, PREDICTIONS]
    parser.add_argument("--out", type=Path, default=LOSSES, metavar="DIR", help="default tests/golden/losses")
    parser.add_argument("--runs", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--checkpoint-from", type=Path, metavar="BEST", help="replace the checkpoint by that of a quickstart"
    )
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.as_rank is not None:
        _train_as_rank(arguments.as_rank, arguments.runs, arguments.world)
        return
    if arguments.checkpoint_from is not None:
        write_checkpoint(arguments.checkpoint_from)
    command = shlex.join(["python", "scripts/golden_losses.py", *(sys.argv[1:] if argv is None else argv)])
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        world = write_golden_world(Path(temporary))
        for name, content in _recorded(arguments.runs, Path(temporary), world):
            text = json.dumps(recording(name, command, **content), indent=1, ensure_ascii=False)
            (arguments.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"{arguments.out / name}.json", flush=True)


def _recorded(names: Sequence[str], folder: Path, world: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    trained = [name for name in names if name in RUNS]
    two_ranks = two_rank_losses(folder, trained, world) if trained else {}
    for name in trained:
        yield name, {"losses": {"1 rank": trained_losses(folder, name, world), "2 ranks": two_ranks[name]}}
    if PARITY in names:
        yield PARITY, {"losses": {"1 rank": parity_losses()}}
    if PREDICTIONS in names:
        yield PREDICTIONS, {"predictions": predictions(world)}


if __name__ == "__main__":
    main()
