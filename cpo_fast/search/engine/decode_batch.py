"""The decode batch: requests that generate side by side, one forward for one token of each.

What stands before the last token of a request's prompt is in the KV trie. A request that has finished leaves at once, and
its batch slot is free for another. A request's tokens depend on its own path and parameters alone, so who is beside it
changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cpo_fast.search.engine.forward_plans import ModelRunner, decode_plan
from cpo_fast.search.engine.kv_arena import KVPath
from cpo_fast.search.engine.requests import SampleRequest
from cpo_fast.search.engine.sampler import BatchSampler
from cpo_fast.search.engine.stopping import StopChecker
from cpo_fast.tree import Stop
from cpo_kernels.device import to_device
from cpo_kernels.sample_tokens import NOT_FINITE
from cpo_kernels.tree_decode import DecodePlan


@dataclass(eq=False)
class RunningRequest:
    """One request that is being generated.

    Attributes:
        request: what is asked. owner, index: whose it is, and which of the owner's items.
        path: nodes of the prompt without its last token. first_slot: of the `max_new_tokens` KV slots of its own.
        keep: what it computes is wanted when its line has ended.
        generated, logps: ids and raw log-probs so far. stop: why it ended. failed: its logits were not finite.
        leader: one that has the same prompt and has generated the same, whose slots hold the keys and values of both.
    """

    request: SampleRequest
    owner: Any
    index: int
    path: KVPath
    first_slot: int
    keep: bool = False
    generated: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stop: Stop | None = None
    failed: bool = False
    leader: "RunningRequest" = field(init=False)

    def __post_init__(self) -> None:
        self.leader = self

    @property
    def last_token(self) -> int:
        """What its next forward reads."""
        # at first the prompt's last token, so that the first logits come from the same kind of forward as all that follow
        return self.generated[-1] if self.generated else self.request.token_ids[-1]

    @property
    def is_continued(self) -> bool:
        """Whether its tokens may be followed by more, its own or of another request."""
        return not self.failed and (self.stop is None or (self.keep and self.stop == "newline"))

    @property
    def leaves_node(self) -> bool:
        """Whether its slots hold, at its end, keys and values that another prompt may begin with."""
        return self.is_continued and self.leader is self

    @property
    def first_position(self) -> int:
        """Position of the prompt's last token, which the first forward reads."""
        return len(self.request.token_ids) - 1


@dataclass(eq=False)
class DecodeCounts:
    """What was computed: decode steps, tokens that requests got, batch slots, keys read (a shared one once)."""

    num_steps: int = 0
    num_tokens: int = 0
    num_slots: int = 0
    num_keys: int = 0


class DecodeBatch:
    """Requests that generate side by side. On a CPU those that continue equal tokens are one row of a step.

    Args:
        runner: the model. stop_checker: says when a request ends.
        share: a node that requests share is read once for all of them. False: once for each, for measurements.
        refill: batch slots of finished requests are filled while others still run. False: when all have ended.

    Attributes:
        running: in depth-first order.
        counts: of what was computed.
    """

    def __init__(
        self, runner: ModelRunner, stop_checker: StopChecker, *, share: bool = True, refill: bool = True
    ) -> None:
        self.running: list[RunningRequest] = []
        self.counts = DecodeCounts()
        self._runner, self._stop_checker = runner, stop_checker
        self._share, self._refill = share, refill
        # where a row costs more than copies of keys do, and its bits are the same in every batch
        self._shares_rows = share and runner.device.type == "cpu"
        self._in_slots: list[RunningRequest] = []  # as the batch was built last
        self._sampler: BatchSampler | None = None

    def num_free(self, max_running: int) -> int:
        return max(0, max_running - len(self.running)) if self._refill or not self.running else 0

    def add(self, requests: Sequence[RunningRequest]) -> None:
        """Let more requests take part from the next step on."""
        if not requests:
            return
        if self._shares_rows:
            leaders: dict[tuple[int, int], RunningRequest] = {}
            for one in requests:  # of one path and last token is one prompt: nodes are equal by identity
                one.leader = leaders.setdefault((id(one.path), one.last_token), one)
        # depth first: requests below one node stand together, so that it is read once for them
        self.running = sorted([*self.running, *requests], key=lambda one: [node.number for node, _ in one.path])

    def drop(self, requests: Sequence[RunningRequest]) -> None:
        gone = set(requests)
        self.running = [one for one in self.running if one not in gone]

    def forget_weights(self) -> None:
        """Drop what holds on to weights, because they have changed. A plain batch holds nothing."""

    @torch.inference_mode()
    def step(self) -> list[RunningRequest]:
        """Generate one token for each request. Returns those that ended with it, which have left the batch."""
        if not self.running:
            return []
        device, requests = self._runner.device, self.running
        place = {leader: row for row, leader in enumerate(dict.fromkeys(one.leader for one in requests))}
        leaders = list(place)
        padding = self._runner.num_padding(len(leaders))
        positions = [one.first_position + len(one.generated) for one in leaders]
        plan, num_node_keys = self._plan(leaders, padding)
        # own keys: those generated, and the one that this step writes
        self._count_step(len(requests) + padding, num_node_keys + sum(len(one.generated) + 1 for one in leaders))
        hidden = self._runner.forward(  # [N, E], padding included
            torch.tensor([one.last_token for one in leaders] + [0] * padding, device=device),
            torch.tensor(positions + [0] * padding, device=device),
            to_device(plan, device),
        )
        if self._sampler is None or self._in_slots != requests:  # else its tables still fit
            self._in_slots = requests
            self._sampler = self._build_sampler(len(requests), device)
        logits = self._runner.logits(hidden[: len(leaders)])  # [R, V] float32
        if len(leaders) < len(requests):
            logits = logits[[place[one.leader] for one in requests]]  # [B, V]
        lengths = torch.tensor([len(one.generated) for one in requests], device=device)
        tokens, logps = (values.tolist() for values in self._sampler.sample(logits, lengths, self._runner.impl))
        ended = self._receive(requests, tokens, logps)
        if len(leaders) < len(requests):
            self._part(zip(requests, tokens, strict=True))
        return ended

    def _part(self, chosen: Iterable[tuple[RunningRequest, int]]) -> None:
        """Requests part from their leader where it has ended and they have not, or where it chose another token."""
        going_on = [(one, token) for one, token in chosen if one.is_continued]
        leaders = {(one.leader, token, one.stop): one for one, token in going_on if one.leader is one}
        sources: list[int] = []
        targets: list[int] = []
        for one, token in going_on:
            before = one.leader
            one.leader = leaders.setdefault((before, token, one.stop), one)
            if one.leader is one is not before:  # its leader's slots are still as this step left them
                sources += range(before.first_slot, before.first_slot + len(one.generated))
                targets += range(one.first_slot, one.first_slot + len(one.generated))
        if sources:
            self._runner.arena.copy(sources, targets)

    def _plan(self, requests: Sequence[RunningRequest], num_padding: int) -> tuple[DecodePlan, int]:
        """The plan of the next step of requests, a row each, and how many keys of nodes it reads."""
        return decode_plan(
            [one.path for one in requests],
            [one.first_slot for one in requests],
            [len(one.generated) + 1 for one in requests],
            num_padding,
            self._runner.arena.padding_slot,
            self._share,
        )

    def _build_sampler(self, num_rows: int, device: torch.device) -> BatchSampler:
        requests, generated = [one.request for one in self.running], [one.generated for one in self.running]
        return BatchSampler.build(requests, generated, num_rows, self._runner.vocab_size, device)

    def _count_step(self, num_slots: int, num_keys: int) -> None:
        self.counts.num_steps += 1
        self.counts.num_slots += num_slots
        self.counts.num_keys += num_keys

    def _receive(
        self, requests: Sequence[RunningRequest], tokens: Sequence[int], logps: Sequence[float]
    ) -> list[RunningRequest]:
        """Give requests the token that a step chose for each. Returns those that ended, which leave the batch."""
        self.counts.num_tokens += len(requests)
        for one, token, logp in zip(requests, tokens, logps, strict=True):
            one.failed = token == NOT_FINITE
            if not one.failed:
                one.logps.append(logp)
                one.stop = self._stop_checker.append(token, one.generated, one.request)
        ended = [one for one in requests if one.failed or one.stop is not None]
        if ended:
            self.drop(ended)
        return ended
