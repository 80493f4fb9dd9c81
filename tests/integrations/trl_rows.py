"""Samples as TRL's AsyncGRPO packs them, the row that TRL makes of them, and what each sample gives alone."""

import random
from typing import Any

import torch
from trl.experimental.async_grpo.packing import TreeRow

from tests.tiny import VOCAB_SIZE


def sample(input_ids: list[int], first: int, advantage: float, old_log_prob: float = -3.0, group: int = 0) -> Any:
    """One rollout of which the tokens from place `first` on are trained."""
    trained = torch.arange(len(input_ids)) >= first
    return {
        "input_ids": torch.tensor(input_ids),
        "completion_mask": trained.int(),
        "old_log_probs": torch.where(trained, old_log_prob, 0.0),
        "advantage": advantage,
        "group_id": group,
        "metrics": {},
    }


def random_samples(
    seed: int, num_samples: int = 10, num_trees: int = 2, longest: int = 24, branching: float = 0.7
) -> list[Any]:
    """Samples that continue prefixes of others at any depth; some are prefixes of others, some equal, some of one token."""
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(count)]

    found = [[3 + tree, *ids(generator.randint(0, longest))] for tree in range(num_trees)]
    while len(found) < num_samples:
        base = generator.choice(found)
        kept = generator.randint(1, len(base)) if generator.random() < branching else len(base)
        found.append(base[:kept] + ids(generator.randint(0, longest // 2)))
    generator.shuffle(found)
    return [sample(each, 1, generator.uniform(-1, 1), group=each[0]) for each in found]


def deep_samples(num_levels: int) -> list[Any]:
    """At each of so many levels two continuations, one of which is continued: a chain of forks."""
    generator = random.Random(num_levels)
    path, found = [generator.randrange(3, VOCAB_SIZE) for _ in range(3)], []
    for level in range(num_levels):
        found.append([*path, 90, *(generator.randrange(3, VOCAB_SIZE) for _ in range(level % 3))])
        path = [*path, generator.randrange(3, 90)]
    return [sample(each, 1, 1.0 - 0.1 * place) for place, each in enumerate([*found, path])]


def pack(samples: list[Any]) -> dict[str, Any]:
    """TRL's row of these samples."""
    row = TreeRow()
    for each in samples:
        row.add(each)
    return row.pack()


def tree_arguments(packed: dict[str, Any]) -> dict[str, Any]:
    """What AsyncGRPOTrainer.compute_loss gives a model beside token and position ids."""
    longest_segment, longest_path = packed["tree_max_seqlens"].tolist()
    tensors = {key: packed[key] for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    return tensors | {"tree_max_seqlen_q": longest_segment, "tree_max_seqlen_k": longest_path}


def packed_log_probs(model: Any, packed: dict[str, Any], samples: list[Any]) -> torch.Tensor:
    """Log-probs of all trained tokens, sample by sample, from one forward over the row."""
    logits = model(
        input_ids=packed["input_ids"][None],
        position_ids=packed["position_ids"][None],
        use_cache=False,
        **tree_arguments(packed),
    ).logits[0]
    targets = torch.cat([each["input_ids"][each["completion_mask"].bool()] for each in samples])
    return logits[packed["token_index"]].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def log_probs_alone(model: Any, samples: list[Any]) -> torch.Tensor:
    """The same, each sample alone through the model."""
    found = []
    for each in samples:
        logits = model(input_ids=each["input_ids"][None], use_cache=False).logits[0]
        of_tokens = logits[:-1].log_softmax(-1).gather(1, each["input_ids"][1:, None])[:, 0]
        found.append(of_tokens[each["completion_mask"][1:].bool()])
    return torch.cat(found)


def results(model: Any, log_probs: torch.Tensor, packed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of all parameters of their sum by advantages."""
    model.zero_grad()
    (log_probs * packed["advantages"]).sum().backward()
    return log_probs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
