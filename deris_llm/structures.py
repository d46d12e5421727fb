"""The data contract between the stages: every field with shape, dtype, range and polarity.

Letters: I images, P phrases (P >= I), T target instances, Q queries, L text tokens, C channels of the loopback,
D channels of the cognition backend, H W pixels of the perception image, h w cells of a feature map.

A batch holds I images and P phrases; ``image_index`` says which image a phrase looks at. Whatever depends on the
image alone is computed once per image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:  # commands that only read records start without torch
    import torch
    from torch import Tensor

MaskUpsampling = Literal["direct", "x4_align_corners"]
"""How mask logits at 1/4 are read: `direct`, interpolated between their own cells; or, as the released DeRIS weights need,
after bilinear upsampling x4 with align_corners=True (`postprocess.readable_logits`)."""

Exif = Literal["displayed", "stored"]
"""The orientation in which an image was annotated: rotated as its EXIF tag says, as viewers show it, or as its pixels are
stored. The size of the annotation decides; this decides for images whose size is the same either way."""


class _TensorFields:
    """A dataclass whose tensors, also those in nested dataclasses and tuples, move together."""

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """Moves all tensors to a device and casts the floating-point ones, if given."""
        from torch import Tensor

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None, non_blocking=True)
            if isinstance(value, _TensorFields):
                return value.to(device, dtype=dtype)
            return tuple(map(move, value)) if isinstance(value, tuple) else value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def pin_memory(self) -> Self:
        """Copies all tensors to page-locked memory; torch's DataLoader calls it under `pin_memory=True`."""
        from torch import Tensor

        def pin(value: object) -> object:
            if isinstance(value, (Tensor, _TensorFields)):
                return value.pin_memory()
            return tuple(map(pin, value)) if isinstance(value, tuple) else value

        return type(self)(**{f.name: pin(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class TokenRows(_TensorFields):
    """How a causal language model reads P prompts: R rows of T tokens, laid out on the host when the batch is made.

    Phrases that share their image form one row, ``[prefix | phrase 1 | phrase 2 | ... | padding]``: R is I. Otherwise
    each prompt is a row of its own: R is P. A *place* is a token's index in the flattened rows, ``row * T + column``.
    """

    source: Tensor  # int64 (R, T): index of the token in the flattened ``input_ids``; any index at padding
    positions: Tensor  # int64 (R, T) or, for multimodal rotary positions, (R, T, 3)
    owner: Tensor  # int64 (R, T): 0 = every phrase of the row reads this token, p + 1 = phrase p alone, -1 = padding
    image_places: Tensor  # int64 (n,): places of all image tokens, row by row
    text_places: Tensor  # int64 (P, L): places of the text features, left-aligned; any place at padding
    text_padding_mask: Tensor  # bool (P, L), True = padding
    last_places: Tensor  # int64 (P,): place of the last token of each prompt


@dataclass(frozen=True, eq=False)
class CognitionInputs(_TensorFields):
    """What a backend's processor makes of I images and P phrases.

    ``input_ids`` is the whole prompt of each phrase, image placeholders included, padded on the right.
    """

    pixel_values: Tensor  # float (I, 3, h_px, w_px), normalised as the backend wants it; or a backend's own packing
    input_ids: Tensor  # int64 (P, L)
    token_padding_mask: Tensor  # bool (P, L), True = padding
    text_feature_mask: Tensor  # bool (P, L), True = this token's hidden state is one of the text features
    prompt_lengths: tuple[int, ...] = ()  # P numbers: tokens of each prompt without padding; empty = not known
    phrase_images: tuple[int, ...] = ()  # P numbers: ``image_index`` on the host, for backends that ask for it
    image_grids: tuple[tuple[int, int], ...] = ()  # I pairs: rows, columns of the image tokens, for backends that ask
    same_as: tuple[int, ...] = ()  # P numbers: the first row with the same tokens, for encoders of the text alone
    rows: TokenRows | None = None  # for causal language models

    @property
    def has_padding(self) -> bool:
        """Whether a prompt is shorter than the longest, told without waiting for the device; True if not known."""
        return not self.prompt_lengths or min(self.prompt_lengths) < self.input_ids.shape[1]


@dataclass(frozen=True, eq=False)
class ReferringTargets(_TensorFields):
    """The referred instances of P phrases; a phrase without a row here names nothing in its image (no-target)."""

    masks: Tensor  # bool (T, H, W) at the size of the perception image, True = referent
    phrase_index: Tensor  # int64 (T,), non-decreasing, in 0..P-1


@dataclass(frozen=True, eq=False)
class ReferringBatch(_TensorFields):
    """I images and P phrases."""

    perception_image: Tensor  # float (I, 3, H, W), ImageNet-normalised RGB
    cognition: CognitionInputs
    image_index: Tensor  # int64 (P,), in 0..I-1, non-decreasing: the image of each phrase
    phrases_per_image: tuple[int, ...]  # I numbers, at least 1, sum P: the counts in image_index, known to the host
    phrase_ids: tuple[str, ...]  # P names, e.g. "refcoco/val/12345": dataset, split, sentence id
    phrases: tuple[str, ...]  # P texts, for messages and logs
    targets: ReferringTargets | None = None  # None if the answers are unknown (prediction)

    @property
    def num_phrases(self) -> int:
        return len(self.phrase_ids)


@dataclass(frozen=True, eq=False)
class CognitionFeatures(_TensorFields):
    """Features of the image-text model, in its own width D.

    Image features that do not depend on the phrase are given once per image: ``image_feats`` then has I rows and
    ``image_feats_index`` is the batch's ``image_index``; a backend that fuses both ways gives P rows and ``arange(P)``.
    """

    image_feats: Tensor  # float (I or P, D, h, w), row-major map, top row first
    image_feats_index: Tensor  # int64 (P,): the row of image_feats for each phrase
    text_feats: Tensor  # float (P, L, D), tokens in reading order, left-aligned
    text_padding_mask: Tensor  # bool (P, L), True = padding; at least one False per row
    cls_feat: Tensor  # float (P, D), one summary vector per phrase (a causal LLM: its last token)


@dataclass(frozen=True, eq=False)
class PerceptionFeatures(_TensorFields):
    """Features of the perception branch for I images."""

    mask_feats: Tensor  # float (I, C, H/4, W/4): F_p
    multi_scale_feats: tuple[Tensor, ...]  # three float maps (I, C, h, w) at strides 32, 16, 8, in this order


@dataclass(frozen=True, eq=False)
class RoundOutput(_TensorFields):
    """Predictions of one loopback round, before masks are upsampled."""

    mask_logits: Tensor  # float (P, Q, H/4, W/4), > 0 = inside
    referring_logits: Tensor  # float (P, Q), > 0 = this query is (one of) the referent(s)


@dataclass(frozen=True, eq=False)
class DerisOutput(_TensorFields):
    """Predictions of all rounds, first to last, and of the presence of a target."""

    rounds: tuple[RoundOutput, ...]  # N + 1 rounds; round 0 is of the initial queries
    presence_logit: Tensor  # float (P,), > 0 = a target exists
    mask_upsampling: MaskUpsampling = "direct"  # how to read the masks of all rounds

    @property
    def final(self) -> RoundOutput:
        return self.rounds[-1]


@dataclass(frozen=True)
class InstanceAnnotation:
    """One annotated object with its mask in COCO's encoding."""

    annotation_id: int
    segmentation: object  # COCO: list of polygons [x0, y0, x1, y1, ...] px | {"size": [h, w], "counts": list | str}


@dataclass(frozen=True)
class ReferringRecord:
    """One phrase of one image with its referents, as readers of all source formats yield it."""

    phrase_id: str  # "{dataset}/{split}/{sentence id}", unique over all datasets
    dataset: str  # "refcoco", "refcoco+", "refcocog_umd", ...
    split: str  # "train", "val", "testA", ...
    image_id: str  # unique over datasets that share images (COCO: the file's stem)
    image_path: str
    width: int  # px, of the original image
    height: int  # px
    phrase: str  # the referring expression
    instances: tuple[InstanceAnnotation, ...]  # the referents; empty = no target, or without `has_truth` not known
    crowds: tuple[InstanceAnnotation, ...] = ()  # further referents that gRefCOCO's own API leaves out (iscrowd=1)
    exif: Exif = "stored"  # where the image's size does not tell; COCO annotates stored pixels
    # For breakdowns and files of predictions only; None if the source does not have it.
    category: str | None = field(default=None, compare=False)  # the referents' class; None if they have several
    num_same_class: int | None = field(default=None, compare=False)  # other objects of their classes in the image
    ref_id: int | None = field(default=None, compare=False)  # REFER's ref: phrases of one referent have the same
    ignored: object | None = None  # RLE of the pixels that no metric counts (ReasonSeg); in training they are outside
    # A frame of a video is an image, and a sentence of the video is a phrase of each of its frames.
    video: str | None = None  # the source's id; None: not a frame
    frame: int | None = None  # position in the source's own list of frames
    expression: str | None = None  # the source's id of the sentence in its video
    has_truth: bool = (
        True  # False: the answer is not published (hidden test splits), so nothing is trained on or compared
    )

    @property
    def is_no_target(self) -> bool:
        """The phrase names nothing in the image; False if that is not known."""
        return self.has_truth and not self.instances
