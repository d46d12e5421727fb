"""BEiT-3 against the contract, a slow re-write, and the public DeRIS code's numbers."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deris_llm.config import load_config
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.cognition.beit3 import (
    BOS,
    EOS,
    UNKNOWN,
    Beit3,
    Beit3Model,
    clean_phrase,
    resized_positions,
)
from deris_llm.models.deris import build_model, trainable_names
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, warp_picture
from deris_llm.models.pretrained import architecture_of
from deris_llm.planning.plan import plan_run
from deris_llm.structures import CognitionInputs
from deris_llm.testing import (
    check_cognition_backend,
    relative_difference,
    synthetic_batch,
    synthetic_images,
    tiny_config,
    tiny_weights,
)
from tests.models.tiny_backends import tiny_beit3

PARITY = Path(__file__).parents[4] / "shared" / "parity"
PHRASES = ["the small blue square on the left", "star", "a green ring behind the large triangle"]
INDEX = torch.tensor([0, 0, 1])
LORA = ("cognition.tuning=lora", "cognition.lora.r=4")


@pytest.fixture(scope="module")
def beit3(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_beit3(tmp_path_factory.mktemp("beit3"))


def build(overrides: list[str], *more: str, wake_lora: bool = True) -> Beit3:
    torch.manual_seed(0)
    built = Beit3.build(tiny_config(*overrides, *more).cognition, weights=True, dtype=torch.float32)
    if wake_lora:
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return built


@pytest.fixture(scope="module")
def processor(beit3: list[str]):
    return build_processor(tiny_config(*beit3))


@pytest.fixture(scope="module")
def inputs(processor) -> CognitionInputs:
    return processor(synthetic_images(2), PHRASES, INDEX.tolist())


@pytest.mark.parametrize(
    "tuning", [(), LORA, ("cognition.tuning=lora", "cognition.lora.r=0")], ids=["full", "lora", "frozen"]
)
def test_contract(beit3: list[str], tuning: tuple[str, ...]):
    # batched = one by one, every trainable parameter takes part, ...; measured worst case 5.6e-7
    check_cognition_backend(build(beit3, *tuning), build_processor(tiny_config(*beit3)), tolerance=1e-5)


def slow_encoder(model: Beit3Model, picture: Tensor, ids: Tensor) -> Tensor:
    """One phrase without padding, written out: every matrix by einsum, each head by itself."""
    state, config = model.state_dict(), model.config
    patch, heads = config.patch_size, config.num_attention_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("ld,od->lo", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    side = picture.shape[-1] // patch
    cells = [
        picture[:, patch * r : patch * (r + 1), patch * c : patch * (c + 1)] for r in range(side) for c in range(side)
    ]
    kernel = state["vision_embed.proj.weight"]
    patches = (
        torch.stack([torch.einsum("cij,dcij->d", cell, kernel) for cell in cells]) + state["vision_embed.proj.bias"]
    )
    rows = torch.cat([state["vision_embed.cls_token"][0], patches])
    split = len(rows)
    rows = rows + state["encoder.embed_positions.A.weight"][2 : 2 + split]
    words = state["text_embed.weight"][ids] + state["encoder.embed_positions.B.weight"][2 : 2 + len(ids)]
    x = torch.cat([rows, words])

    def two_ways(function, x: Tensor, name: str, tail: str = "") -> Tensor:
        return torch.cat([function(x[:split], f"{name}.A{tail}"), function(x[split:], f"{name}.B{tail}")])

    for number in range(config.num_hidden_layers):
        layer = f"encoder.layers.{number}"
        normed = two_ways(norm, x, f"{layer}.self_attn_layer_norm")
        q, k, v = (two_ways(linear, normed, f"{layer}.self_attn.{kind}_proj").chunk(heads, -1) for kind in "qkv")
        mixed = [(a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        joined = two_ways(norm, torch.cat(mixed, -1), f"{layer}.self_attn.inner_attn_ln")
        x = x + two_ways(linear, joined, f"{layer}.self_attn.out_proj")
        wide = two_ways(linear, two_ways(norm, x, f"{layer}.final_layer_norm"), f"{layer}.ffn", ".fc1")
        active = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        x = x + two_ways(linear, two_ways(norm, active, f"{layer}.ffn", ".ffn_layernorm"), f"{layer}.ffn", ".fc2")
    return two_ways(norm, x, "encoder.layer_norm")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_slow_rewrite(beit3: list[str], inputs: CognitionInputs, attention: str):
    backend = build(beit3).eval()
    backend.model.config._attn_implementation = attention
    seen: list[Tensor] = []
    backend.model.register_forward_hook(lambda *call: seen.append(call[2]))  # the whole output can be watched
    with torch.no_grad():
        features = backend(inputs, INDEX)
        for number, image in enumerate(INDEX.tolist()):
            length = int((~inputs.token_padding_mask[number]).sum())
            slow = slow_encoder(backend.model, inputs.pixel_values[image], inputs.input_ids[number, :length])
            # measured worst case 6.5e-7
            assert relative_difference(seen[0][number, : len(slow)], slow) < 1e-5
            assert torch.equal(features.cls_feat[number], seen[0][number, 0])
            maps = slow[1:17].reshape(4, 4, 32).permute(2, 0, 1)  # row-major
            assert relative_difference(features.image_feats[number], maps) < 1e-5
            assert relative_difference(features.text_feats[number, :length], slow[17:]) < 1e-5


def test_padding_changes_nothing(beit3: list[str], inputs: CognitionInputs):
    backend = build(beit3).eval()
    more = torch.full((3, 7), 5)  # any token: padding is hidden and zeroed, whatever it is
    wider = CognitionInputs(
        pixel_values=inputs.pixel_values,
        input_ids=torch.cat([inputs.input_ids, more], dim=1),
        token_padding_mask=torch.cat([inputs.token_padding_mask, more.bool()], dim=1),
        text_feature_mask=torch.cat([inputs.text_feature_mask, ~more.bool()], dim=1),
    )
    with torch.no_grad():
        ours, reference = backend(wider, INDEX), backend(inputs, INDEX)
    valid = ~reference.text_padding_mask
    for name in ("image_feats", "cls_feat"):
        assert relative_difference(getattr(ours, name), getattr(reference, name)) < 1e-5
    text = ours.text_feats[:, : valid.shape[1]]
    assert relative_difference(text[valid], reference.text_feats[valid]) < 1e-5
    assert ours.text_feats[:, valid.shape[1] :].isfinite().all()  # real outputs, hidden by the mask
    assert (ours.text_feats[:, valid.shape[1] :].abs() > 0).any()


def test_positions_are_read_from_row_2(beit3: list[str], inputs: CognitionInputs):
    backend = build(beit3).eval()
    positions = backend.model.encoder.embed_positions
    with torch.no_grad():
        reference = backend(inputs, INDEX).cls_feat
        for way, row, matters in (("A", 1, False), ("B", 1, False), ("A", 2, True), ("A", 18, True), ("B", 2, True)):
            kept = positions[way].weight[row].clone()
            positions[way].weight[row] += 1
            assert torch.equal(backend(inputs, INDEX).cls_feat, reference) != matters, (way, row)
            positions[way].weight[row] = kept


def test_images_and_phrases_read_each_other(beit3: list[str], processor):
    backend = build(beit3).eval()
    pictures = synthetic_images(2)
    with torch.no_grad():
        one, other = (
            backend(processor(pictures, [phrase] * 2, [0, 1]), torch.tensor([0, 1])) for phrase in PHRASES[:2]
        )
    assert one.image_feats_index.tolist() == [0, 1]
    assert relative_difference(one.image_feats, other.image_feats) > 1e-2
    assert relative_difference(one.text_feats[0], one.text_feats[1]) > 1e-2


def gradients(backend: Beit3, inputs: CognitionInputs) -> dict[str, Tensor]:
    torch.manual_seed(1)
    features = backend.train()(inputs, INDEX)
    loss = features.image_feats.square().sum() + features.text_feats.square().sum() + features.cls_feat.sum()
    trained = {name: parameter for name, parameter in backend.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("more", [("cognition.drop_path=0.5",), LORA], ids=["full", "lora"])
def test_activation_checkpointing_changes_nothing(beit3: list[str], inputs: CognitionInputs, more: tuple[str, ...]):
    plain = gradients(build(beit3, *more), inputs)
    backend = build(beit3, *more)
    backend.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in backend.model.encoder.layers)
    recomputed = gradients(backend, inputs)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_drop_path_acts_in_training_alone(beit3: list[str], inputs: CognitionInputs):
    dropping, plain = build(beit3, "cognition.drop_path=0.5"), build(beit3)
    assert [layer.drop_path for layer in dropping.model.encoder.layers] == [0.0, 0.5]  # linear from the first layer
    with torch.no_grad():
        reference = plain.eval()(inputs, INDEX).cls_feat
        assert torch.equal(plain.train()(inputs, INDEX).cls_feat, reference)
        assert torch.equal(dropping.eval()(inputs, INDEX).cls_feat, reference)
        dropping.train()
        mean = torch.stack([dropping(inputs, INDEX).cls_feat for _ in range(8)])
    assert (mean != reference).any(dim=-1).any()
    frozen = build(beit3, "cognition.drop_path=0.5", "cognition.tuning=lora", "cognition.lora.r=0").train()
    with torch.no_grad():
        assert torch.equal(frozen(inputs, INDEX).cls_feat, reference)


def test_drop_path_drops_both_ways_of_a_phrase_and_scales_the_kept(beit3: list[str]):
    layer = build(beit3, "cognition.drop_path=0.5").model.encoder.layers[1].train()
    picture, text = torch.zeros(400, 2, 3), torch.zeros(400, 1, 3)
    torch.manual_seed(0)
    picture, text = layer._add(picture, text, torch.ones_like(picture), torch.ones_like(text))
    assert set(picture.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(picture[:, :1], text)
    assert 0.9 < float(picture.mean()) < 1.1


def trained_kinds(backend: Beit3) -> set[str]:
    names = [name.split(".lora_A")[0] for name, p in backend.named_parameters() if p.requires_grad and "lora_A" in name]
    return {name.split(".", 4)[-1] for name in names}


def test_lora_targets_mean_both_ways(beit3: list[str]):
    default = build(beit3, *LORA, wake_lora=False)
    attention = {f"self_attn.{kind}_proj.{way}" for kind in ("q", "k", "v", "out") for way in "AB"}
    assert trained_kinds(default) == attention  # o_proj of the default targets is BEiT-3's out_proj
    assert all("lora_" in name for name, p in default.named_parameters() if p.requires_grad)
    chosen = build(beit3, *LORA, "cognition.lora.targets=[fc1]", wake_lora=False)
    assert trained_kinds(chosen) == {"ffn.A.fc1", "ffn.B.fc1"}
    with pytest.raises(ValueError, match=r"expected names among q_proj, k_proj.*got quatsch"):
        build(beit3, *LORA, "cognition.lora.targets=[q_proj, quatsch]")


def test_lora_at_the_start_is_the_base_model(beit3: list[str], inputs: CognitionInputs):
    with torch.no_grad():
        ours, base = (build(beit3, *more, wake_lora=False).eval()(inputs, INDEX) for more in (LORA, ()))
    for name in ("image_feats", "text_feats", "cls_feat"):
        assert torch.equal(getattr(ours, name), getattr(base, name))


def test_frozen_needs_no_gradient(beit3: list[str], inputs: CognitionInputs):
    backend = build(beit3, "cognition.tuning=lora", "cognition.lora.r=0").train()
    assert not any(parameter.requires_grad for parameter in backend.parameters())
    assert not backend(inputs, INDEX).image_feats.requires_grad


def test_positions_are_resized_on_the_grid():
    table = torch.randn(2 + 1 + 16, 8)
    assert resized_positions(table, 4) is table
    larger = resized_positions(table, 6)
    assert larger.shape == (2 + 1 + 36, 8)
    assert torch.equal(larger[:3], table[:3])
    # the corners of a ramp stay the corners: rows are rows
    ramp = torch.cat([torch.zeros(3), torch.arange(4.0).repeat_interleave(4)])[:, None]
    grid = resized_positions(ramp, 8)[3:, 0].view(8, 8)
    assert (grid.diff(dim=0) > 0).all()
    assert grid.diff(dim=1).abs().max() < 1e-6
    constant = torch.cat([torch.randn(3, 8), torch.full((16, 8), 0.37)])
    assert torch.allclose(resized_positions(constant, 7)[3:], torch.tensor(0.37), atol=1e-6)
    assert resized_positions(table.bfloat16(), 5).dtype == torch.bfloat16


def test_another_image_size(beit3: list[str]):
    more = "cognition.image_size=72"
    backend, processor = build(beit3, more), build_processor(tiny_config(*beit3, more))
    check_cognition_backend(backend, processor, tolerance=1e-5)
    with torch.no_grad():
        assert backend(processor(synthetic_images(1), ["star"], [0]), torch.tensor([0])).image_feats.shape[-2:] == (
            6,
            6,
        )
    with pytest.raises(
        ValueError, match=r"cognition.image_size: expected a positive multiple of the patches' 12 px, got 50"
    ):
        build_processor(tiny_config(*beit3, "cognition.image_size=50"))


CLEANED = {  # some of the public code's; all of them where the fixtures are
    "The man's left-hand side.": "the mans left hand side",
    "guy, (the one with #23)": "guy the one with 23",
    'T-shirt/blue; "front"': "t shirt blue front",
    "  two  spaces ": "  two  spaces ",
    "50% off": "50% off",
    "quote ’curly’": "quote ’curly’",
    "'''": "",
}


def test_phrases_are_cleaned_as_in_the_public_code():
    path = PARITY / "clean_string.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for raw, cleaned in {**CLEANED, **{case["raw"]: case["cleaned"] for case in known}}.items():
        assert clean_phrase(raw) == cleaned


def test_token_ids_are_those_of_xlm_r(processor):
    pieces = processor.tokenizer.encode("the red star", out_type=int)
    assert processor.encode("The red-star!") == [BOS, *(piece + 1 for piece in pieces), EOS]
    assert UNKNOWN in processor.encode("the ☃")
    inputs = processor(synthetic_images(1), ["the red star", "star"], [0, 0])
    assert inputs.input_ids[1, -1] == 1
    assert inputs.token_padding_mask.tolist()[0] == [False] * inputs.input_ids.shape[1]
    assert torch.equal(inputs.text_feature_mask, ~inputs.token_padding_mask)


def test_long_phrases_are_cut_with_one_warning(beit3: list[str], caplog: pytest.LogCaptureFixture):
    processor = build_processor(tiny_config(*beit3, "cognition.max_phrase_tokens=4"))
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        cut = [processor.encode(text) for text in (PHRASES[0], PHRASES[2])]
    assert [len(ids) for ids in cut] == [6, 6]
    assert cut[0][-1] == EOS
    assert cut[0][1:-1] == [piece + 1 for piece in processor.tokenizer.encode(PHRASES[0], out_type=int)[:4]]
    assert caplog.text.count("is cut to cognition.max_phrase_tokens=4") == 1
    assert processor.num_cut == 2


@pytest.mark.parametrize(("phrase", "told"), [("  ", "an empty text"), ("?!", r"got only ! \?, which .* removes")])
def test_unusable_phrases_are_told(processor, phrase: str, told: str):
    with pytest.raises(ValueError, match=told):
        processor(synthetic_images(1), ["star", phrase], [0, 0])


def test_more_tokens_than_positions_are_refused(beit3: list[str]):
    with pytest.raises(ValueError, match="max_phrase_tokens: expected 1 to 60, .*, got 61"):
        build(beit3, "cognition.max_phrase_tokens=61")


@pytest.mark.parametrize("resize", ["antialias", "opencv"])
def test_pictures_are_warped_and_normalised(beit3: list[str], resize: str):
    picture = synthetic_images(1)[0]
    square = torch.from_numpy(warp_picture(picture, 48, resize).copy()).permute(2, 0, 1).double() / 255
    means = {"half": ((0.5,) * 3, (0.5,) * 3), "imagenet": (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB)}
    for name, (mean, std) in means.items():
        processor = Beit3.build_processor(tiny_config(*beit3).cognition, resize=resize, normalisation=name)
        expected = (square - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.allclose(processor.pixels(picture).double(), expected, atol=1e-5)
    assert processor.pixels(Image.new("L", (9, 30))).shape == (3, 48, 48)


def test_a_missing_tokenizer_is_told(beit3: list[str], tmp_path: Path):
    folder = Path(tiny_config(*beit3).cognition.weights)
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.spm"))
    config = tiny_config(*beit3, f"cognition.weights={tmp_path / 'bare'}")
    with pytest.raises(
        ValueError, match=r"expected BEiT-3's tokenizer at .*bare/beit3.spm, got no such file; download"
    ):
        build_processor(config)
    elsewhere = tiny_config(
        *beit3, f"cognition.weights={tmp_path / 'bare'}", f"cognition.tokenizer={folder / 'beit3.spm'}"
    )
    assert build_processor(elsewhere).encode("star")[0] == BOS


def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused(beit3: list[str], tmp_path: Path):
    folder = tmp_path / "beit3"
    shutil.copytree(tiny_config(*beit3).cognition.weights, folder)
    architecture = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**architecture, "vocab_size": 60}))
    with pytest.raises(ValueError, match="expected at most 60 tokens"):
        build_processor(tiny_config(*beit3, f"cognition.weights={folder}"))


def test_other_weights_are_refused(tmp_path: Path, beit3: list[str]):
    config = tiny_config(*beit3, *[one for one in tiny_weights(tmp_path) if "cognition.weights" in one])
    with pytest.raises(ValueError, match="expected the weights of a BEiT-3, got a llava_onevision"):
        Beit3.build(config.cognition, weights=True, dtype=torch.float32)


def test_the_token_for_hidden_patches_is_left_in_the_file(beit3: list[str], tmp_path: Path):
    source = Path(tiny_config(*beit3).cognition.weights)
    shutil.copytree(source, tmp_path / "beit3")
    model = Beit3Model.from_pretrained(source)
    state = {**model.state_dict(), "vision_embed.mask_token": torch.zeros(1, 1, 32)}
    model.save_pretrained(tmp_path / "beit3", state_dict=state)
    build(beit3, f"cognition.weights={tmp_path / 'beit3'}")
    state["encoder.layers.0.extra"] = torch.zeros(1)
    model.save_pretrained(tmp_path / "beit3", state_dict=state)
    with pytest.raises(ValueError, match=r"1 unknown: encoder.layers.0.extra"):
        build(beit3, f"cognition.weights={tmp_path / 'beit3'}")


@pytest.mark.parametrize(("size", "parameters"), [("base", 220_986_624), ("large", 672_701_440)])
def test_shipped_architectures_are_the_published_ones(size: str, parameters: int):
    architecture = architecture_of(f"weights/beit3-{size}-patch16-224")
    with torch.device("meta"):
        model = Beit3Model._from_config(architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    path = PARITY / f"keys_{size[0].upper()}_refcoco.json"
    if path.is_file():
        prefix = "understanding_branch.vis_enc.beit3."
        published = {
            key.removeprefix(prefix): shape
            for key, (shape, _) in json.loads(path.read_text()).items()
            if key.startswith(prefix) and not key.endswith("mask_token")
        }
        assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published


def test_a_run_is_planned_without_weights_and_tokenizer():
    plan = plan_run(load_config("deris-b-refcoco"), gpus=2, stages=("2",))
    assert plan.tokens_per_phrase == 1 + 196 + 11  # nine words and their frame
    assert plan.shared_tokens == 0
    assert sum(part.total for part in plan.parts if part.name.startswith("cognition.")) == 220_986_624
    assert plan.memory[0].activations > 0


def test_in_the_whole_model(beit3: list[str], tmp_path: Path):
    """Image features of P rows through the loopback: batched = one by one, and everything trains."""
    others = [one for one in tiny_weights(tmp_path) if not one.startswith("cognition.")]
    public = ["compat=deris-2025", "loopback.prior_attention=queries", "perception.freeze_backbone=true"]
    config = tiny_config(*others, *beit3, *public)
    model, processor = build_model(config), build_processor(config)
    batch = synthetic_batch(config, processor=processor)
    model.eval()
    with torch.no_grad():
        together = model(batch)
        for phrase, text in enumerate(batch.phrases):
            image = int(batch.image_index[phrase])
            one = replace(
                batch,
                perception_image=batch.perception_image[image : image + 1],
                cognition=processor([synthetic_images(2)[image]], [text], [0]),
                image_index=torch.tensor([0]),
                phrases_per_image=(1,),
                phrase_ids=(batch.phrase_ids[phrase],),
                phrases=(text,),
                targets=None,
            )
            alone = model(one)
            assert relative_difference(alone.final.mask_logits[0], together.final.mask_logits[phrase]) < 1e-4
            assert relative_difference(alone.presence_logit[0], together.presence_logit[phrase]) < 1e-4
    model.train()
    build_criterion(config)(model(batch), batch.targets).total.backward()
    trainable = set(trainable_names(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert sum(name.startswith("cognition.") for name in trainable) == len(list(model.cognition.parameters()))
