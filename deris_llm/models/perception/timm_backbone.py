"""timm models as backbones of the pixel decoder."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput

STRIDES = (4, 8, 16, 32)


class TimmBackbone(nn.Module):
    """A timm model with maps at strides 4, 8, 16, 32 (Swin, ConvNeXt, ResNet), with the interface of transformers' backbones.

    Attributes:
        channels: channels of the four maps, finest first.
    """

    def __init__(self, name: str, *, image_size: int, pretrained: bool) -> None:
        """Builds the timm model without its head.

        Args:
            name: timm's name, with or without a tag, e.g. `swin_small_patch4_window7_224`.
            image_size: side of the square input, px; models with a fixed input size (Swin) are built for it.
            pretrained: load timm's weights.

        Raises:
            ValueError: timm does not know the name, or the model lacks one of the four strides.
        """
        super().__init__()
        import timm  # slow, and most models have no timm backbone
        from timm.layers.format import Format

        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=5)
            raise ValueError(
                f"perception.backbone=timm:{name}: expected a model of timm {timm.__version__}, got an unknown name; "
                f"near names: {', '.join(near) or 'none'} (timm.list_models() has all)."
            )
        pretrained_cfg = timm.get_pretrained_cfg(name)
        options: dict[str, Any] = {"features_only": True}
        if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
            options["img_size"] = image_size
        self.model = timm.create_model(name, pretrained=pretrained, **options)
        info: Any = self.model.feature_info
        reductions = info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise ValueError(
                f"perception.backbone=timm:{name}: expected maps at strides {STRIDES}, got {tuple(reductions)}; "
                "use a hierarchical model (Swin, ConvNeXt, ResNet)."
            )
        self._levels = [reductions.index(stride) for stride in STRIDES]
        self._channels_last = Format(getattr(self.model, "output_fmt", None) or "NCHW") is Format.NHWC
        self.channels: list[int] = [info.channels()[level] for level in self._levels]

    def forward(self, image: Tensor) -> BackboneOutput:
        """Computes the four maps.

        Args:
            image: float (I, 3, H, W), ImageNet-normalised RGB.

        Returns:
            `feature_maps`: four maps (I, c, H / stride, W / stride), strides 4, 8, 16, 32.
        """
        maps = self.model(image)
        maps = [maps[level] for level in self._levels]
        if self._channels_last:
            maps = [feature_map.permute(0, 3, 1, 2).contiguous() for feature_map in maps]
        return BackboneOutput(feature_maps=tuple(maps))


def timm_channels(name: str, *, image_size: int) -> list[int]:
    """Returns the channels of a timm backbone's four maps without allocating its weights."""
    with torch.device("meta"):
        return TimmBackbone(name, image_size=image_size, pretrained=False).channels
