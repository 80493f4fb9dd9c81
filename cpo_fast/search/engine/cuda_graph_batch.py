"""A decode batch whose steps are recorded as CUDA graphs, so that the device runs ahead and the host reads a step behind.

    device   step 1   step 2   step 3   ...
    host              read 1   read 2   ...

Requests keep their batch slots from step to step, so that all a step needs is what the step before left on the device:

    step:   read token, attend, sample -> token.   Position, KV slot and length grow by one

A finished request is masked at once. Between rebuilds of the batch one CUDA graph is replayed: the host plans nothing and
waits for nothing.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from cpo_fast.errors import EnvironmentProblem
from cpo_fast.search.engine.decode_batch import DecodeBatch, RunningRequest
from cpo_fast.search.engine.forward_plans import ModelRunner
from cpo_fast.search.engine.sampler import BatchSampler
from cpo_fast.search.engine.stopping import StopChecker
from cpo_kernels.device import to_device
from cpo_kernels.tree_decode import DecodePlan

# batch slots: fine where a wasted one costs most, coarse where few shapes must serve many batches
SLOT_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Buckets of all else begin at so many and double: every shape that is recorded costs a tenth of a second and memory. An
# item too many is a program that ends at once, a partial and a uniform too many are memory that nobody touches.
ITEMS_PER_SLOT, PARTIALS_PER_SLOT, NUM_UNIFORMS = 0.5, 16, 128
LAG = 1  # steps that the device is ahead of the host
REFILL_STEPS = 8  # a rebuild costs the host a few milliseconds, a request that waits a step costs its share of one
MIN_ACTIVE = 0.75  # of the batch slots. Below, a smaller bucket saves more than the rebuild costs
MAX_SHAPES = 32  # recorded steps that are kept

# of samplers, and what cuts nothing off
CUTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "top_p": lambda num_slots, vocab_size: torch.ones(num_slots, dtype=torch.float64),
    "top_k": lambda num_slots, vocab_size: torch.full((num_slots,), vocab_size),
}

Record = Callable[[Callable[[], None]], Callable[[], Any]]  # a step -> what repeats it


def slot_bucket(count: int) -> int:
    """The number of batch slots that `count` requests take."""
    largest = SLOT_BUCKETS[-1]
    return next((bucket for bucket in SLOT_BUCKETS if bucket >= count), -(-count // largest) * largest)


def doubled_bucket(count: int, least: int) -> int:
    """The first of `least`, 2 `least`, 4 `least`, .. that is at least `count`."""
    while least < count:
        least *= 2
    return least


class DecodeStep:
    """A decode step over B batch slots that the device takes alone: the host reads nothing in it and changes nothing.

    A step that was recorded once is replayed for any plan and sampler of the same shapes.

    Args:
        runner: the model.
        plan, sampler: of B rows, on the host. What the step reads has their shapes.

    Attributes:
        out: [2, B] float64, the tokens that the last step chose (exact: ids are below 2^53) and their raw log-probs.
        num_slots: B. num_runs: how often the step was taken.
        replay: repeats `run`. None until it is recorded.
    """

    def __init__(self, runner: ModelRunner, plan: DecodePlan, sampler: BatchSampler) -> None:
        self.num_slots = len(plan.slots)
        self.num_runs = 0
        self.replay: Callable[[], Any] | None = None
        self._runner = runner
        plan = replace(plan, num_arena_rows=runner.arena.num_tokens + 1, is_reused=True)
        self._plan, self._sampler = to_device(plan, runner.device), to_device(sampler, runner.device)
        self._state = torch.zeros(5, self.num_slots, dtype=torch.int64, device=runner.device)
        # of each slot: the token it reads next, tokens generated, their cap, where the prompt ends, its own KV slots
        self._token, self._length, self._max_length = self._state[:3]
        self._firsts = self._state[3:]
        self._padding_slot = torch.full((), runner.arena.padding_slot, device=runner.device)
        self.out = torch.zeros(2, self.num_slots, dtype=torch.float64, device=runner.device)

    def load(self, requests: Sequence[RunningRequest], plan: DecodePlan, sampler: BatchSampler) -> None:
        """Put requests into the first slots, in order. Those beyond stay masked. Does not wait for the device."""
        # into the places that the recorded step reads
        for name in ("items", "item_depth", "partial_offsets", "partial_index", "suffix_start", "suffix_depth"):
            self._put(getattr(self._plan, name), getattr(plan, name))
        for name, target in vars(self._sampler).items():
            if isinstance(target, torch.Tensor):
                self._put(target, getattr(sampler, name))
        columns = [
            (one.last_token, len(one.generated), one.request.max_new_tokens, one.first_position, one.first_slot)
            for one in requests
        ]
        columns += [(0,) * 5] * (self.num_slots - len(requests))  # a cap of 0 masks
        self._put(self._state, torch.tensor(columns).T.contiguous())

    def limit(self, max_lengths: Sequence[int]) -> None:
        """Set the caps of the first slots. 0 masks one from the next step on."""
        padded = [*max_lengths, *[0] * (self.num_slots - len(max_lengths))]
        self._put(self._max_length, torch.tensor(padded))

    def run(self) -> None:
        """Take one step: every active slot gets a token, in `out`."""
        # Finished requests keep running, because a CUDA graph has a fixed shape. They are masked: keys and values go to
        # the padding slot and the token is ignored.
        active = self._length < self._max_length  # [B] bool
        positions, own_slots = self._firsts + self._length  # [2, B] both in one kernel
        torch.where(active, own_slots, self._padding_slot, out=self._plan.slots)
        torch.mul(active, self._length + 1, out=self._plan.suffix_len)
        hidden = self._runner.forward(self._token, positions, self._plan)  # [B, E]
        tokens, logps = self._sampler.sample(self._runner.logits(hidden), self._length, self._runner.impl)
        self.out[0].copy_(tokens)
        self.out[1].copy_(logps)
        torch.clamp_min(tokens, 0, out=self._token)  # `NOT_FINITE` is no id that the next step could read
        self._length.add_(active)

    def _put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(to_device(source, self._runner.device))


@dataclass(eq=False)
class _Pending:
    """Tokens on their way to the host."""

    requests: list[RunningRequest]
    out: torch.Tensor  # [2, B] float64, on the host
    event: torch.cuda.Event | None  # when they are there; None on a CPU


class CudaGraphBatch(DecodeBatch):
    """As `DecodeBatch`, for a device that is faster than the host.

    Args:
        record: makes a step repeatable. None records CUDA graphs.

    Attributes:
        running: those that have not ended, as far as the host has read.
        num_rebuilds: how often requests were put into slots.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stop_checker: StopChecker,
        *,
        share: bool = True,
        refill: bool = True,
        record: Record | None = None,
    ) -> None:
        super().__init__(runner, stop_checker, share=share, refill=refill)
        self.num_rebuilds = 0
        self._make_record = cuda_graphs if record is None else lambda: record
        self._record = self._make_record()
        # by the shapes of what they read, least recently used first
        self._steps: dict[tuple[Any, ...], DecodeStep] = {}
        self._step: DecodeStep | None = None
        self._num_node_keys = 0
        self._lengths: list[int] = []  # of the requests in slots, once all that was launched is done
        self._age = 0  # steps since the last rebuild
        self._pending: deque[_Pending] = deque()
        self._cuts: set[str] = set()  # those that a request has asked for

    def num_free(self, max_running: int) -> int:
        # the slots stay as they are between rebuilds
        if self.running and self._age < REFILL_STEPS and not self._is_sparse():
            return 0
        return super().num_free(max_running)

    @torch.inference_mode()
    def drop(self, requests: Sequence[RunningRequest]) -> None:
        # what they still write is ordered before whatever the host asks for next
        super().drop(requests)
        if self._step is not None:
            active = set(self.running)
            self._step.limit([one.request.max_new_tokens if one in active else 0 for one in self._in_slots])

    def forget_weights(self) -> None:
        """Drop what was recorded: the weights, or which of them take part, have changed."""
        assert not self.running, "weights changed while requests were generated"
        self._pending.clear()
        self._steps.clear()
        self._step, self._in_slots, self._lengths = None, [], []
        self._record = self._make_record()  # with a memory pool of its own

    @torch.inference_mode()
    def step(self) -> list[RunningRequest]:
        """Let every request generate one token more. Returns those known to have ended, which have left the batch."""
        if not self.running:
            return []
        ended: list[RunningRequest] = []
        is_new = not set(self.running) <= set(self._in_slots)
        # a sparse batch is rebuilt only where a smaller bucket is won
        if is_new or (self._is_sparse() and slot_bucket(len(self.running)) < self._num_slots):
            while self._pending:  # a rebuild needs every token, so here the host catches up
                ended += self._read()
            self._rebuild()
        launched = self._launch()
        while len(self._pending) > (LAG if launched else 0):  # nothing launched: the last steps are read at once
            ended += self._read()
        return ended

    @property
    def _num_slots(self) -> int:
        return self._step.num_slots if self._step is not None else 0

    def _is_sparse(self) -> bool:
        return len(self.running) < MIN_ACTIVE * self._num_slots

    def _rebuild(self) -> None:
        """Put the running requests into slots, in depth-first order."""
        self._in_slots, self._age = self.running, 0
        self._lengths = [len(one.generated) for one in self.running]
        if not self.running:
            return
        self.num_rebuilds += 1
        num_slots = slot_bucket(len(self.running))
        plan, self._num_node_keys = self._plan(self.running, num_slots - len(self.running))
        plan = plan.padded(
            doubled_bucket(len(plan.items), int(ITEMS_PER_SLOT * num_slots)),
            doubled_bucket(plan.num_partials, PARTIALS_PER_SLOT * num_slots),
        )
        sampler = self._build_sampler(num_slots, torch.device("cpu"))
        num_uniforms = sampler.uniforms.shape[1]
        sampler.uniforms = pad(sampler.uniforms, (0, doubled_bucket(num_uniforms, NUM_UNIFORMS) - num_uniforms))
        self._cuts |= {name for name in CUTS if getattr(sampler, name) is not None}
        for name in self._cuts:  # once asked for, for good: a batch without it needs no recording of its own
            if getattr(sampler, name) is None:
                setattr(sampler, name, CUTS[name](num_slots, self._runner.vocab_size))
        # whatever has a shape, or is read by Python while the step is recorded
        inputs = (plan.slots, plan.items, plan.partial_index, *vars(sampler).values())
        shape = tuple(value.shape if isinstance(value, torch.Tensor) else value for value in inputs)
        self._step = self._steps.pop(shape, None) or DecodeStep(self._runner, plan, sampler)
        while len(self._steps) >= MAX_SHAPES:  # the first of a dictionary was put in, and so used, longest ago
            del self._steps[next(iter(self._steps))]
        self._steps[shape] = self._step
        self._step.load(self.running, plan, sampler)

    def _launch(self) -> bool:
        """Queue one step, unless every request is finished or full once the queued ones are done."""
        running = set(self.running)
        active = [
            one in running and length < one.request.max_new_tokens
            for one, length in zip(self._in_slots, self._lengths, strict=True)
        ]
        if not any(active):
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
        on_gpu = self._runner.device.type == "cuda"
        # a copy of its own, because the next step writes to the same place
        out = step.out.to("cpu", non_blocking=True) if on_gpu else step.out.clone()
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._pending.append(_Pending(self._in_slots, out, event))
        self._age += 1
        self._lengths = [length + one for length, one in zip(self._lengths, active, strict=True)]
        num_own_keys = sum(length for length, one in zip(self._lengths, active, strict=True) if one)
        self._count_step(step.num_slots, self._num_node_keys + num_own_keys)
        return True

    def _read(self) -> list[RunningRequest]:
        """Take in the oldest step that the host has not seen."""
        pending = self._pending.popleft()
        if pending.event is not None:
            pending.event.synchronize()
        tokens, logps = pending.out.tolist()
        running = set(self.running)
        # a request that ended in the step before got one token more, which is ignored
        slots = [slot for slot, one in enumerate(pending.requests) if one in running]
        return self._receive(
            [pending.requests[slot] for slot in slots],
            [int(tokens[slot]) for slot in slots],
            [logps[slot] for slot in slots],
        )


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
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the forward
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
