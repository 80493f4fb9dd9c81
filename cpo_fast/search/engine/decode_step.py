"""One step of generation that the device takes alone: nothing in it is read by the host, or changes between steps.

Rows stay in their places from step to step, so that all a step needs is what the step before left on the device:

    step:   read token, attend, sample -> token;   position, slot and private length grow by one

Every tensor has its place in memory for good. New rows are loaded into the same places, padded to the shape, so a step
can be recorded once as a CUDA graph and replayed for any rows that fit. A row that is full, or that the host has
silenced, goes on unheard: it reads only what other rows read too, and writes where nobody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from cpo_fast.search.engine.arena import Arena
from cpo_fast.search.engine.batch_sampler import BatchSampler
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits
from cpo_kernels.integrations.transformers.parts import ModelParts
from cpo_kernels.transfer import to_device
from cpo_kernels.tree_decode import DecodePlan

# rows of a forward: fine where a wasted row costs most, coarse where few shapes must serve many waves
ROW_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
SMALLEST_BUCKET = 16  # of items, partials and positions, whose buckets are powers of two


@dataclass(frozen=True)
class StepShape:
    """What is fixed when a step is recorded: sizes, and which processors of logits take part."""

    num_rows: int
    num_items: int
    num_partials: int
    num_uniforms: int
    has_top_p: bool
    has_top_k: bool
    has_penalty: bool
    all_greedy: bool

    @classmethod
    def holding(cls, num_rows: int, plan: DecodePlan, sampler: BatchSampler) -> "StepShape":
        """The smallest shape for a plan and a sampler of `num_rows` rows, itself a bucket."""
        return cls(
            num_rows,
            power_bucket(len(plan.items)),
            power_bucket(plan.num_partials),
            power_bucket(sampler.uniforms.shape[1]),
            sampler.top_p is not None,
            sampler.top_k is not None,
            sampler.penalty is not None,
            sampler.all_greedy,
        )


def row_bucket(count: int) -> int:
    """The number of rows that a forward of `count` rows is filled up to."""
    largest = ROW_BUCKETS[-1]
    return next((bucket for bucket in ROW_BUCKETS if bucket >= count), -(-count // largest) * largest)


def power_bucket(count: int) -> int:
    """The smallest power of two that is at least `count` and at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (count - 1).bit_length() if count > 1 else 1)


def vocab_size(parts: ModelParts) -> int:
    """V, how many logits the head gives."""
    weight = parts.head.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


class DecodeStep:
    """A step over B places, of which some are taken.

    Args:
        parts: of a prepared model. arena: its keys and values.
        shape: how much fits. device: of the model.

    Attributes:
        out: [2, B] float64, the tokens that the last step chose (exact: ids are below 2^53) and their raw log-probs.
        replay: repeats `run`; None until it is recorded. num_runs: of `run` by the host.
    """

    def __init__(self, parts: ModelParts, arena: Arena, shape: StepShape, device: torch.device) -> None:
        num_rows = shape.num_rows
        self._parts, self._arena, self._device = parts, arena, device

        def empty(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._token = empty(num_rows)
        self._length = empty(num_rows)  # tokens generated so far
        self._first_position = empty(num_rows)  # of the prompt's last token
        self._first_slot = empty(num_rows)
        self._max_length = empty(num_rows)  # 0: silent
        self.out = empty(2, num_rows, dtype=torch.float64)
        self.plan = DecodePlan(
            slots=empty(num_rows),
            items=empty(shape.num_items, 6, dtype=torch.int32),
            partial_offsets=empty(num_rows + 1, dtype=torch.int32),
            partial_index=empty(shape.num_partials, dtype=torch.int32),
            suffix_start=empty(num_rows, dtype=torch.int32),
            suffix_len=empty(num_rows, dtype=torch.int32),
            num_partials=shape.num_partials,
            num_arena_rows=arena.num_tokens + 1,
            is_reused=True,
        )
        self._sampler = BatchSampler(
            uniforms=empty(num_rows, shape.num_uniforms, dtype=torch.float64),
            temperature=empty(num_rows, dtype=torch.float64),
            top_p=empty(num_rows, dtype=torch.float64) if shape.has_top_p else None,
            top_k=empty(num_rows) if shape.has_top_k else None,
            penalty=empty(num_rows, dtype=torch.float64) if shape.has_penalty else None,
            seen=empty(num_rows, vocab_size(parts), dtype=torch.bool) if shape.has_penalty else None,
            all_greedy=shape.all_greedy,
        )
        self.shape = shape
        self.replay: Callable[[], Any] | None = None
        self.num_runs = 0

    def load(
        self,
        plan: DecodePlan,  # of B rows, on the host
        sampler: BatchSampler,  # of B rows, on the host
        tokens: Sequence[int],
        lengths: Sequence[int],
        first_positions: Sequence[int],
        max_lengths: Sequence[int],
    ) -> None:
        """Take in rows; places beyond the sequences' length stay silent. Does not wait for the device.

        Args:
            plan, sampler: what the shape was made for, or smaller in all its sizes but the rows.
            tokens: what each row reads next. lengths: tokens it has generated.
            first_positions: of its prompt's last token. max_lengths: its cap.
        """
        plan = plan.padded(self.shape.num_items, self.shape.num_partials)
        for name in ("items", "partial_offsets", "partial_index", "suffix_start"):
            self._put(getattr(self.plan, name), getattr(plan, name))
        for field in fields(BatchSampler):
            target, source = getattr(self._sampler, field.name), getattr(sampler, field.name)
            if isinstance(target, torch.Tensor):
                self._put(target[:, : source.shape[1]] if target.ndim == 2 else target, source)
        self._put(self._first_slot, plan.suffix_start.long())
        for target, values in (
            (self._token, tokens),
            (self._length, lengths),
            (self._first_position, first_positions),
            (self._max_length, max_lengths),
        ):
            padded = [*values, *[0] * (self.shape.num_rows - len(values))]
            self._put(target, torch.tensor(padded, dtype=torch.int64))

    def limit(self, max_lengths: Sequence[int]) -> None:
        """Set the caps of all rows anew; 0 silences one from the next step on."""
        padded = [*max_lengths, *[0] * (self.shape.num_rows - len(max_lengths))]
        self._put(self._max_length, torch.tensor(padded, dtype=torch.int64))

    def run(self) -> None:
        """Take one step: every row that has room gets a token, in `out`."""
        heard = self._length < self._max_length
        self.plan.slots.copy_(torch.where(heard, self._first_slot + self._length, self._arena.dump_row))
        self.plan.suffix_len.copy_(torch.where(heard, self._length + 1, 0))
        positions = self._first_position + self._length
        hidden = decode_forward(self._parts, self._token, positions, self.plan, self._arena.layers)
        tokens, logps = self._sampler.sample(next_logits(self._parts, hidden), self._length)
        self.out[0].copy_(tokens)
        self.out[1].copy_(logps)
        self._token.copy_(tokens.clamp_min(0))
        self._length.add_(heard)

    def _put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(to_device(source, self._device))
