import logging

import pytest
import timm
import torch
from transformers import Mask2FormerForUniversalSegmentation

from deris_llm.config import PerceptionConfig
from deris_llm.models.perception import TimmBackbone, build_perception
from deris_llm.testing import relative_difference, tiny_config, tiny_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PerceptionConfig:
    return tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights"))).perception


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(config: PerceptionConfig, *, weights: bool = True):
    return build_perception(config, rounds=3, num_queries=10, weights=weights, dtype=torch.float32)


def changed(config: PerceptionConfig, **fields) -> PerceptionConfig:
    return PerceptionConfig(**{**vars(config), **fields})


def test_rounds_on_the_content_queries_are_mask2former(config: PerceptionConfig, image: torch.Tensor):
    """With its own queries and masks, the parts give every mask of transformers' Mask2Former."""
    perception, decoder = build(config)
    original = Mask2FormerForUniversalSegmentation.from_pretrained(config.weights)
    with torch.no_grad():
        expected = original.model(image).masks_queries_logits
        feats = perception.eval()(image)
        scales = decoder.scale_tokens(feats.multi_scale_feats)
        queries = original.model.transformer_module.queries_features.weight.expand(2, -1, -1)
        masks = torch.empty(0)
        for round_index in range(4):
            if round_index > 0:
                scale = scales[(round_index - 1) % 3]
                queries = decoder(round_index - 1, queries, masks, scale, [1, 1])
            masks = torch.einsum("pqc,pchw->pqhw", decoder.mask_embeddings(queries), feats.mask_feats)
            assert relative_difference(masks, expected[round_index]) < 1e-5  # measured: 0


def test_features_have_the_promised_strides(config: PerceptionConfig, image: torch.Tensor):
    perception, decoder = build(config)
    feats = perception(image)
    assert feats.mask_feats.shape == (2, 32, 16, 16)
    assert [tuple(scale.shape) for scale in feats.multi_scale_feats] == [(2, 32, s, s) for s in (2, 4, 8)]
    assert decoder.channels == 32


def test_empty_mask_reads_everywhere_and_masked_cells_are_not_read(config: PerceptionConfig, image: torch.Tensor):
    perception, decoder = build(config)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 10, 32, generator=generator)
    with torch.no_grad():
        scale = decoder.scale_tokens(perception(image).multi_scale_feats)[2]

        def run(masks: torch.Tensor, scale=scale) -> torch.Tensor:
            return decoder(0, queries, masks, scale, [1, 1])

        nothing, everything = torch.full((2, 10, 16, 16), -1.0), torch.ones(2, 10, 16, 16)
        assert torch.equal(run(nothing), run(everything))

        left = everything.clone()
        left[..., 8:] = -1
        is_right = (torch.arange(64) % 8 >= 4)[:, None]
        disturbed = scale._replace(values=scale.values + 5 * is_right)
        assert torch.equal(run(left), run(left, disturbed))
        assert relative_difference(run(everything), run(everything, disturbed)) > 1e-3


def test_frozen_backbone_stays_in_eval_and_gets_no_gradient(config: PerceptionConfig, image: torch.Tensor):
    perception, _ = build(config)
    perception.train()
    assert perception.pixel_decoder.training
    assert not any(module.training for module in perception.backbone.modules())
    feats = perception(image)
    assert torch.equal(feats.mask_feats, perception(image).mask_feats)  # drop path 0.3 would show
    feats.mask_feats.sum().backward()
    assert all(parameter.grad is None for parameter in perception.backbone.parameters())
    assert all(parameter.grad is not None for parameter in perception.pixel_decoder.parameters())


def test_every_parameter_of_an_unfrozen_backbone_trains(config: PerceptionConfig, image: torch.Tensor):
    perception, _ = build(changed(config, freeze_backbone=False))
    perception.train()
    assert perception.backbone.training
    feats = perception(image)
    torch.stack([m.square().sum() for m in (feats.mask_feats, *feats.multi_scale_feats)]).sum().backward()
    assert [name for name, parameter in perception.named_parameters() if parameter.grad is None] == []


def test_checkpointing_changes_no_gradient(config: PerceptionConfig, image: torch.Tensor):
    gradients = []
    for checkpointing in (False, True):
        perception, _ = build(changed(config, activation_checkpointing=checkpointing))
        perception.train()
        assert perception.checkpointing is checkpointing
        perception(image).mask_feats.square().sum().backward()
        gradients.append([parameter.grad for parameter in perception.pixel_decoder.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("swin_small_patch4_window7_224", [96, 192, 384, 768]),
        ("swin_base_patch4_window12_384", [128, 256, 512, 1024]),
        ("convnext_atto", [40, 80, 160, 320]),
        ("resnet18", [64, 128, 256, 512]),
    ],
)
def test_timm_backbones_have_the_promised_strides_and_channels(name: str, channels: list[int]):
    with torch.device("meta"):
        backbone = TimmBackbone(name, image_size=128, pretrained=False).eval()
        maps = backbone(torch.zeros(2, 3, 128, 128)).feature_maps
    assert backbone.channels == channels
    expected = [(2, c, 128 // stride, 128 // stride) for c, stride in zip(channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(feature_map.shape) for feature_map in maps] == expected


def test_timm_swin_maps_are_not_transposed():
    """Black below the diagonal: a map that swaps rows and columns, or channels and cells, would show it elsewhere."""
    torch.manual_seed(0)
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", image_size=64, pretrained=False).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        black = backbone(image).feature_maps[0]
        image[:, :, :8, 48:] = 3.0  # top right
        change = (backbone(image).feature_maps[0] - black).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 16) in {(row, column) for row in (0, 1) for column in range(12, 16)}


def test_timm_backbone_feeds_a_pixel_decoder_of_its_channels(config: PerceptionConfig, image: torch.Tensor):
    perception, _ = build(changed(config, backbone="timm:resnet18"), weights=False)
    perception.train()
    assert not perception.backbone.training
    feats = perception(image)
    assert feats.mask_feats.shape == (2, 32, 16, 16)
    assert [tuple(scale.shape) for scale in feats.multi_scale_feats] == [(2, 32, s, s) for s in (2, 4, 8)]


def test_with_a_timm_backbone_the_rest_of_the_weights_is_still_loaded(
    config: PerceptionConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Only what reads the backbone's channels starts fresh; timm's own weights would need the network."""
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create_model(name, **{**options, "pretrained": False})
    )
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        perception, decoder = build(changed(config, backbone="timm:resnet18"))
    reference, reference_decoder = build(config)
    ours, theirs = perception.pixel_decoder.state_dict(), reference.pixel_decoder.state_dict()
    differ = {
        name for name in ours if ours[name].shape != theirs[name].shape or not torch.equal(ours[name], theirs[name])
    }
    assert differ == {"adapter_1.0.weight", *(f"input_projections.{level}.0.weight" for level in range(3))}
    assert all(name in caplog.text for name in differ)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), reference_decoder.parameters(), strict=True))


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("timm:swin_tiny_patch4_window7_242", "near names: swin_tiny_patch4_window7_224"),
        ("timm:vit_tiny_patch16_224", "expected maps at strides"),
        ("resnet18", "expected `mask2former` or `timm:NAME`"),
    ],
)
def test_wrong_backbones_are_told(config: PerceptionConfig, backbone: str, told: str):
    with pytest.raises(ValueError, match=told):
        build(changed(config, backbone=backbone), weights=False)
