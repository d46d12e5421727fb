"""Phrases packed behind their image, under ZeRO: one process per rank, each with a picture of its own.

Arguments: rank, folder with case.json (see `test_shared_prefix_on_ranks.py`). Writes FOLDER/zeroSTAGE.pt on rank 0:
losses of all ranks, values of this rank's phrases, and gradients, which are means over the ranks.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from deris_llm.common.ranks import gathered
from deris_llm.models.deris import Deris, build_model
from deris_llm.structures import DerisOutput
from deris_llm.testing import synthetic_batch, tiny_config
from deris_llm.training.optimizer import build_optimizer
from deris_llm.training.start import join_ranks, leave_ranks

NUM_PHRASES = 5


def with_drawn_lora(model: Deris) -> Deris:
    """Fresh LoRA has a zero half, and then no gradient in the other: both get drawn values, equal on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def values_of(output: DerisOutput, phrase: int) -> Tensor:
    """Everything that the model says of a phrase."""
    said = [output.presence_logit[phrase].view(1)]
    for one in output.rounds:
        said += [one.mask_logits[phrase].flatten(), one.referring_logits[phrase].flatten()]
    return torch.cat(said)


def loss_of(values: Tensor) -> Tensor:
    """A loss in which each value counts differently."""
    return (values * torch.linspace(-1, 1, len(values))).sum() / len(values) + values.square().mean()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    case = json.loads((folder / "case.json").read_text())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    join_ranks(uses_deepspeed=True)
    config = tiny_config(*case["overrides"])
    batch = synthetic_batch(config, num_images=1, phrases_per_image=NUM_PHRASES, seed=rank)
    for name, content in case["deepspeed"].items():
        keeps_alive = HfDeepSpeedConfig(content)  # from here on, models are partitioned while they are built
        torch.manual_seed(0)
        model = with_drawn_lora(build_model(config).train())
        engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config), config=content)
        output = engine(batch)
        values = [values_of(output, phrase) for phrase in range(NUM_PHRASES)]
        loss = torch.stack([loss_of(each) for each in values]).sum()
        engine.backward(loss)
        gradients = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
        found = {"losses": gathered(loss.item()), "values": torch.stack(values).detach(), "gradients": gradients}
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
        engine.destroy()
        del keeps_alive
    leave_ranks()


if __name__ == "__main__":
    main()
