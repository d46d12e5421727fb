"""Under ZeRO-3 a forward is a collective: a rank that fails alone in an evaluation must not leave the others waiting."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from deris_llm.common import ranks
from deris_llm.evaluation.evaluator import _Forward, _gathered


class Shared(torch.nn.Module):
    """Stands for a partitioned model: every forward is a collective."""

    def forward(self, batch):
        return ranks.reduced(batch.clone())


def evaluate(fails_at, *, rank, num_batches, most):
    """The loop of `answers_of`."""
    forward, failure = _Forward(Shared(), torch.device("cpu")), None
    forward.left = most
    try:
        for number in range(num_batches):
            if rank == 1 and number == fails_at:
                raise ValueError("no such image")
            forward(torch.ones(1))
        while forward.left:
            forward(torch.ones(1))
    except ranks.OtherRankError:
        pass
    except ValueError as error:
        failure = error
        forward.tell_failure()
    return _gathered([], failure)


@pytest.mark.parametrize("fails_at", [0, 2, 3, None])
def test_all_ranks_end_and_say_why(tmp_path, fails_at):
    num_batches = (6, 4)  # rank 0 has more images
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
                evaluate(fails_at, rank=rank, num_batches=num_batches[rank], most=max(num_batches))
                said = "done"
            except (ValueError, ranks.OtherRankError) as error:
                said = f"{type(error).__name__}: {error}"
            (tmp_path / f"said-{rank}").write_text(said)
            os._exit(0)
        children.append(child)
    deadline = time.monotonic() + 60
    while children:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
            pytest.fail("a rank waits")
        time.sleep(0.05)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    if fails_at is None:
        assert said == ["done", "done"]
    else:
        assert said[1] == "ValueError: no such image"
        assert said[0].startswith(
            "OtherRankError: evaluation: expected predictions of 2 ranks, but rank 1: ValueError: no such image"
        )
