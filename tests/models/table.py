"""`docs/models.md` and the short form in README.md, from a run of every architecture: `python -m tests.models.table`."""

import datetime
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers

from tests.models.matrix import BOUND, PARTS, Row, run
from tests.models.tiny_configs import UNBUILT, WINDOW, architectures

ROOT = Path(__file__).resolve().parents[2]
DOCS, README = ROOT / "docs" / "models.md", ROOT / "README.md"
MARK, END = "<!-- models -->", "<!-- end of models -->"
# the types that most people start from, named in the README
KNOWN = (
    "llama", "mistral", "mixtral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3n_text", "gemma4",
    "gemma4_text", "phi", "phi3", "phimoe", "olmo3", "olmoe", "smollm3", "granite", "granitemoe", "cohere2", "exaone4", "glm4",
    "glm4_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minimax_m2", "minimax_m3_vl_text", "hunyuan_v1_dense", "seed_oss", "starcoder2", "gpt2", "gpt_neox", "opt", "llama4",
    "qwen3_next", "qwen3_5", "falcon", "bloom", "mpt", "stablelm", "mamba2", "lfm2", "jamba", "nemotron_h",
)  # fmt: skip
BOTH = "Equal in training and in search"
TRAINING = "Equal in training, refused by a search"
REFUSED = "Refused"
LEFT_OUT = "Not run"
