"""Small models as the hub has them: names, configs, tokenizers and processors that transformers 4 and its forerunners wrote.

The published name of each tensor follows from our own by a few rules, written here without transformers' conversion. At
full size the rules give exactly the names and shapes of the published files (`tests/golden/hub_layouts.json`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlavaOnevisionModel, PreTrainedModel, Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel

from deris_llm.models.cognition.bert import BertWithoutPooler
from deris_llm.models.cognition.vilt import OrderedVilt
from deris_llm.models.perception.mask2former import _Mask2FormerParts
from deris_llm.testing import tiny_weights
from tests.models.tiny_backends import tiny_bert_weights, tiny_qwen_vl_weights, tiny_vilt_weights

Shapes = dict[str, tuple[int, ...]]


class Family(NamedTuple):
    """How one kind of model is published."""

    kind: type[PreTrainedModel]
    rules: tuple[tuple[str, Any], ...]  # our name -> published name: regular expression and replacement, each once
    more: Callable[[Shapes], Shapes]  # published shapes -> what the files hold besides
    config: Mapping[str, Any]  # config.json of a small one, in its published form
    preprocessor: Mapping[str, Any] | None = None

    def published(self, name: str) -> str:
        """The name in the published file."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    def shapes(self, config: Any) -> tuple[dict[str, str], Shapes]:
        """Our name -> published name, and the shapes of a whole published file."""
        with torch.device("meta"):
            ours = self.kind(config).state_dict()
        names = {name: self.published(name) for name in ours}
        shapes = {names[name]: tuple(tensor.shape) for name, tensor in ours.items()}
        assert len(shapes) == len(ours)
        return names, shapes | self.more(shapes)


def _of_mask2former(shapes: Shapes) -> Shapes:
    tables = {name: shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")}
    more: Shapes = {}
    for name, (entries, _) in tables.items():
        cells = ((int(entries**0.5) + 1) // 2) ** 2
        more[name.replace("bias_table", "index")] = (cells, cells)
    width = shapes["model.transformer_module.queries_embedder.weight"][1]
    classes = 4 if width == 32 else 81
    more |= {"class_predictor.weight": (classes, width), "class_predictor.bias": (classes,)}
    return more | {"criterion.empty_weight": (classes,)}


def _of_bert(shapes: Shapes) -> Shapes:
    words, width = shapes["bert.embeddings.word_embeddings.weight"]
    return {
        "bert.pooler.dense.weight": (width, width), "bert.pooler.dense.bias": (width,),
        "cls.predictions.bias": (words,), "cls.predictions.decoder.weight": (words, width), "cls.predictions.decoder.bias": (words,),
        "cls.predictions.transform.dense.weight": (width, width), "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.transform.LayerNorm.gamma": (width,), "cls.predictions.transform.LayerNorm.beta": (width,),
        "cls.seq_relationship.weight": (2, width), "cls.seq_relationship.bias": (2,),
    }  # fmt: skip


def _of_vilt(shapes: Shapes) -> Shapes:
    words, width = shapes["vilt.embeddings.text_embeddings.word_embeddings.weight"]
    return {
        "vilt.pooler.dense.weight": (width, width), "vilt.pooler.dense.bias": (width,),
        "mlm_score.bias": (words,), "mlm_score.decoder.weight": (words, width), "mlm_score.decoder.bias": (words,),
        "mlm_score.transform.dense.weight": (width, width), "mlm_score.transform.dense.bias": (width,),
        "mlm_score.transform.LayerNorm.weight": (width,), "mlm_score.transform.LayerNorm.bias": (width,),
    }  # fmt: skip


def _head_of(table: str, head: str) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {head: shapes[table]}


_QWEN_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "initializer_range": 0.02,
    "use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2, "attention_dropout": 0.0, "use_cache": True,
}  # fmt: skip
_OLD_MROPE = {
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_PATCHES = {"patch_size": 3, "temporal_patch_size": 2, "merge_size": 2}
_OLD_QWEN_RULES = ((r"^language_model\.", "model."),)
FAMILIES = {
    "mask2former": Family(
        _Mask2FormerParts,
        (
            (r"^", "model."), (r"\.encoder\.swin\.", ".encoder."),
            (r"(\.blocks\.\d+\.)attention\.([qkv])_proj\.",
             lambda m: f"{m[1]}attention.self.{ {'q': 'query', 'k': 'key', 'v': 'value'}[m[2]] }."),
            (r"(\.blocks\.\d+\.)attention\.o_proj\.", r"\1attention.output.dense."),
            (r"attention\.relative_position_bias\.", "attention.self."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
        ),  # fmt: skip
        _of_mask2former,
        {
            "architectures": ["Mask2FormerForUniversalSegmentation"], "model_type": "mask2former", "activation_function": "relu",
            "backbone_config": {
                "architectures": ["SwinForImageClassification"], "attention_probs_dropout_prob": 0.0, "depths": [1, 1, 2, 1],
                "drop_path_rate": 0.3, "embed_dim": 8, "encoder_stride": 32, "hidden_act": "gelu", "hidden_size": 64,
                "image_size": 224, "mlp_ratio": 4.0, "model_type": "swin", "num_channels": 3, "num_heads": [1, 2, 2, 4],
                "num_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"], "patch_size": 4, "path_norm": True,
                "qkv_bias": True, "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"], "torch_dtype": "float32",
                "use_absolute_embeddings": False, "window_size": 7,
            },
            "class_weight": 2.0, "common_stride": 4, "decoder_layers": 5, "dice_weight": 5.0, "dim_feedforward": 64,
            "dropout": 0.0, "encoder_feedforward_dim": 64, "encoder_layers": 2, "enforce_input_projection": False,
            "feature_size": 32, "feature_strides": [4, 8, 16, 32], "hidden_dim": 32, "id2label": {"0": "a", "1": "b", "2": "c"},
            "ignore_value": 255, "importance_sample_ratio": 0.75, "init_std": 0.02, "init_xavier_std": 1.0, "mask_feature_size": 32,
            "mask_weight": 5.0, "no_object_weight": 0.1, "num_attention_heads": 4, "num_hidden_layers": 5, "num_queries": 12,
            "output_auxiliary_logits": None, "oversample_ratio": 3.0, "pre_norm": False, "train_num_points": 12544,
            "torch_dtype": "float32", "transformers_version": "4.26.0.dev0", "use_auxiliary_loss": True,
        },
    ),
    "qwen2_ov": Family(
        LlavaOnevisionModel,
        ((r"^vision_tower\.", "vision_tower.vision_model."), (r"^language_model\.", "language_model.model.")),
        _head_of("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "ignore_index": -100, "image_grid_pinpoints": [[48, 96]],
            "model_type": "llava_onevision", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "text_config": {**_QWEN_TEXT, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"},
            "torch_dtype": "float16", "transformers_version": "4.45.0.dev0", "use_image_newline_parameter": True,
            "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "vision_config": {
                "hidden_size": 32, "image_size": 48, "intermediate_size": 64, "model_type": "siglip_vision_model",
                "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 12, "vision_use_head": False,
            },
        },
    ),
    "qwen2_vl": Family(
        Qwen2VLModel, _OLD_QWEN_RULES, _head_of("model.embed_tokens.weight", "lm_head.weight"),
        {
            **_QWEN_TEXT, **_OLD_MROPE, "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
            "transformers_version": "4.41.2",
            "vision_config": {
                "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 4, "in_chans": 3, "hidden_size": 32, "patch_size": 3,
                "spatial_merge_size": 2, "spatial_patch_size": 3, "temporal_patch_size": 2,
            },
        },
        {**_PATCHES, **_OPENAI, "min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor",
         "processor_class": "Qwen2VLProcessor"},
    ),
    "qwen2_5_vl": Family(
        Qwen2_5_VLModel, _OLD_QWEN_RULES, _head_of("model.embed_tokens.weight", "lm_head.weight"),
        {
            **_QWEN_TEXT, **_OLD_MROPE, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "transformers_version": "4.41.2",
            "vision_config": {
                "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "in_chans": 3,
                "out_hidden_size": 32, "patch_size": 3, "spatial_merge_size": 2, "spatial_patch_size": 3, "window_size": 12,
                "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
            },
        },
        {**_PATCHES, **_OPENAI, "min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor",
         "processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen3_vl": Family(
        Qwen3VLModel, ((r"^", "model."),), _head_of("model.language_model.embed_tokens.weight", "lm_head.weight"),
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": False,
            "text_config": {
                "attention_bias": False, "dtype": "bfloat16", "head_dim": 8, "hidden_act": "silu", "hidden_size": 32,
                "intermediate_size": 64, "max_position_embeddings": 512, "model_type": "qwen3_vl_text", "num_attention_heads": 4,
                "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [1, 1, 2], "rope_type": "default"},
            },
            "transformers_version": "4.57.0.dev0",
            "vision_config": {
                "deepstack_visual_indexes": [0], "depth": 2, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "in_channels": 3,
                "intermediate_size": 64, "model_type": "qwen3_vl", "num_heads": 4, "num_position_embeddings": 64,
                "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
        },
        {**_PATCHES, "patch_size": 4, "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_mean": [0.5, 0.5, 0.5],
         "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"},
    ),
    "vilt": Family(
        OrderedVilt, ((r"^", "vilt."),), _of_vilt,
        {
            "architectures": ["ViltForMaskedLM"], "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
            "hidden_size": 32, "image_size": 24, "initializer_range": 0.02, "intermediate_size": 64, "layer_norm_eps": 1e-12,
            "max_image_length": -1, "max_position_embeddings": 24, "modality_type_vocab_size": 2, "model_type": "vilt",
            "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 2, "num_images": -1, "patch_size": 6, "qkv_bias": True,
            "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.16.0.dev0", "type_vocab_size": 2,
        },
        {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViltFeatureExtractor", "image_mean": [0.5, 0.5, 0.5],
         "image_std": [0.5, 0.5, 0.5], "resample": 3, "size": 24, "size_divisor": 6},
    ),
    "bert": Family(
        BertWithoutPooler,
        ((r"^", "bert."), (r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")),
        _of_bert,
        {
            "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
            "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 4,
            "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
            "type_vocab_size": 2, "use_cache": True,
        },
    ),
}  # fmt: skip
HUB_IDS = {
    "facebook/mask2former-swin-tiny-coco-instance": "mask2former",
    "facebook/mask2former-swin-small-coco-instance": "mask2former",
    "facebook/mask2former-swin-base-coco-instance": "mask2former",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "qwen2_ov",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": "qwen2_ov",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "dandelin/vilt-b32-mlm": "vilt",
    "google-bert/bert-base-uncased": "bert",
}


def write_published(family: str, folder: Path) -> tuple[list[str], dict[str, str], dict[str, Tensor]]:
    """Writes the small files of a small model; the weights are for the test to write.

    Returns:
        overrides for `tiny_config`, our name -> published name, the tensors by their published names (float32, drawn).
    """
    described = FAMILIES[family]
    overrides = tiny_weights(folder / "others")
    if family == "mask2former":
        folder.joinpath("published").mkdir()
        overrides += [f"perception.weights={folder / 'published'}", "loopback.num_queries=10"]
    elif family == "qwen2_ov":
        (folder / "others" / "llava").rename(folder / "published")
        overrides += [f"cognition.weights={folder / 'published'}"]
    else:
        write = {"bert": tiny_bert_weights, "vilt": tiny_vilt_weights}.get(family)
        of_family = tiny_qwen_vl_weights(folder / "published", family) if write is None else write(folder / "published")
        overrides += of_family
    folder = folder / "published"
    for file in ("model.safetensors", "config.json", "preprocessor_config.json", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    config = dict(described.config)
    if family != "mask2former":
        config = _with_vocabulary(config, _publish_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config))
    if described.preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(described.preprocessor))
    names, shapes = described.shapes(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors:
        if name.endswith("relative_position_index"):
            tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.long)
    return [*overrides, "cognition.lora.r=0"], names, tensors


def _publish_tokenizer(folder: Path) -> dict[str, int]:
    """Rewrites a tokenizer that transformers 5 saved as the published folders have it; returns its vocabulary."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    for file in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    words, added = whole["model"]["vocab"], {token["content"]: token["id"] for token in whole["added_tokens"]}
    if whole["model"]["type"] == "WordPiece":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.get)))
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
        return words | added
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in whole["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False, "added_tokens_decoder": decoder, "bos_token": None, "clean_up_tokenization_spaces": False,
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>", "errors": "replace",
                "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
                "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
            }
        )
    )  # fmt: skip
    return words | added


def _with_vocabulary(config: dict[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    numbers = {
        "llava_onevision": {"image_token_index": "<image>", "video_token_index": "<video>"},
        "bert": {}, "vilt": {},
    }.get(config["model_type"], {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    })  # fmt: skip
    config = config | {key: vocabulary[token] for key, token in numbers.items()}
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | {"vocab_size": len(vocabulary)}}
    return config | {"vocab_size": len(vocabulary)}


def write_weights(folder: Path, tensors: Mapping[str, Tensor], form: str) -> list[Path]:
    """Writes weights as `safetensors`, `bin`, `legacy bin` (before torch 1.6), `3 safetensors` or `3 bin` (with an index)."""
    number = 3 if form.startswith("3 ") else 1
    stem, suffix = ("model", "safetensors") if form.endswith("safetensors") else ("pytorch_model", "bin")
    files: list[Path] = []
    weight_map = {}
    for part in range(number):
        file = folder / (f"{stem}-{part + 1:05}-of-{number:05}.{suffix}" if number > 1 else f"{stem}.{suffix}")
        chosen = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % number == part}
        if suffix == "safetensors":
            save_file(chosen, file, metadata={"format": "pt"})
        else:
            torch.save(chosen, file, _use_new_zipfile_serialization=not form.startswith("legacy"))
        weight_map |= dict.fromkeys(chosen, file.name)
        files.append(file)
    if number > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return files


def digest_of(shapes: Mapping[str, Any]) -> str:
    """SHA-256 of names and shapes, in any order."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
