"""Step statistics under TRL's names, plus accuracy per reasoning step, drift per token and the tokens that sharing saved.

Results stay on the device over a step's micro-batches. `Metrics.read` gathers those of all ranks and brings them to the
host in one transfer, together with whatever else the step must know (gradient norm, finiteness). It is the one place at
which a step waits for the device or for other ranks. All arithmetic after it is the host's, the same on every rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cpo_fast.config import TrainConfig
from cpo_fast.data.examples import Example
from cpo_fast.train.communication import Communicator
from cpo_fast.train.objective import EXAMPLE_COLUMNS, SUM_COLUMNS, MicroBatch, MicroBatchResult
from cpo_kernels.device import to_device


class Metrics:
    """Collects the micro-batches of one optimizer step or one validation, of all ranks."""

    def __init__(
        self, config: TrainConfig, examples: Sequence[Example], communicator: Communicator, capacity: int | None = None
    ) -> None:
        """`examples` are those of all ranks, and `capacity` the most that one rank has of them (None: all)."""
        self.config, self.examples, self.communicator = config, examples, communicator
        self.capacity = len(examples) if capacity is None else capacity
        self.results: list[MicroBatchResult] = []
        self.places: list[int] = []
        self._columns: dict[str, np.ndarray] = {}  # by name: values of `examples`
        self._sums: dict[str, float] = {}

    def add(self, batch: MicroBatch, result: MicroBatchResult) -> None:
        self.results.append(result)
        self.places.extend(batch.places)

    def read(self, *scalars: torch.Tensor, signal: int = 0) -> np.ndarray:
        """Bring everything of every rank to the host in one transfer.

        Returns:
            The ranks' `scalars` and `signal`, [ranks, scalars + 1].
        """
        method, device = self.config.method, self.communicator.device
        columns, sums = EXAMPLE_COLUMNS[method], SUM_COLUMNS[method]
        num_scored = [sum(counts) for counts in zip(*(result.num_scored for result in self.results), strict=True)]
        counts = {
            "num_micro_batches": len(self.results),
            "num_tokens": sum(result.num_tokens for result in self.results),
            "num_sequence_tokens": sum(result.num_sequence_tokens for result in self.results),
            "num_first": num_scored[0] if num_scored else 0,  # scored tokens of chosen responses or of completions
            "num_second": num_scored[1] if len(num_scored) > 1 else 0,  # of rejected responses
            "num_scored": sum(num_scored),
        }
        room = self.capacity - len(self.places)
        known = [*counts.values(), *self.places, *([-1] * room), signal]
        # float64 holds float32 values and counts exactly
        parts = [to_device(torch.tensor(known, dtype=torch.float64), device)]
        parts += [scalar.detach().double().reshape(1) for scalar in scalars]
        parts += [self._joined(name).sum().reshape(1) for name in sums]
        parts += [torch.nn.functional.pad(self._joined(name), (0, room)) for name in columns]
        host = self.communicator.gather(torch.cat(parts)).cpu().numpy()
        sizes = [len(counts), self.capacity, 1 + len(scalars), len(sums), *(self.capacity for _ in columns)]
        found_counts, places, found_scalars, found_sums, *values = np.split(host, np.cumsum(sizes)[:-1], axis=1)
        taken = places >= 0
        order = places[taken].astype(np.int64)
        if sorted(order) != list(range(len(self.examples))):
            raise RuntimeError(f"{len(order)} examples were computed of a step's {len(self.examples)}")
        for name, value in zip(columns, values, strict=True):
            self._columns[name] = np.empty(len(order))
            self._columns[name][order] = value[taken]
        totals = [*found_counts.sum(axis=0), *found_sums.sum(axis=0)]
        self._sums = dict(zip([*counts, *sums], map(float, totals), strict=True))
        return np.roll(found_scalars, -1, axis=1)

    def _joined(self, name: str) -> torch.Tensor:
        found = [result.columns[name].detach().reshape(-1).double() for result in self.results]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=self.communicator.device)

    def summary(self) -> dict[str, float]:
        """Means over examples (loss of pairs, rewards, log-probs) or tokens (everything else), as TRL logs them.

        Read first.
        """
        sums = self._sums
        num_first = max(sums["num_first"], 1)
        computed, rows = int(sums["num_tokens"]), int(sums["num_sequence_tokens"])
        values = {
            "entropy": sums["entropy_sum"] / max(sums["num_scored"], 1),
            "mean_token_accuracy": sums["num_top1"] / num_first,
            "micro_batches": int(sums["num_micro_batches"]),
            "tokens/computed": computed,
            "tokens/rows": rows,
            "tokens/saved": 1 - computed / rows if rows else 0.0,
        }
        if self.config.method == "sft":
            return {"loss": sums["loss_sum"] / num_first, "completions": len(self.examples), **values}
        return {**self._of_pairs(num_first, max(sums["num_second"], 1)), **values}

    def _of_pairs(self, num_chosen: float, num_rejected: float) -> dict[str, float]:
        host = self._columns
        margins = host["chosen_rewards"] - host["rejected_rewards"]
        correct = margins > 0
        num_tokens = [len(example.responses[0]) for example in self.examples]  # where they are scored as a whole
        drifts = host["chosen_rewards"] / self.config.beta / num_tokens
        by_step: dict[int, list[bool]] = {}
        for pair, right in zip(self.examples, correct, strict=True):
            if pair.step:
                by_step.setdefault(pair.step, []).append(bool(right))
        return {
            "loss": float(host["losses"].mean()),
            "rewards/chosen": float(host["chosen_rewards"].mean()),
            "rewards/rejected": float(host["rejected_rewards"].mean()),
            "rewards/accuracies": float(correct.mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(host["chosen_logps"].mean()),
            "logps/rejected": float(host["rejected_logps"].mean()),
            "logps/chosen_per_token": float(host["chosen_logps"].sum()) / num_chosen,
            "logps/rejected_per_token": float(host["rejected_logps"].sum()) / num_rejected,
            "logps/chosen_drift": float(host["chosen_rewards"].sum()) / self.config.beta / num_chosen,
            "logps/chosen_drift_p10": float(np.quantile(drifts, 0.1)),
            "logits/chosen": self._sums["chosen_logit_sum"] / num_chosen,
            "logits/rejected": self._sums["rejected_logit_sum"] / num_rejected,
            "states" if self.config.method in ("tpo", "dvo", "tree_grpo") else "pairs": len(self.examples),
            **{f"rewards/accuracies/step_{step}": sum(v) / len(v) for step, v in sorted(by_step.items())},
        }

    def nonfinite(self) -> list[str]:
        """Source rows of examples whose loss is not finite. Read first."""
        finite = np.isfinite(self._columns["losses"])
        return [example.source for example, fine in zip(self.examples, finite, strict=True) if not fine]


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with nine significant digits, enough to tell float32 values apart and short enough to read."""
    return {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in values.items()}
