import pytest
import torch

from deris_llm.checkpoints.state import _fill, _Fragment


@pytest.mark.parametrize(
    ("start", "expected"),
    [(0, [1.0, 2.0]), (2, [3.0, 0.0]), (4, [0.0, 0.0]), (9, [0.0, 0.0])],
    ids=["inside", "at-the-end", "behind-it", "far-behind-it"],
)
def test_what_a_rank_holds_past_the_end_of_a_tensor_is_zero(start, expected):
    """ZeRO-3 gives every rank a part of equal size, also of a tensor with fewer values than ranks."""
    held = torch.full((2,), 7.0)
    _fill(_Fragment(held, start, is_partition=True), torch.tensor([[1.0, 2.0, 3.0]]))
    assert held.tolist() == expected
