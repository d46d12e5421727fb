"""A checkpoint in use: what the pipeline reads, what it answers, and what it says to bad input."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import deris_llm
from deris_llm import DerisPipeline
from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
from deris_llm.checkpoints.layout import CheckpointError, find_checkpoint
from deris_llm.checkpoints.save import save_full_checkpoint, save_weights
from deris_llm.config import save_config
from deris_llm.models.deris import build_model
from deris_llm.serving.pipeline import as_picture
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3

PHRASES = ["red circle", "the small blue square on the left", "star", "a green ring behind the large triangle", "ring"]


def moved_model(config, seed=3):
    """A model whose trained tensors, LoRA too, are away from where they start."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return tiny_config(*tiny_weights(folder), "evaluation.score_threshold=0.4", "evaluation.images_per_device=3")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The folder of a run: two checkpoints and the best."""
    output = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("checkpoint-2", "checkpoint-10", "best")):
        save_weights(output / name, moved_model(config, seed), config, {})
    save_config(config, output / "config.yaml")
    return output


@pytest.fixture(scope="module")
def pipeline(run):
    return DerisPipeline.from_pretrained(run)


@pytest.fixture(scope="module")
def picture():
    return synthetic_images(1)[0]


def same(ours, theirs):
    np.testing.assert_allclose(ours.referring_scores, theirs.referring_scores, atol=1e-5)
    assert ours.presence == pytest.approx(theirs.presence, abs=1e-5)
    assert ours.query_index == theirs.query_index
    assert ours.mask.shape == theirs.mask.shape
    assert (ours.mask != theirs.mask).mean() < 1e-3  # a pixel whose logit is 0 may fall to either side


def test_what_an_answer_holds(pipeline, picture):
    answers = pipeline(picture, PHRASES)
    assert len(answers) == len(PHRASES)
    for answer in answers:
        assert answer.mask.shape == (60, 80)
        assert answer.mask.dtype == bool
        assert answer.instance_masks.shape == (len(answer.query_index), 60, 80)
        assert answer.says_target
        assert list(answer.instance_scores) == sorted(answer.instance_scores, reverse=True)
        assert answer.score == pytest.approx(answer.referring_scores.max())
        np.testing.assert_array_equal(answer.mask, answer.instance_masks.any(axis=0))


def test_together_is_one_by_one(pipeline, picture):
    for together, phrase in zip(pipeline(picture, PHRASES), PHRASES, strict=True):
        same(together, pipeline(picture, [phrase])[0])


def test_many_pictures_are_batched_within_the_bounds(run):
    pictures = [*synthetic_images(3), *synthetic_images(2, seed=7, size=(48, 100))]
    pairs = [(picture, PHRASES[: number + 1]) for number, picture in enumerate(pictures)]
    small = DerisPipeline.from_pretrained(run, overrides=["evaluation.max_phrases_per_batch=4"])
    sizes = []
    forward = small.model.forward
    small.model.forward = lambda batch: sizes.append((len(batch.perception_image), batch.num_phrases)) or forward(batch)
    found = list(small.answer_all(pairs))
    # 1 + 2 phrases; 3; 4; 4 of the last picture's 5; the one that is left
    assert sizes == [(2, 3), (1, 3), (1, 4), (1, 4), (1, 1)]
    assert [len(answers) for answers in found] == [1, 2, 3, 4, 5]
    for answers, (picture, phrases) in zip(found, pairs, strict=True):
        for ours, theirs in zip(answers, small(picture, phrases), strict=True):
            same(ours, theirs)


def test_phrases_are_split_by_their_tokens(run, pipeline, picture):
    counts = pipeline.processor.count_tokens(PHRASES, [(60, 80)] * len(PHRASES))
    shared, own = counts[0].shared, [count.own for count in counts]
    limit = shared + max(own[0] + own[1], own[2] + own[3])
    assert limit < shared + sum(own[:3])
    tight = DerisPipeline.from_pretrained(run, overrides=[f"data.max_tokens_per_image={limit}"])
    batches = []
    forward = tight.model.forward
    tight.model.forward = lambda batch: batches.append(batch) or forward(batch)
    found = tight(picture, PHRASES)
    assert [batch.image_index.tolist() for batch in batches] == [[0, 0, 1, 1, 2]]  # copies of the picture
    (batch,) = batches
    tokens = (~batch.cognition.token_padding_mask).sum(dim=1) - shared
    assert tokens.tolist() == own
    assert (shared + torch.zeros(3, dtype=torch.long).index_add(0, batch.image_index, tokens)).max() == limit
    for ours, theirs in zip(found, pipeline(picture, PHRASES), strict=True):
        same(ours, theirs)
    tight = DerisPipeline.from_pretrained(run, overrides=[f"data.max_tokens_per_image={shared + max(own)}"])
    with pytest.raises(ValueError, match=rf"got \d+ tokens for '{PHRASES[3]} and a star' \({shared} of them shared\)"):
        tight(picture, [PHRASES[0], f"{PHRASES[3]} and a star"])


def test_a_limit_of_tokens_asks_for_a_processor_that_counts(pipeline):
    data = dataclasses.replace(pipeline.config.data, max_tokens_per_image=100)
    with pytest.raises(ValueError, match="expected a cognition backend whose processor counts tokens"):
        DerisPipeline(dataclasses.replace(pipeline.config, data=data), pipeline.model, pipeline.processor.__call__)


def test_answers_come_while_pictures_are_read(pipeline, picture):
    read = []

    def pairs():
        for number in range(9):
            read.append(number)
            yield picture, ["ring"]

    next(pipeline.answer_all(pairs()))
    assert read == [0, 1, 2, 3]  # a batch holds three
    assert list(pipeline.answer_all([])) == []


def test_a_file_a_picture_and_an_array_are_the_same(pipeline, picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    answers = [
        pipeline(image, ["star"])[0]
        for image in (picture, np.asarray(picture), tmp_path / "picture.png", str(tmp_path / "picture.png"))
    ]
    for answer in answers[1:]:
        same(answer, answers[0])


def test_a_picture_in_memory_is_read_as_its_file_is(tmp_path):
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    clear = np.zeros((64, 64, 4), dtype=np.uint8)
    for number, image in enumerate((Image.fromarray(grey), Image.fromarray(clear), Image.fromarray(clear[..., 0]))):
        image.save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(np.asarray(as_picture(image)), np.asarray(as_picture(tmp_path / f"{number}.png")))
    assert np.asarray(as_picture(Image.fromarray(clear))).min() == 255  # what is transparent lies on white
    with pytest.raises(ValueError, match="got floating-point values"):
        as_picture(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))


def test_the_best_of_a_run_or_its_newest(run, tmp_path):
    assert find_checkpoint(run).folder == run / "best"
    assert find_checkpoint(run / "checkpoint-2").folder == run / "checkpoint-2"
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    assert find_checkpoint(tmp_path / "run").folder == tmp_path / "run" / "checkpoint-10"
    assert checkpoint_fingerprint(run / "best") != checkpoint_fingerprint(run / "checkpoint-10")
    assert checkpoint_fingerprint(tmp_path / "run" / "checkpoint-10") == checkpoint_fingerprint(run / "checkpoint-10")


def test_settings_win_over_those_of_the_checkpoint(run, picture):
    pipeline = DerisPipeline.from_pretrained(run, score_threshold=0.99, selection="threshold", presence="gate")
    assert pipeline.config.evaluation.score_threshold == 0.99
    (answer,) = pipeline(picture, ["ring"])
    assert not answer.says_target
    assert not answer.mask.any()
    assert answer.instance_masks.shape == (0, 60, 80)
    assert answer.instance_scores == ()
    assert answer.score > 0


def test_in_bf16(run, pipeline, picture):
    half = DerisPipeline.from_pretrained(run, dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    ours, theirs = half(picture, ["star"])[0], pipeline(picture, ["star"])[0]
    np.testing.assert_allclose(ours.referring_scores, theirs.referring_scores, atol=0.05)  # measured 0.004
    with pytest.raises(
        ValueError, match=r"dtype: expected torch\.float32, torch\.bfloat16 or None, got torch\.float16"
    ):
        DerisPipeline.from_pretrained(run, dtype=torch.float16)


def test_a_full_checkpoint(config, run, pipeline, picture, tmp_path):
    save_full_checkpoint(tmp_path / "full", moved_model(config, seed=2), config)
    for ours, theirs in zip(
        DerisPipeline.from_pretrained(tmp_path / "full")(picture, PHRASES), pipeline(picture, PHRASES), strict=True
    ):
        same(ours, theirs)


@pytest.mark.parametrize("kind", ["full", "run"])
def test_attention_over_the_batch_is_read_as_over_itself(tmp_path, picture, kind):
    config = tiny_config(*tiny_weights(tmp_path), *tiny_beit3(tmp_path), "loopback.prior_attention=batch")
    model = moved_model(config)
    if kind == "full":
        save_full_checkpoint(tmp_path / "it", model, config)
    else:
        save_weights(tmp_path / "it", model, config, {})
    pipeline = DerisPipeline.from_pretrained(tmp_path / "it")
    for together, phrase in zip(pipeline(picture, PHRASES), PHRASES, strict=True):
        same(together, pipeline(picture, [phrase])[0])
    as_trained = DerisPipeline(config, model, pipeline.processor)
    same(pipeline(picture, PHRASES)[2], as_trained(picture, [PHRASES[2]])[0])


@pytest.mark.parametrize(
    ("phrases", "said"),
    [
        ([], "expected at least one for an image, got none"),
        (" ", r"phrases\[0\]: expected some words, got ' '; correct or drop"),
        (["ring", " "], r"phrases\[1\]: expected some words, got ' ' beside 1 others"),
        (["ring", None], r"phrases\[1\]: expected some words, got None"),
        (["ring <image>"], "got the model's special token '<image>' in it"),
    ],
)
def test_phrases_that_cannot_be_asked(pipeline, picture, phrases, said):
    with pytest.raises(ValueError, match=said):
        pipeline(picture, phrases)


def test_one_phrase_has_one_answer(pipeline, picture):
    answer = pipeline(picture, "star")
    assert answer.phrase == "star"
    same(answer, pipeline(picture, ["star"])[0])
    with pytest.raises(ValueError, match=r"expected a list of texts, got one text; give \['star'\]"):
        list(pipeline.answer_all([(picture, "star")]))  # many images are asked by lists


def test_a_phrase_that_is_too_long_is_cut(pipeline, picture, caplog):
    (answer,) = pipeline(picture, ["red circle " * 500])
    assert answer.mask.shape == (60, 80)
    assert "is cut to cognition.max_phrase_tokens=" in caplog.text


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), r"got float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), dtype=np.uint8), r"got uint8 \(4, 4\)"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"expected an array uint8 \(h, w, 3\)"),
        (np.zeros((4, 0, 3), dtype=np.uint8), r"got uint8 \(4, 0, 3\)"),
        (7, "expected a path, a PIL image or a numpy array, got int"),
    ],
)
def test_arrays_that_are_no_pictures(array, said):
    with pytest.raises(ValueError, match=said):
        as_picture(array)


def test_files_that_are_no_pictures(pipeline, picture, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("no picture")
    picture.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    picture.save(tmp_path / "whole.png")
    for name in ("nowhere.jpg", "text.jpg", "cut.jpg", ""):
        with pytest.raises(ValueError, match=r"expected .*image"):
            pipeline(tmp_path / name, ["ring"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.png"):
        pipeline(tmp_path / "whole.png", ["ring"])


def test_folders_that_are_no_checkpoints(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").write_text("")
    shutil.copytree(run / "best", tmp_path / "half", ignore=shutil.ignore_patterns("checksums.json"))
    (tmp_path / "half" / "base_weights.json").unlink()
    for folder, said in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "other", r"expected a checkpoint folder with config\.yaml.*got no .*there is weights\.bin"),
        (tmp_path / "other" / "weights.bin", "there is only a file of that name"),
        (
            tmp_path / "half",
            r"got no base_weights\.json in it: there is config\.yaml, metrics\.json, protocol\.json, trainable",
        ),
    ):
        with pytest.raises(CheckpointError, match=said):
            DerisPipeline.from_pretrained(folder)


def test_a_checkpoint_cannot_name_code_and_a_missing_plugin_is_named(run, tmp_path):
    for name, said in (
        ("antigravity:Class", r"got the module path 'antigravity:Class', which could run any code"),
        ("somebody_elses", r"install the package that brings it"),
    ):
        folder = shutil.copytree(
            run / "best", tmp_path / name.replace(":", "_"), ignore=shutil.ignore_patterns("checksums.json")
        )
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("backend: qwen2_ov", f"backend: {name}"))
        with pytest.raises(ValueError, match=said):
            DerisPipeline.from_pretrained(folder)


def test_a_config_of_other_trained_parts_is_refused(run, tmp_path):
    folder = shutil.copytree(run / "best", tmp_path / "best", ignore=shutil.ignore_patterns("checksums.json"))
    tensors = safetensors.torch.load_file(folder / "trainable.safetensors")
    del tensors["loopback.presence_head.weight"]
    safetensors.torch.save_file(tensors, folder / "trainable.safetensors")
    with pytest.raises(CheckpointError, match=r"missing in the file: loopback\.presence_head\.weight"):
        DerisPipeline.from_pretrained(folder)


def test_out_of_memory_names_what_lowers_it(run, picture, monkeypatch):
    pipeline = DerisPipeline.from_pretrained(run)

    def fails(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pipeline.model, "forward", fails)
    with pytest.raises(ValueError, match=r"evaluation ran out of memory[\s\S]*evaluation\.max_phrases_per_batch="):
        pipeline(picture, PHRASES)


def test_importing_the_package_stays_cheap():
    script = "import sys, deris_llm; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        deris_llm.Pipeline  # noqa: B018


UNUSED = ("peft", "timm", "datasets", "deepspeed", "qwen_vl_utils", "tensorboard")
"""Libraries that an answer of a BEiT-3 needs nothing of."""


def test_importing_the_pipeline_imports_torch_alone():
    script = (
        "import sys, deris_llm.serving.pipeline\n"
        f"print([name for name in ('transformers', 'scipy', 'torchvision', 'accelerate', *{UNUSED!r}) if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_answer_imports_no_library_that_it_does_not_use(config, tmp_path):
    tiny = tiny_config(
        "cognition.tuning=full", f"perception.weights={config.perception.weights}", *tiny_beit3(tmp_path / "weights")
    )
    save_full_checkpoint(tmp_path / "full", build_model(tiny), tiny)
    synthetic_images(1)[0].save(tmp_path / "image.png")
    script = (
        "import sys\n"
        "from deris_llm.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        f"print([name for name in {UNUSED!r} if name in sys.modules])"
    )
    command = ["predict", "--checkpoint", "full", "--image", "image.png", "--phrase", "star", "--out", "out"]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
