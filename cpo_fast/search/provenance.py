"""What decides the trees of a run besides the questions, so that a file never mixes two searches."""

import hashlib
from dataclasses import dataclass
from typing import Any

from cpo_fast.config import Config
from cpo_fast.files import canonical_json
from cpo_fast.search.root import RootPrompts
from cpo_fast.tasks import Task


@dataclass(frozen=True)
class Provenance:
    """Fields as in `tree.SearchTree`."""

    task: str
    prompt_hash: str
    model_hash: str
    adapter_hash: str
    seed: int
    config_hash: str


def provenance_of(config: Config, task: Task, roots: RootPrompts, model: Any) -> Provenance:
    """What the trees of a run follow from. A model without a path is named by its weights."""
    if config.model.path:
        from cpo_fast.models import adapter_hash, model_hash

        named, adapter = model_hash(config.model.path), adapter_hash(config.model.adapter)
    else:
        named, adapter = _weights_hash(model), ""
    settings = {
        "search": config.search.deciding(),
        "dtype": config.model.dtype,
        "chat": config.task.chat,
        "few_shot_evaluators": [task.few_shot_evaluator, task.few_shot_conclusion_evaluator],
    }
    settings_hash = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]
    return Provenance(task.name, roots.prompt.hash, named, adapter, config.seed, settings_hash)


def _weights_hash(model: Any) -> str:
    """16 hex digits of the SHA-256 of a loaded model's parameters, for a model that came without files."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
