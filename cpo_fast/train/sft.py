"""Supervised fine-tuning on winning paths (the paper's TS-SFT baseline): next-token loss on completions, prompt masked.

    loss = - sum over the step's completion tokens of log p / number of those tokens

which is Hugging Face's loss of the same rows padded into one batch. Winning paths of a question share their steps, so they
are computed as a forest like preference pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from cpo_fast.config import TrainConfig
from cpo_fast.data.sft import SftExample
from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers import packed_logps
from cpo_kernels.transfer import to_device


@dataclass(frozen=True)
class SftResult:
    """Loss and statistics of one micro-batch of N examples; all detached but `loss_sum`."""

    loss_sum: torch.Tensor  # scalar, differentiable: summed negative log-likelihood
    losses: torch.Tensor  # [N] mean negative log-likelihood per token
    lengths: Sequence[int]  # [N] scored tokens
    entropy_sum: torch.Tensor  # scalar, nats over all scored tokens
    num_top1: torch.Tensor  # scalar
    num_tokens: int  # tokens that met the backbone once
    num_sequence_tokens: int  # tokens of the N rows


class SftObjective(torch.nn.Module):
    """Next-token loss of completions; the one module that DeepSpeed wraps."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, impl: Implementations | None = None) -> None:
        """`model` is a prepared PeftModel, `impl` what the run resolved."""
        super().__init__()
        self.model = model
        self.config = config
        self.impl = impl or Implementations.of(config.impl)

    def forward(self, examples: Sequence[SftExample]) -> SftResult:
        """Score every completion on one forest."""
        sequences = [example.prompt_ids + example.completion_ids for example in examples]
        starts = [len(example.prompt_ids) for example in examples]
        packed = packed_logps(self.model, sequences, starts, impl=self.impl, outputs=("entropy", "is_top1"))
        result, logps = packed.result, packed.segment_logps
        lengths = [len(example.completion_ids) for example in examples]
        assert result.entropy is not None
        assert result.is_top1 is not None
        with record_function("loss"):
            return SftResult(
                loss_sum=-logps.sum(),
                losses=-logps.detach() / to_device(torch.tensor(lengths), logps.device),
                lengths=lengths,
                entropy_sum=result.entropy.sum(),
                num_top1=result.is_top1.sum(),
                num_tokens=packed.num_tokens,
                num_sequence_tokens=packed.num_sequence_tokens,
            )
