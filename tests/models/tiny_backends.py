"""Tiny random weights of the other cognition backends; `deris_llm.testing` has those of LLaVA-OneVision."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import torch
from sentencepiece import SentencePieceTrainer
from transformers import (
    AutoConfig,
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLForConditionalGeneration,
    ViltConfig,
    ViltForMaskedLM,
)

from deris_llm.models.beit3_config import Beit3Config
from deris_llm.models.cognition.beit3 import TOKENIZER_FILE, Beit3Model
from deris_llm.testing import CORPUS, tiny_qwen_tokenizer


def tiny_beit3(folder: Path) -> list[str]:
    """Writes a tiny BEiT-3 with random weights and a tokenizer of its own.

    Returns:
        overrides for `tiny_config` that make it the cognition backend, all of it trained.
    """
    tokenizer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=tokenizer, vocab_size=100, model_type="bpe", minloglevel=2
    )
    config = Beit3Config(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=48,
        patch_size=12, max_text_positions=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Beit3Model(config)
        for parameter in model.parameters():  # larger than fresh ones, so that differences show
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder / "beit3")
    (folder / "beit3" / TOKENIZER_FILE).write_bytes(tokenizer.getvalue())
    return [
        "cognition.backend=beit3",
        f"cognition.weights={folder / 'beit3'}",
        "cognition.tuning=full",
    ]


def tiny_qwen_vl_weights(folder: Path, model_type: str = "qwen2_5_vl") -> list[str]:
    """Writes a tiny Qwen-VL with random weights, its tokenizer and its image processor.

    Args:
        folder: to write to.
        model_type: qwen2_vl, qwen2_5_vl or qwen3_vl; of the last, patches have 4 px instead of 3.

    Returns:
        overrides for `tiny_config`, on top of those of `tiny_weights`.
    """
    tokenizer = tiny_qwen_tokenizer("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    vocabulary = tokenizer.get_vocab()
    width, heads = 32, 4
    text = {
        "vocab_size": len(vocabulary), "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 2, "num_heads": heads, "patch_size": 3}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": width, "hidden_size": width, "mlp_ratio": 2}
    elif model_type == "qwen2_5_vl":
        # windows of 2 x 2 merged tokens in the first layer, the whole picture in the second
        vision |= {"hidden_size": width, "out_hidden_size": width, "intermediate_size": 64, "window_size": 12,
                   "fullatt_block_indexes": [1]}  # fmt: skip
    else:
        vision |= {"hidden_size": width, "out_hidden_size": width, "intermediate_size": 64, "patch_size": 4,
                   "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
        text |= {"head_dim": width // heads, "rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True}}
    kind = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }[model_type]
    config = AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=vision,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(cast(Any, config)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=vision["patch_size"], merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [
        "cognition.backend=qwen_vl",
        f"cognition.weights={folder}",
        "cognition.min_pixels=900",
        "cognition.max_pixels=2400",
        "cognition.grid=6",
    ]


def tiny_bert_weights(folder: Path) -> list[str]:
    """Writes a tiny BERT with random weights, as published with its pre-training heads, and its tokenizer.

    Returns:
        overrides for `tiny_config`, on top of those of `tiny_weights`.
    """
    tokenizer = BertTokenizer().train_new_from_iterator(CORPUS, vocab_size=200)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["cognition.backend=bert", f"cognition.weights={folder}", "cognition.max_phrase_tokens=20"]


def tiny_vilt_weights(folder: Path) -> list[str]:
    """Writes a tiny ViLT with random weights, as published with its pre-training head, tokenizer, image processor.

    Returns:
        overrides for `tiny_config`, on top of those of `tiny_weights`.
    """
    tokenizer = BertTokenizer().train_new_from_iterator(CORPUS, vocab_size=200)
    config = ViltConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, image_size=24, patch_size=6,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViltForMaskedLM(config)
        torch.nn.init.normal_(model.vilt.embeddings.position_embeddings, std=0.02)  # zero where transformers makes it
        model.save_pretrained(folder)
    preprocessor = {"image_processor_type": "ViltImageProcessor", "size": 24, "size_divisor": 6}  # as published
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return [
        "cognition.backend=vilt",
        f"cognition.weights={folder}",
        "cognition.max_phrase_tokens=20",
        "cognition.grid=6",
    ]
