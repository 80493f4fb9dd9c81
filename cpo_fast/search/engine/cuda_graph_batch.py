"""A wave whose rows keep their places, so that the device steps alone and the host reads one step behind it.

    device   step 1   step 2   step 3   ...
    host              read 1   read 2   ...

The host only decides which lines have ended. A row that ended is silenced at once, and its place stays empty until the
wave is composed anew: when rows wait and `REFILL_STEPS` have passed, or when fewer than `MIN_ALIVE` of the places are
alive. Between two compositions nothing is planned and nothing waits, so the same recorded step is replayed.

One step of generation that the device takes alone: nothing in it is read by the host, or changes between steps.

Rows stay in their places from step to step, so that all a step needs is what the step before left on the device:

    step:   read token, attend, sample -> token;   position, slot and private length grow by one

Every tensor has its place in memory for good. New rows are loaded into the same places, padded to the shape, so a step
can be recorded once as a CUDA graph and replayed for any rows that fit. A row that is full, or that the host has
silenced, goes on unheard: it reads only what other rows read too, and writes where nobody reads.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from cpo_fast.errors import EnvironmentProblem
from cpo_fast.search.engine.decode_batch import Row, WaveCounts, depth_first_rows
from cpo_fast.search.engine.forward_plans import decode_plan
from cpo_fast.search.engine.kv_arena import Arena
from cpo_fast.search.engine.sampler import NOT_FINITE, BatchSampler
from cpo_fast.search.engine.stopping import Stops
from cpo_kernels.device import to_device
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits
from cpo_kernels.integrations.transformers.model import ModelParts
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


LAG = 1  # steps that the device is ahead of the host
REFILL_STEPS = 8  # a composition costs the host a few milliseconds, a row that waits a step costs its share of one
MIN_ALIVE = 0.75  # of the places; below, a smaller bucket saves more than the composition costs
MAX_SHAPES = 32  # recorded steps that are kept

Record = Callable[[Callable[[], None]], Callable[[], Any]]  # a step -> what repeats it


@dataclass(eq=False)
class _Pending:
    """Tokens on their way to the host."""

    rows: list[Row]
    out: torch.Tensor  # [2, B] float64, on the host
    event: Any


class GraphWave:
    """As `wave.Wave`, for a device that is faster than the host.

    Args:
        parts: of a prepared model. arena: where keys and values are. stops: says when a row ends.
        share, refill: see `Features`.
        record: makes a step repeatable; None records CUDA graphs.

    Attributes:
        rows: those that have not ended, as far as the host has read.
        counts: of what was computed. num_compositions: how often rows were placed anew.
    """

    def __init__(
        self,
        parts: ModelParts,
        arena: Arena,
        stops: Stops,
        share: bool = True,
        refill: bool = True,
        record: Record | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.counts = WaveCounts()
        self.num_compositions = 0
        self._parts, self._arena, self._stops = parts, arena, stops
        self._share, self._refill = share, refill
        self._device = next(parts.causal_lm.parameters()).device
        self._make_record = cuda_graphs if record is None else lambda: record
        self._record = self._make_record()
        self._steps: dict[StepShape, DecodeStep] = {}  # least recently used first
        self._step: DecodeStep | None = None
        self._placed: list[Row] = []
        self._num_node_keys = 0
        self._lengths: list[int] = []  # of the placed rows, once all that was launched is done
        self._age = 0
        self._changed = False
        self._pending: deque[_Pending] = deque()

    def room(self, max_rows: int) -> int:
        """How many rows may be added now."""
        if self.rows and not (self._refill and (self._age >= REFILL_STEPS or self._is_sparse())):
            return 0
        return max(0, max_rows - len(self.rows))

    def add(self, rows: Sequence[Row]) -> None:
        """Let more rows take part from the next step on."""
        self.rows = depth_first_rows([*self.rows, *rows])
        self._changed = True

    def forget(self) -> None:
        """Drop what was recorded: the weights, or which of them take part, have changed."""
        assert not self.rows, "weights changed while rows were generated"
        self._pending.clear()
        self._steps.clear()
        self._step, self._placed, self._lengths = None, [], []
        self._record = self._make_record()  # with a pool of its own

    @torch.inference_mode()
    def drop(self, rows: Sequence[Row]) -> None:
        """Leave rows out; what they still write is ordered before whatever the host asks for next."""
        gone = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in gone]
        self._silence()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Let every row generate one token more; returns rows known to have ended, which have left the wave."""
        ended: list[Row] = []
        if self._changed or (self._is_sparse() and row_bucket(len(self.rows)) < self._num_places):
            ended += self._read_all()
            self._compose()
        launched = self._launch()
        while len(self._pending) > (LAG if launched else 0):
            ended += self._read()
        return ended

    @property
    def _num_places(self) -> int:
        return self._step.shape.num_rows if self._step is not None else 0

    def _is_sparse(self) -> bool:
        return len(self.rows) < MIN_ALIVE * self._num_places

    def _compose(self) -> None:
        """Place the rows that are alive, in depth-first order."""
        self._placed, self._changed, self._age = list(self.rows), False, 0
        self._lengths = [len(row.generated) for row in self._placed]
        if not self._placed:
            return
        self.num_compositions += 1
        num_rows = row_bucket(len(self._placed))
        padding = num_rows - len(self._placed)
        plan, self._num_node_keys = decode_plan(
            [row.path for row in self._placed],
            [row.start for row in self._placed],
            [length + 1 for length in self._lengths],
            padding,
            self._arena.dump_row,
            self._share,
        )
        sampler = BatchSampler.build(
            [row.request for row in self._placed],
            [row.generated for row in self._placed],
            num_rows,
            vocab_size(self._parts),
            torch.device("cpu"),
        )
        self._step = self._step_for(StepShape.holding(num_rows, plan, sampler))
        self._step.load(
            plan,
            sampler,
            [row.generated[-1] if row.generated else row.request.token_ids[-1] for row in self._placed],
            self._lengths,
            [len(row.request.token_ids) - 1 for row in self._placed],
            [row.request.max_new_tokens for row in self._placed],
        )

    def _step_for(self, shape: StepShape) -> DecodeStep:
        step = self._steps.pop(shape, None)
        if step is None:
            step = DecodeStep(self._parts, self._arena, shape, self._device)
            while len(self._steps) >= MAX_SHAPES:
                del self._steps[next(iter(self._steps))]
        self._steps[shape] = step
        return step

    def _launch(self) -> bool:
        """Queue one step, unless every row is full once the queued ones are done."""
        heard = [
            not row.done and length < row.request.max_new_tokens
            for row, length in zip(self._placed, self._lengths, strict=True)
        ]
        if not any(heard):
            return False
        step = self._step
        assert step is not None
        if step.num_runs == 0:  # whatever is compiled or allocated once must not happen while a graph is recorded
            step.run()
        else:
            if step.replay is None:
                step.replay = self._record(step.run)
            step.replay()
        step.num_runs += 1
        on_gpu = self._device.type == "cuda"
        out = step.out.to("cpu", non_blocking=True) if on_gpu else step.out.clone()
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._pending.append(_Pending(list(self._placed), out, event))
        self._age += 1
        self._lengths = [length + one for length, one in zip(self._lengths, heard, strict=True)]
        private = sum(length for length, one in zip(self._lengths, heard, strict=True) if one)
        self.counts.add(0, step.shape.num_rows, self._num_node_keys + private)  # who generated is known when read
        return True

    def _read_all(self) -> list[Row]:
        ended: list[Row] = []
        while self._pending:
            ended += self._read()
        return ended

    def _read(self) -> list[Row]:
        """Take in the oldest step that the host has not seen."""
        pending = self._pending.popleft()
        if pending.event is not None:
            pending.event.synchronize()
        tokens, logps = pending.out.tolist()
        alive = {id(row) for row in self.rows}
        ended: list[Row] = []
        for row, token, logp in zip(pending.rows, tokens, logps, strict=False):
            if id(row) not in alive:
                continue
            self.counts.num_rows += 1
            row.failed = token == NOT_FINITE
            if not row.failed:
                row.logps.append(logp)
                row.stop = self._stops.take(int(token), row.generated, row.request.max_new_tokens)
            if row.done:
                ended.append(row)
        if ended:
            self.drop(ended)
        return ended

    def _silence(self) -> None:
        if self._step is None:
            return
        alive = {id(row) for row in self.rows}
        self._step.limit([row.request.max_new_tokens if id(row) in alive else 0 for row in self._placed])


def cuda_graphs() -> Record:
    """Records steps as CUDA graphs that share one memory pool.

    Raises:
        EnvironmentProblem: by what is returned: the model's forward cannot be recorded.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise EnvironmentProblem(
                f"search.cuda_graphs: this model's forward cannot be recorded as a CUDA graph ({reason}); set "
                "search.cuda_graphs=false"
            ) from error
        replay: Callable[[], Any] = graph.replay
        return replay

    return record
