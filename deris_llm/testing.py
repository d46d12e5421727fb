"""For the tests of plugins and ours: tiny random weights, configs and batches, and the contract of a cognition backend."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SwinConfig,
)

from deris_llm.config import RunConfig, load_config
from deris_llm.data.collate import referring_batch
from deris_llm.models.cognition import (
    CognitionBackend,
    CognitionProcessor,
    build_processor,
)
from deris_llm.structures import CognitionFeatures, CognitionInputs, ReferringBatch, ReferringTargets

CORPUS = (
    "the red circle on the left", "a small blue square", "second green ring from the right", "user", "assistant",
    "Where is the large striped triangle behind the yellow star?", "dark grey shape in the middle of the picture",
)  # fmt: skip
_SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<image>", "<video>")
_PHRASES = ("red circle", "the small blue square on the left", "star", "a green ring behind the large triangle")


def tiny_weights(folder: Path) -> list[str]:
    """Writes a tiny LLaVA-OneVision and a tiny Mask2Former with random weights, as Hugging Face folders.

    Writing them takes about a second.

    Returns:
        overrides for `tiny_config` that use them, with sizes that make a step fast.
    """
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaOnevisionForConditionalGeneration(_tiny_llava(tokenizer.get_vocab())).save_pretrained(folder / "llava")
        Mask2FormerForUniversalSegmentation(_tiny_mask2former()).save_pretrained(folder / "mask2former")
    tokenizer.save_pretrained(folder / "llava")
    return [
        f"cognition.weights={folder / 'llava'}",
        f"perception.weights={folder / 'mask2former'}",
        "perception.image_size=64",
        "loopback.num_queries=5",
        "loopback.dim_feedforward=64",
        "cognition.lora.r=4",
        "criterion.num_points=64",
        "data.num_workers=0",
        "training.precision=fp32",
        "training.images_per_device=2",
    ]


def tiny_qwen_tokenizer(*more: str) -> PreTrainedTokenizerBase:
    """Trains a small Qwen2 tokenizer that has `more` special tokens."""
    special = [AddedToken(token, special=True) for token in (*_SPECIAL_TOKENS, *more)]
    return Qwen2Tokenizer().train_new_from_iterator(CORPUS, vocab_size=400, new_special_tokens=special)


def _tiny_llava(vocabulary: dict[str, int]) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=48, patch_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        ),
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
    )  # fmt: skip


def _tiny_mask2former() -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=64, drop_path_rate=0.3,
    )  # fmt: skip
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64,
        encoder_layers=1, decoder_layers=4, num_attention_heads=4, dim_feedforward=64, num_queries=10,
    )  # fmt: skip


def tiny_config(*overrides: str) -> RunConfig:
    """Loads the run config `tiny-refcoco` with overrides, e.g. those of `tiny_weights`."""
    return load_config("tiny-refcoco", overrides)


def synthetic_images(num_images: int, *, seed: int = 0, size: tuple[int, int] = (60, 80)) -> list[Image.Image]:
    """Makes noise images of (height, width) `size`."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(num_images)]


def synthetic_batch(
    config: RunConfig,
    *,
    num_images: int = 2,
    phrases_per_image: int = 2,
    targets_per_phrase: int = 1,
    seed: int = 0,
    processor: CognitionProcessor | None = None,
) -> ReferringBatch:
    """Makes a batch of noise images, fixed phrases and random rectangles as referents.

    Args:
        config: determines processor and sizes.
        num_images: I.
        phrases_per_image: P / I.
        targets_per_phrase: T / P; 0 = no phrase has a target.
        seed: of images and rectangles.
        processor: of the run's backend, if it is already built.
    """
    generator = np.random.default_rng(seed)
    size = config.perception.image_size
    num_phrases = num_images * phrases_per_image
    phrases = list(itertools.islice(itertools.cycle(_PHRASES), num_phrases))
    image_index = np.repeat(np.arange(num_images), phrases_per_image).tolist()
    masks = torch.zeros(num_phrases * targets_per_phrase, size, size, dtype=torch.bool)
    for mask in masks:
        top, left = generator.integers(0, size // 2, 2)
        height, width = generator.integers(size // 8, size // 2, 2)
        mask[top : top + height, left : left + width] = True
    processor = processor or build_processor(config)
    return referring_batch(
        torch.from_numpy(generator.standard_normal((num_images, 3, size, size), dtype=np.float32)),
        processor(synthetic_images(num_images, seed=seed), phrases, image_index),
        phrases,
        image_index,
        phrase_ids=[f"synthetic/train/{number}" for number in range(num_phrases)],
        targets=ReferringTargets(masks, torch.arange(num_phrases).repeat_interleave(targets_per_phrase)),
    )


def check_cognition_backend(
    backend: CognitionBackend, processor: CognitionProcessor, *, tolerance: float = 1e-4
) -> None:
    """Checks a backend and its processor against the contract of `deris_llm.models.cognition.base`.

    Args:
        backend: built; float32 on the CPU makes the comparisons meaningful.
        processor: of the same weights.
        tolerance: largest difference between batched and single results, relative to the largest value.

    Raises:
        AssertionError: names the rule that is broken.
    """
    images = [*synthetic_images(1), *synthetic_images(1, seed=1, size=(72, 48))]
    phrases, image_index = [_PHRASES[2], _PHRASES[1], _PHRASES[3]], [0, 0, 1]
    inputs = pickle.loads(pickle.dumps(processor))(images, phrases, image_index)
    _check_inputs(inputs, num_images=2, num_phrases=3)
    for empty in ("", "  "):
        try:
            processor(images[:1], [empty], [0])
        except ValueError:
            continue
        raise AssertionError(f"cognition backend: expected a ValueError of the processor for the phrase {empty!r}")

    was_training = backend.training
    backend.eval()
    with torch.no_grad():
        together = backend(inputs, torch.tensor(image_index))
        _check_features(together, backend.feature_dim, num_images=2, num_phrases=3)
        for number, (phrase, image) in enumerate(zip(phrases, image_index, strict=True)):
            alone = backend(processor([images[image]], [phrase], [0]), torch.tensor([0]))
            _check_equal(together, alone, number, tolerance)
        _check_orientation(backend, processor)
    _check_gradients(backend, inputs, torch.tensor(image_index))
    backend.train(was_training)


def _check_inputs(inputs: CognitionInputs, *, num_images: int, num_phrases: int) -> None:
    ids, padding, chosen = inputs.input_ids, inputs.token_padding_mask, inputs.text_feature_mask
    _require(ids.dtype == torch.int64 and len(ids) == num_phrases, "input_ids: int64 (P, L)")
    _require(len(inputs.pixel_values) == num_images or bool(inputs.image_grids), "pixel_values: I rows")
    _require(padding.dtype == torch.bool and padding.shape == ids.shape, "token_padding_mask: bool (P, L)")
    _require(chosen.dtype == torch.bool and chosen.shape == ids.shape, "text_feature_mask: bool (P, L)")
    _require(not padding.all(dim=1).any(), "token_padding_mask: True = padding, and no row is padding alone")
    _require(not (padding & chosen).any(), "text_feature_mask: padding is no text feature")
    _require(chosen.any(dim=1).all(), "text_feature_mask: every phrase has a text feature")


def _check_features(features: CognitionFeatures, feature_dim: int, *, num_images: int, num_phrases: int) -> None:
    maps, index, text = features.image_feats, features.image_feats_index, features.text_feats
    _require(maps.ndim == 4 and maps.shape[1] == feature_dim, "image_feats: (I or P, feature_dim, h, w)")
    _require(len(maps) in (num_images, num_phrases), "image_feats: one row per image or per phrase")
    _require(
        index.shape == (num_phrases,) and bool((index.diff() >= 0).all()), "image_feats_index: (P,), non-decreasing"
    )
    _require(int(index.max()) < len(maps), "image_feats_index: points at rows of image_feats")
    _require(text.ndim == 3 and text.shape[::2] == (num_phrases, feature_dim), "text_feats: (P, L, feature_dim)")
    padding = features.text_padding_mask
    _require(padding.dtype == torch.bool and padding.shape == text.shape[:2], "text_padding_mask: bool (P, L)")
    _require(
        not padding[:, 0].any(), "text_padding_mask: True = padding; tokens are left-aligned, at least one per row"
    )
    _require(bool((padding[:, 1:] >= padding[:, :-1]).all()), "text_padding_mask: tokens are left-aligned without gaps")
    _require(features.cls_feat.shape == (num_phrases, feature_dim), "cls_feat: (P, feature_dim)")


def _check_equal(together: CognitionFeatures, alone: CognitionFeatures, number: int, tolerance: float) -> None:
    _check_features(alone, together.cls_feat.shape[-1], num_images=1, num_phrases=1)
    length = int((~together.text_padding_mask[number]).sum())
    length_alone = int((~alone.text_padding_mask[0]).sum())
    _require(length == length_alone, f"text_feats: {length_alone} tokens for a phrase, whatever shares its batch")
    for name, ours, single in (
        ("image_feats", together.image_feats[together.image_feats_index[number]], alone.image_feats[0]),
        ("text_feats", together.text_feats[number, :length], alone.text_feats[0, :length]),
        ("cls_feat", together.cls_feat[number], alone.cls_feat[0]),
    ):
        difference = relative_difference(ours, single)
        _require(difference <= tolerance, f"{name}: the same, whatever shares the batch (differs by {difference:.1e})")


def _check_orientation(backend: CognitionBackend, processor: CognitionProcessor) -> None:
    """Checks that changing a corner of the image changes that corner of the map most; maps without an image pass."""
    for corner, elsewhere in (
        ("lower left", ("upper right",)),
        ("lower right", ("upper left", "upper right", "lower left")),
    ):
        found = dict.fromkeys(_CORNERS, 0.0)
        for image in synthetic_images(4, seed=2):
            pair = [image, _with_changed_corner(image, corner)]
            features = backend(processor(pair, [_PHRASES[2]] * 2, [0, 1]), torch.tensor([0, 1]))
            first, second = features.image_feats[features.image_feats_index]
            change = (second - first).float().norm(dim=0)
            height, width = (side // 2 for side in change.shape)
            if not height or not width:
                return
            for name, (top, left) in _CORNERS.items():
                rows = change[:height] if top else change[-height:]
                found[name] += float((rows[:, :width] if left else rows[:, -width:]).mean())
        for other in elsewhere:
            _require(
                found[corner] >= found[other],
                f"image_feats: row-major map, top row first, but a change at the image's {corner} shows at the map's "
                f"{other} (is the map transposed or flipped?)",
            )


_CORNERS = {
    "upper left": (True, True),
    "upper right": (True, False),
    "lower left": (False, True),
    "lower right": (False, False),
}  # (at the top, at the left)


def _with_changed_corner(image: Image.Image, corner: str) -> Image.Image:
    """Inverts a quarter of the image."""
    pixels = np.array(image)
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    top, left = _CORNERS[corner]
    quarter = pixels[
        slice(0, height) if top else slice(-height, None), slice(0, width) if left else slice(-width, None)
    ]
    quarter[:] = 255 - quarter
    return Image.fromarray(pixels)


def _require(is_kept: bool | Tensor, rule: str) -> None:  # noqa: FBT001
    if not is_kept:
        raise AssertionError(f"cognition backend: expected {rule}")


def _check_gradients(backend: CognitionBackend, inputs: CognitionInputs, image_index: Tensor) -> None:
    backend.train()
    features = backend(inputs, image_index)
    feats = (features.image_feats, features.text_feats, features.cls_feat)
    loss = torch.stack([each.float().square().sum() for each in feats]).sum()
    trains = {name: parameter for name, parameter in backend.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trains.values()), allow_unused=True) if trains else ()
    for name, gradient in zip(trains, gradients, strict=True):
        _require(gradient is not None, f"every trainable parameter to take part in the features, {name} does not")
        _require(gradient.isfinite().all(), f"finite gradients, that of {name} is not")


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """Returns the largest absolute difference, relative to the largest absolute value of the reference."""
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-12))
