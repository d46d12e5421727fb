"""Everything the parity fixtures have of a forward pass and of a loss, computed by our model.

I images = P phrases = 2 (or 1), Q queries, C channels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.ops
from torch import Tensor, nn

from deris_llm.config import load_config
from deris_llm.data.collate import referring_batch
from deris_llm.interop.deris import rename
from deris_llm.models.deris import Deris, build_model
from deris_llm.models.postprocess import readable_logits
from deris_llm.models.variants import LoopbackVariant
from deris_llm.structures import CognitionInputs, DerisOutput, ReferringBatch
from scripts.parity.recipe import ParityInputs

ORIGINAL_SIZES_HW = ((300, 500), (480, 361))
SIZE = 384  # px
UNION = "pp_union_thr"  # followed by a threshold in the fixtures' names
NMS_IOU = 0.7


class DroppedHeads(nn.Module):
    """Heads of the public code whose results nobody uses: boxes, perception classes, logits of the presence decoder.

    Our model has none of them; the fixtures hold their outputs, so they are computed here from our model's queries.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        predictor = "perception_branch.predictor."
        channels = tensors[f"{predictor}cls_embed.weight"].shape[1]
        linears = [nn.Linear(channels, width) for width in (channels, channels, 4)]
        self.box = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2], nn.Sigmoid())
        self.cls = nn.Linear(channels, 2)
        self.logit = nn.Linear(channels, 2)
        sources = [
            *((linear, f"{predictor}box_embed.layers.{i}") for i, linear in enumerate(linears)),
            (self.cls, f"{predictor}cls_embed"),
            (self.logit, "understanding_branch.logit_embed"),
        ]
        for linear, name in sources:
            linear.load_state_dict({end: tensors[f"{name}.{end}"] for end in ("weight", "bias")})
        self.requires_grad_(False)


def build_parity_model(run_config: str, tensors: Mapping[str, Tensor]) -> Deris:
    """Our model of a released state dict, in evaluation mode, with the public code's attention over the batch.

    Args:
        run_config: name.
        tensors: all, under the public code's names.
    """
    config = load_config(run_config, ["loopback.prior_attention=batch"])
    model = build_model(config, weights=False)
    renamed = rename(tensors)
    assert not renamed.unknown, renamed.unknown[:10]
    model.load_state_dict(renamed.tensors)
    return model.eval()


def parity_batch(inputs: ParityInputs, rows: slice = slice(None)) -> ReferringBatch:
    """The fixtures' inputs as a batch: each phrase has a picture of its own."""
    image = torch.from_numpy(inputs.image[rows])
    padding = torch.from_numpy(inputs.token_padding[rows]).bool()
    return referring_batch(
        image,
        CognitionInputs(
            pixel_values=torch.from_numpy(inputs.small_image[rows]),
            input_ids=torch.from_numpy(inputs.token_ids[rows]),
            token_padding_mask=padding,
            text_feature_mask=~padding,
        ),
        phrases=[""] * len(image),
        image_index=range(len(image)),
    )


@torch.no_grad()
def forward_arrays(
    model: Deris, heads: DroppedHeads, batch: ReferringBatch, *, thresholds: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """All arrays of the fixtures for a batch, by their names there (RECIPE.md section 3).

    Args:
        model: from `build_parity_model`.
        heads: of the same state dict.
        batch: from `parity_batch`.
        thresholds: of the scores whose union masks are wanted, as they stand in the fixtures' names.
    """
    with _recorded(model) as seen:
        output: DerisOutput = model(batch)
    num_phrases = batch.num_phrases
    found: dict[str, Tensor] = {
        "beit_encoder_out": seen["beit3"][0],
        "cls_feat": seen["beit3"][0][:, 0],
        "img_feat": seen["vis_embed"][0].permute(0, 3, 1, 2),
        "text_feat": seen["text_embed"][0],
        "query_feat": seen["initial_embed"][0].expand(num_phrases, -1, -1),
        "mask_features": seen["mask_feats"][0],
        "fused_mask_features": seen["fused"][0],
        "post_query_feat": seen["presence"][0],
        "post_pred_logits": heads.logit(seen["presence"][0]),
        "pred_existence": output.presence_logit[:, None],
    }
    found |= {f"res{i + 2}": feature_map for i, feature_map in enumerate(seen["backbone"][0])}
    found |= {f"ms{i}": feature_map for i, feature_map in enumerate(seen["multi_scale"][0])}
    boxes = torch.empty(0)
    for i, one in enumerate(output.rounds):
        query_feats, prior = seen["round_inputs"][i]
        normed = seen["normed"][i]
        boxes = heads.box(normed)
        found |= {
            f"r{i}_q_in": query_feats,
            f"r{i}_masks_lowres": one.mask_logits,
            f"r{i}_pred_masks": readable_logits(one.mask_logits, output.mask_upsampling),
            f"r{i}_boxes": boxes,
            f"r{i}_cls_logits": heads.cls(normed),
            f"r{i}_mask_embedding": prior,
            f"r{i}_q_sa": seen["round_outputs"][i][0],
            f"r{i}_q_text": seen["round_outputs"][i][1],
            f"r{i}_q_out": seen["fusion"][i],
            f"r{i}_refer_logits": seen["referring"][i],
        }
        if i < len(output.rounds) - 1:
            scale = seen["multi_scale"][0][i % len(seen["multi_scale"][0])]
            size = (scale.shape[-2], scale.shape[-1])
            found[f"r{i}_attn_mask"] = model.loopback.query_decoder.outside(one.mask_logits, size)
            found[f"layer{i}_after_cross"] = seen["after_cross"][i].transpose(0, 1)
            found[f"layer{i}_after_self"] = seen["after_self"][i].transpose(0, 1)
    arrays = {name: value.numpy() for name, value in found.items()}
    return arrays | {name: np.asarray(value) for name, value in _postprocessed(output, boxes, thresholds).items()}


def _postprocessed(output: DerisOutput, boxes_cxcywh_norm: Tensor, thresholds: Sequence[str]) -> dict[str, Any]:
    """What the public code's post-processing makes of the last round."""
    scores = output.final.referring_logits.sigmoid()
    existence = output.presence_logit.sigmoid()[:, None]
    centre, half = boxes_cxcywh_norm[..., :2] * SIZE, boxes_cxcywh_norm[..., 2:] * SIZE / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1).clamp(0, SIZE)
    masks = readable_logits(output.final.mask_logits, output.mask_upsampling) >= 0
    weighted = scores * existence
    found: dict[str, Any] = {
        "scores": scores,
        "pred_nt": 1 - existence,
        "boxes_px": boxes,
        "pp_query_mask_area": masks.sum(dim=(2, 3)),
        "pp_weighted_scores": weighted,
    }
    for threshold in thresholds:
        found[f"{UNION}{threshold}"] = _union(masks, scores, float(threshold))
    if len(scores) == len(ORIGINAL_SIZES_HW):
        found["pp_rescaled_boxes"] = torch.stack(
            [box / torch.tensor([SIZE / w, SIZE / h] * 2) for box, (h, w) in zip(boxes, ORIGINAL_SIZES_HW, strict=True)]
        )
        for i, (height, width) in enumerate(ORIGINAL_SIZES_HW):
            union = _union(masks, scores, 0.7)[i].numpy().astype(np.uint8)
            resized = cv2.resize(union, (width, height), interpolation=cv2.INTER_NEAREST)
            found[f"pp_rescaled_union_{i}"] = resized.astype(bool)
            found[f"pp_nms_scores_{i}"] = weighted[i][torchvision.ops.nms(boxes[i], weighted[i], NMS_IOU)]
    return found


def _union(masks: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return (masks & (scores > threshold)[..., None, None]).any(dim=1)


@contextmanager
def _recorded(model: Deris) -> Iterator[dict[str, list[Any]]]:
    """Outputs of the modules in between, in the order of their calls."""
    seen: dict[str, list[Any]] = {}
    loopback, perception = model.loopback, model.perception
    assert isinstance(loopback, LoopbackVariant), "compat: deris-2025 differs from the paper's loopback"
    assert perception is not None, "compat: deris-2025 has both branches"
    beit3: Any = model.cognition
    decoder = loopback.query_decoder
    vis_embed, fusion = loopback.vis_embed, loopback.mask_feats_fusion
    presence_decoder = loopback.presence_decoder
    assert vis_embed is not None, "compat: deris-2025 has both branches"
    assert fusion is not None, "compat: deris-2025 has both branches"
    assert presence_decoder is not None, "compat: deris-2025 has a text decoder for presence"

    def keep(name: str, choose: Callable[[Any], Any] = lambda output: output) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(choose(output))

    places = [
        (beit3.model, keep("beit3", lambda output: getattr(output, "last_hidden_state", output))),
        (perception.backbone, keep("backbone", lambda output: output.feature_maps)),
        (perception.pixel_decoder, keep("mask_feats", lambda output: output[0])),
        (perception.pixel_decoder, keep("multi_scale", lambda output: output[1:])),
        (vis_embed, keep("vis_embed")),
        (loopback.text_embed, keep("text_embed")),
        (loopback.initial_embed, keep("initial_embed")),
        (fusion, keep("fused")),
        (presence_decoder, keep("presence")),
        (loopback.referring_head, keep("referring")),
        (decoder.norm, keep("normed")),
        *((one, keep("fusion")) for one in loopback.query_fusions),
        *((one, keep("round_outputs")) for one in loopback.cognition_rounds),
        *((layer.cross_attn_layer_norm, keep("after_cross")) for layer in decoder.layers),
        *((layer.self_attn_layer_norm, keep("after_self")) for layer in decoder.layers),
    ]
    handles = [module.register_forward_hook(hook) for module, hook in places]
    handles += [
        one.register_forward_pre_hook(lambda _module, inputs: seen.setdefault("round_inputs", []).append(inputs[:2]))
        for one in loopback.cognition_rounds
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
