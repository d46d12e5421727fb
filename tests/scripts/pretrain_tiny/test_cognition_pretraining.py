"""Questions about scenes: tokenised, and packed behind their image."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from scripts.pretrain_tiny.cognition import (
    build_model,
    build_processor,
    build_tokenizer,
    packed_hidden_states,
    tokenizer_corpus,
    vision_features,
)
from scripts.pretrain_tiny.pool import ScenePool, write_pool
from scripts.pretrain_tiny.questions import (
    IGNORED,
    LOCATION_TOKENS,
    NUM_CELLS,
    PROMPT_TEMPLATE,
    TASKS,
    build_question_bank,
    draw_questions,
    pack,
    scene_geometry,
)

ROW_LENGTH = 300


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder / "train", num_scenes=4, seed=5, workers=1)
    return folder


@pytest.fixture(scope="module")
def pool(pool_folder):
    return ScenePool(pool_folder / "train")


@pytest.fixture(scope="module")
def geometry(pool):
    return scene_geometry(pool.instance_ids, max_objects=max(len(record["objects"]) for record in pool.records))


@pytest.fixture(scope="module")
def tokenizer(pool, geometry):
    return build_tokenizer(tokenizer_corpus(pool, geometry))


@pytest.fixture(scope="module")
def bank(pool, geometry, tokenizer):
    return build_question_bank(pool.records, geometry, tokenizer, seed=3)


def drawn(bank, scenes):
    room = ROW_LENGTH - bank.prefix_length
    return [draw_questions(bank, scene, room=room, rng=np.random.default_rng(scene)) for scene in scenes]


def test_geometry_counts_the_visible_pixels(pool, geometry):
    ids = np.asarray(pool.instance_ids[1])
    for index in range(len(pool.records[1]["objects"])):
        rows, columns = np.nonzero(ids == index + 1)
        slow = np.zeros(NUM_CELLS, int)
        for row, column in zip(rows, columns, strict=True):
            slow[int((row + 0.5) / 12.8) * 10 + int((column + 0.5) / 12.8)] += 1
        assert np.array_equal(geometry.coverage[1, index + 1], slow)
        centre = ((columns + 0.5).mean() / 128, (rows + 0.5).mean() / 128)
        np.testing.assert_allclose(geometry.centres[1, index], centre, atol=1e-6)


def test_words_and_location_tokens_are_single_tokens(tokenizer, pool):
    colours = {scene_object["colour"] for record in pool.records for scene_object in record["objects"]}
    assert all(len(tokenizer.encode(f" {colour}")) == 1 for colour in colours)
    assert tokenizer.encode("<loc_37><none>") == tokenizer.convert_tokens_to_ids(["<loc_37>", "<none>"])


def test_processor_round_trip_and_chat_template(tokenizer, tmp_path):
    build_processor(tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "Where is red mug?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == PROMPT_TEMPLATE.format(question="Where is red mug?")
    assert processor.tokenizer.encode(prompt) == tokenizer.encode(prompt)
    batch = processor(images=np.zeros((90, 140, 3), np.uint8), text=prompt, return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == (120, 120)


def test_labels_spell_the_answers(bank, tokenizer, pool, geometry):
    batch = pack(bank, drawn(bank, range(4)), length=ROW_LENGTH)
    asked = zip(
        batch.question_rows.tolist(),
        batch.question_positions.tolist(),
        batch.question_ids.tolist(),
        batch.question_lengths.tolist(),
        strict=True,
    )
    num_grounding = 0
    for row, position, question, length in asked:
        answer = tokenizer.decode(batch.labels[row, position : position + length])
        assert answer.endswith("<|im_end|>")
        assert tokenizer.decode(batch.input_ids[row, position - 1 : position + 1]) == "assistant\n"
        if bank.tasks[question] == TASKS.index("ground"):
            num_grounding += 1
            assert answer == LOCATION_TOKENS[geometry.centre_cells[row, bank.targets[question]]] + "<|im_end|>"
    assert num_grounding > 10
    assert int((batch.labels != IGNORED).sum()) == int(batch.question_lengths.sum())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_questions_equal_questions_alone(bank, tokenizer, attention):
    """Measured worst difference 2e-6; a boolean mask under eager attention, which masks nothing, gave 5."""
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    model.set_attn_implementation(attention)
    features = vision_features(model, torch.randn(1, 3, 120, 120))
    image = model.model.multi_modal_projector(features)
    start = len(bank.prefix_before)
    batch = pack(bank, drawn(bank, range(1)), length=ROW_LENGTH)
    packed, _ = packed_hidden_states(model, image, batch, image_start=start)
    for row, position, question in zip(
        batch.question_rows.tolist(), batch.question_positions.tolist(), batch.question_ids.tolist(), strict=True
    ):
        alone = pack(bank, [[question]], length=160)
        hidden, _ = packed_hidden_states(model, image[row : row + 1], alone, image_start=start)
        torch.testing.assert_close(hidden[0, alone.question_positions[0]], packed[row, position], atol=2e-5, rtol=0)
