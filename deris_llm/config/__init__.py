"""Run configs: a frozen, typed tree, read from YAML files with ``base:`` inheritance and ``a.b=value`` overrides.

A run is a complete, named config that is saved with every checkpoint. `deris-llm config fields` prints every field with
its meaning; `deris-llm config schema` writes a JSON schema for editors.
"""

from deris_llm.config.load import (
    ConfigError,
    about_config,
    apply_overrides,
    config_from_dict,
    config_names,
    config_to_dict,
    json_schema,
    load_config,
    save_config,
)
from deris_llm.config.schema import (
    Beit3Cognition,
    CognitionConfig,
    ConversionConfig,
    DataConfig,
    EvaluationConfig,
    PerceptionConfig,
    PresenceUse,
    Qwen2OvCognition,
    QwenVlCognition,
    RunConfig,
    Selection,
    TrainingConfig,
    VideoSelection,
    ViltCognition,
    fields_that_may_differ,
    iter_fields,
)

__all__ = [
    "Beit3Cognition",
    "CognitionConfig",
    "ConfigError",
    "ConversionConfig",
    "DataConfig",
    "EvaluationConfig",
    "PerceptionConfig",
    "PresenceUse",
    "Qwen2OvCognition",
    "QwenVlCognition",
    "RunConfig",
    "Selection",
    "TrainingConfig",
    "VideoSelection",
    "ViltCognition",
    "apply_overrides",
    "config_from_dict",
    "about_config",
    "config_names",
    "config_to_dict",
    "fields_that_may_differ",
    "iter_fields",
    "json_schema",
    "load_config",
    "save_config",
]
