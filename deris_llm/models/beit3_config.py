"""The architecture of BEiT-3, which transformers does not have."""

from transformers import PreTrainedConfig


class Beit3Config(PreTrainedConfig):
    """The architecture; the defaults are those of the published base model for 224 px."""

    model_type = "beit3"
    vocab_size: int = 64010
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224  # px, square; the size that the image's position table is made for
    patch_size: int = 16
    max_text_positions: int = 1024  # rows of the text's position table, two of them never read
    layer_norm_eps: float = 1e-5
    drop_path: float = 0.0  # stochastic depth of the last layer, linear from 0 at the first
    initializer_range: float = 0.02
