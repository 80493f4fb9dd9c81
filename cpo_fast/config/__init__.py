"""Configuration: sections (what can be set), loading (YAML, overrides, errors). Imports neither torch nor transformers."""

from cpo_fast.config.load import config_hash, dump_config, dump_yaml, keep_config, load_config, validate_config
from cpo_fast.config.sections import (
    TREE_METHODS,
    Config,
    DataConfig,
    EvalConfig,
    IterateConfig,
    LoraConfig,
    MixtureItem,
    ModelConfig,
    PairsConfig,
    SearchConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "TREE_METHODS",
    "Config",
    "DataConfig",
    "EvalConfig",
    "IterateConfig",
    "LoraConfig",
    "MixtureItem",
    "ModelConfig",
    "PairsConfig",
    "SearchConfig",
    "TaskConfig",
    "TrainConfig",
    "config_hash",
    "dump_config",
    "dump_yaml",
    "keep_config",
    "load_config",
    "validate_config",
]
