"""The base of backends around a transformers model: loading, freezing, LoRA, modes and activation checkpointing.

A subclass adds a processor, `forward` and a few declared facts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deris_llm.config import CognitionConfig
from deris_llm.models.cognition.base import CognitionBackend
from deris_llm.models.pretrained import architecture_of, check_names, load_pretrained
from deris_llm.structures import CognitionInputs

BERT_LORA_PATHS = {
    "q_proj": r"attention\.(self|attention)\.query",
    "k_proj": r"attention\.(self|attention)\.key",
    "v_proj": r"attention\.(self|attention)\.value",
    "o_proj": r"attention\.output\.dense",
    "up_proj": r"layer\.\d+\.intermediate\.dense",
    "down_proj": r"layer\.\d+\.output\.dense",
}
"""`TransformersBackend.lora_paths` of BERT and ViLT, under the names that language models use."""


class TransformersBackend(CognitionBackend):
    """A frozen transformers model of which one part trains: with LoRA, or as a whole under `cognition.tuning=full`.

    Attributes:
        models: model class by `model_type` of the weights.
        expects: what the weights must be, for messages: "a BERT".
        advice: where such weights are found, for messages: "take e.g. google-bert/bert-base-uncased".
        trained_part: name of the submodule that trains; empty = the whole model.
        lora_paths: names for `cognition.lora.targets` and, for each, a regular expression that the full names of its linear
            layers end in; None = a target is the last part of the names.
        left_in_file: globs over names in the weight files that the model does not use.
        unquantized: parts that `cognition.quantization=nf4` leaves alone.
    """

    models: ClassVar[Mapping[str, type[PreTrainedModel]]]
    expects: ClassVar[str]
    advice: ClassVar[str]
    trained_part: ClassVar[str] = ""
    lora_paths: ClassVar[Mapping[str, str] | None] = None
    left_in_file: ClassVar[tuple[str, ...]] = ()
    unquantized: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: PreTrainedModel, config: CognitionConfig) -> None:
        """Freezes the model and sets what trains.

        Args:
            model: loaded, or on the meta device.
            config: its `tuning` and `lora` are used here.

        Raises:
            ValueError: `cognition.lora.targets` names a layer that the model does not have.
        """
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.feature_dim = self.trained_module.config.hidden_size
        self.is_trained = config.tuning == "full" or config.lora.r > 0
        if config.tuning == "full":
            self.trained_module.requires_grad_(True)
        elif config.lora.r > 0:
            self._add_lora(config)
        self.train(self.training)

    @property
    def trained_module(self) -> Any:
        """The part of the model that trains."""
        return self.model.get_submodule(self.trained_part)

    @classmethod
    def architecture(cls, config: CognitionConfig, *, weights: bool) -> Any:
        """Reads the architecture (a transformers config) and checks that the backend can use it.

        Args:
            config: the run's cognition section.
            weights: read the file beside the weights; False = the shipped one, for which no weights are needed.

        Raises:
            ValueError: the weights are of another model.
        """
        architecture = architecture_of(config.weights, weights=weights)
        if not cls.accepts(architecture):
            raise ValueError(
                f"cognition.weights={config.weights}: expected the weights of {cls.expects}, got a "
                f"{architecture.model_type}; {cls.advice}, or choose another cognition.backend."
            )
        return architecture

    @classmethod
    def accepts(cls, architecture: Any) -> bool:
        """Whether the backend can use an architecture."""
        return architecture.model_type in cls.models

    @classmethod
    def attention(cls, config: CognitionConfig, dtype: torch.dtype) -> dict[str, str] | None:
        """Returns transformers' `attn_implementation` by part of the model; None = transformers' choice."""
        return None

    @classmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        architecture = cls.architecture(config, weights=weights)
        model = load_pretrained(
            cls.models[architecture.model_type],
            config.weights,
            architecture,
            weights=weights,
            dtype=dtype,
            left_in_file=cls.left_in_file,
            attention=cls.attention(config, dtype),
            in_4_bits_except=cls.unquantized if config.quantization == "nf4" else None,
        )
        return cls(model, config)

    @classmethod
    def check_weights(cls, config: CognitionConfig) -> None:
        architecture = cls.architecture(config, weights=True)
        check_names(cls.models[architecture.model_type], config.weights, architecture, left_in_file=cls.left_in_file)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode. Frozen parts stay in eval mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.model.eval()
        self.trained_module.train(mode and self.is_trained)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the layers of the trained part; the frozen parts run without gradient anyway."""
        older_name = self.trained_module.gradient_checkpointing_enable  # before transformers 5.2x
        enable = getattr(self.trained_module, "activation_checkpointing_enable", older_name)
        enable(activation_checkpointing_kwargs or {"use_reentrant": False})

    def grad_if_trained(self) -> torch.set_grad_enabled:
        """A context that records gradients only if a part of the model trains."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained)

    def _add_lora(self, config: CognitionConfig) -> None:
        """Puts trainable low-rank updates beside the linear layers that `cognition.lora.targets` names."""
        from peft import LoraConfig, inject_adapter_in_model  # takes a second; models without LoRA need not wait for it

        part = self.trained_module
        if any(type(module).__name__ == "Linear4bit" for module in part.modules()):
            part.is_loaded_in_4bit = True  # peft asks the part; transformers sets it on the whole model only
        lora = LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=self._lora_layers(config.lora.targets),
        )
        inject_adapter_in_model(lora, part)
        for name, module in part.named_modules():
            if "lora_" in name:
                module.to(self.model.dtype)  # peft does so itself, but not on the meta device

    def _lora_layers(self, targets: tuple[str, ...]) -> list[str]:
        """Full names of the linear layers that the targets name."""
        names = [name for name, module in self.trained_module.named_modules() if isinstance(module, nn.Linear)]
        paths = self.lora_paths or {kind: kind for kind in sorted({name.rsplit(".", 1)[-1] for name in names})}
        unknown = sorted(set(targets) - set(paths))
        if unknown or not targets:
            raise ValueError(
                f"cognition.lora.targets: expected names among {', '.join(paths)}, got {', '.join(unknown) or 'none'}; "
                "correct them, or set cognition.lora.r=0 for no LoRA."
            )
        return [
            name for target in sorted(set(targets)) for name in names if re.search(rf"(^|\.){paths[target]}$", name)
        ]


def additive_mask(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask that is 0 where a key is visible; 4-D, transformers takes it as it is and does not wait for it.

    Additive, not boolean: eager attention adds its mask, so a boolean one would hide nothing there.
    """
    return torch.zeros_like(is_visible, dtype=dtype).masked_fill(~is_visible, torch.finfo(dtype).min)


def padding_attention_mask(inputs: CognitionInputs, dtype: torch.dtype) -> Tensor | None:
    """Attention mask (P, 1, L, L) of an encoder that reads the prompts; None if no prompt is padded."""
    if not inputs.has_padding:
        return None
    is_token = ~inputs.token_padding_mask[:, None, None, :]
    return additive_mask(is_token.expand(-1, -1, is_token.shape[-1], -1), dtype)
