import pytest
import torch
from torch import nn

from deris_llm.models.perception.masked_attention import MaskedAttention, VisibleCells

PHRASES_PER_MAP = [3, 0, 1, 2]  # a map may have no phrase
P, R, Q, S, C, HEADS = 6, 4, 5, 12, 32, 4


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries (Q, P, C), keys and values (R, S, C); what each query may read (P, Q, S)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((Q, P, C), (R, S, C), (R, S, C))
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    is_visible = torch.rand(P, Q, S, generator=generator) < 0.4
    is_visible[..., 3] = True
    return tensors, is_visible


@pytest.mark.parametrize("is_training", [True, False])
def test_equals_torchs_module_with_each_phrase_given_its_own_copy_of_the_map(is_training: bool):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(C, HEADS).train(is_training)
    ours = MaskedAttention(theirs).train(is_training)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert all(dict(ours.named_parameters())[name] is value for name, value in theirs.named_parameters())
    of_phrase = torch.repeat_interleave(torch.arange(R), torch.tensor(PHRASES_PER_MAP))
    found = []
    for module in (ours, theirs):
        (queries, keys, values), is_visible = inputs()
        if module is ours:
            result, _ = ours(queries, keys, values, attn_mask=VisibleCells(is_visible, PHRASES_PER_MAP))
        else:
            copies = (each[of_phrase].transpose(0, 1) for each in (keys, values))
            result, _ = theirs(queries, *copies, attn_mask=(~is_visible).repeat_interleave(HEADS, dim=0))
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(result.square().sum(), [queries, keys, values, *parameters])
        found.append([result, *gradients])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=5e-6 * float(reference.detach().abs().max()))
