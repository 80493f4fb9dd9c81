"""Many searches at once: what they ask is put into common prefills and a common wave.

A round admits what fits, in the order of the searches: nodes that are missing are computed in one packed prefill, which
also answers the scorings; requests become rows of the wave; the wave makes one step. A search that has all its answers
goes on at once, and what it asks next fills the places that are free. An item is admitted only when the arena has all
the rows that it can ever need, so nothing that runs is ever taken back half way. When the arena is full, stored states
of searches that are not being read are dropped, to be computed again as they were; when even that is not enough, fewer
items run together; when not even one fits, the run ends with a sentence that names the option.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic

from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine.cuda_graph_batch import GraphWave
from cpo_fast.search.engine.decode_batch import Row, Wave
from cpo_fast.search.engine.forward_plans import Read, compute_nodes
from cpo_fast.search.engine.kv_arena import Arena, Node, Path, Trie
from cpo_fast.search.engine.requests import Answer, Ask, Features, Memory, R, Request, Sample, Scoring, Search
from cpo_fast.search.engine.stopping import Stops
from cpo_kernels.integrations.transformers.model import ModelParts, check_forward


@dataclass(eq=False)
class Job(Generic[R]):
    """One search in flight.

    Attributes:
        states: the trie of the prompts that it continues. trie: of the present ask, `states` or one of its own.
        paths: of each item of the ask, one; of a scoring, one for each continuation.
        pending: items not yet admitted. num_open: items without an answer.
    """

    name: str
    search: Search[R]
    states: Trie
    started: float
    trie: Trie
    ask: Ask = field(default_factory=lambda: Ask((), False))
    paths: list[list[Path]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    num_open: int = 0
    error: Exception | None = None
    result: Any = None
    done: bool = False


class Scheduler:
    """Answers the asks of searches.

    Args:
        parts: of a prepared model. arena, permanent: storage, and the trie of prompts that stay.
        stops: says when a row ends.
        max_rows: of the wave. max_searches: in flight. prefill_tokens: of one forward.
        features: what may be done.

    Attributes:
        wave: its counts say what was read. num_prefilled: tokens computed into nodes.
    """

    def __init__(
        self,
        parts: ModelParts,
        arena: Arena,
        permanent: Trie,
        stops: Stops,
        max_rows: int,
        max_searches: int,
        prefill_tokens: int,
        features: Features,
    ) -> None:
        self.wave: Wave | GraphWave = (
            GraphWave(parts, arena, stops, features.share, features.refill)
            if features.graphs
            else Wave(parts, arena, stops, features.share, features.refill)
        )
        self.num_prefilled = 0
        self._parts = parts
        self._arena = arena
        self._permanent = permanent
        self._stops = stops
        self._max_rows = max_rows
        self._max_searches = max_searches
        self._prefill_tokens = prefill_tokens
        self._jobs: list[Job[Any]] = []
        self._memory: Memory | None = None

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], memory: Memory | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        """As `request.Engine.run`."""
        coming = iter(searches)
        self._memory = memory
        try:
            self._take(coming)
            while self._jobs:
                if any(not job.done for job in self._jobs):
                    self._round()
                for job in [job for job in self._jobs if not job.done and job.num_open == 0]:
                    self._go_on(job)
                for job in [job for job in self._jobs if job.done]:
                    self._jobs.remove(job)
                    self._drop(job.states)
                    yield job.name, job.result, time.perf_counter() - job.started
                self._take(coming)
        finally:
            self._abandon()

    def _take(self, coming: Iterator[tuple[str, Search[Any]]]) -> None:
        """Begin searches as long as there is room for them."""
        while len(self._jobs) < self._max_searches and (entry := next(coming, None)) is not None:
            trie = Trie(base=self._permanent)
            job: Job[Any] = Job(entry[0], entry[1], trie, time.perf_counter(), trie)
            self._jobs.append(job)
            self._go_on(job, first=True)

    def _go_on(self, job: Job[Any], first: bool = False) -> None:
        """Give a search its answers, or its error, and take its next ask."""
        if job.trie is not job.states:
            self._drop(job.trie)
        try:
            ask = next(job.search) if first else self._send(job)
            while not self._accept(job, ask):
                ask = self._send(job)
        except StopIteration as stop:
            job.done, job.result = True, stop.value
        except Exception as error:
            job.done, job.result = True, error

    @staticmethod
    def _send(job: Job[Any]) -> Ask:
        error, job.error = job.error, None
        return job.search.throw(error) if error is not None else job.search.send(job.answers)

    def _accept(self, job: Job[Any], ask: Ask) -> bool:
        """Lay the prompts of an ask out in the trie; False where it needs no work, or cannot be answered."""
        memory = self._memory
        job.ask, job.answers = ask, [memory and memory.recall(job.name, item) for item in ask.items]
        job.pending = [index for index, answer in enumerate(job.answers) if answer is None]
        job.num_open = len(job.pending)
        job.trie = job.states if ask.keep else Trie(base=self._permanent)
        try:
            for item in ask.items:
                self._check(item)
        except ValueError as error:
            job.error, job.pending, job.num_open = error, [], 0
            return False
        prompts: list[tuple[int, ...]] = []
        limits: list[int] = []
        for item in ask.items:
            for prompt, limit in _sequences(item):
                prompts.append(prompt)
                limits.append(limit)
        found = iter(job.trie.insert(prompts, limits))
        job.paths = [[next(found) for _ in _sequences(item)] for item in ask.items]
        for paths, answer in zip(job.paths, job.answers, strict=True):
            if answer is not None:  # its nodes were computed once, so later prompts must not cut them now either
                for node in (node for path in paths for node, _ in path):
                    node.fixed = True
        return bool(job.pending)

    def _check(self, item: Request | Scoring) -> None:
        longest = item.max_new_tokens if isinstance(item, Request) else max(map(len, item.continuations), default=0)
        if not item.token_ids:
            raise ValueError("the prompt has no tokens")
        total = len(item.token_ids) + longest
        limit = getattr(self._parts.config, "max_position_embeddings", None)
        if limit is not None and total > limit:
            raise ValueError(
                f"prompt of {len(item.token_ids)} tokens and up to {longest} new ones exceed the model's {limit} positions"
            )
        check_forward(self._parts.causal_lm, self._parts, total)

    def _round(self) -> None:
        """Admit, prefill, score, and one step of the wave."""
        missing: dict[int, Node] = {}
        reads: list[Read] = []
        scored: list[tuple[Job[Any], int]] = []
        rows: list[Row] = []
        room = self.wave.room(self._max_rows)
        for job in self._jobs:
            while job.pending:
                index = job.pending[0]
                item = job.ask.items[index]
                if isinstance(item, Request) and len(rows) >= room:
                    break
                nodes = [node for path in job.paths[index] for node, _ in path]
                start = self._reserve(nodes, item.max_new_tokens if isinstance(item, Request) else 0, missing)
                if start is None:
                    break
                job.pending.pop(0)
                if isinstance(item, Request):
                    rows.append(Row(item, job, index, job.paths[index][0], start))
                else:
                    scored.append((job, index))
                    reads.extend(_reads(item, job.paths[index]))
        if not rows and not scored and not self.wave.rows and any(job.pending for job in self._jobs):
            raise OutOfMemory(
                f"the KV arena of {self._arena.num_tokens} tokens cannot hold one prompt and its longest continuation; "
                "raise search.arena_tokens, or lower search.max_thought_tokens"
            )
        found = compute_nodes(self._parts, self._arena, list(missing.values()), self._prefill_tokens, reads)
        self.num_prefilled += sum(len(node) for node in missing.values())
        for job, index in scored:
            self._answer_scoring(job, index, found)
        if rows:
            self.wave.add(rows)
        if self.wave.rows:
            for row in self.wave.step():
                self._retire(row)

    def _reserve(self, nodes: list[Node], num_private: int, missing: dict[int, Node]) -> int | None:
        """Arena rows for nodes that have none (added to `missing`) and for a row's own tokens; None: nothing was kept."""
        for node in nodes:
            node.num_users += 1
        taken: list[Node] = []
        for node in nodes:
            if node.start is None:
                node.start = self._allocate(len(node))
                if node.start is None:
                    break
                taken.append(node)
        start: int | None
        if all(node.start is not None for node in nodes):
            start = self._allocate(num_private) if num_private else 0
            if start is not None:
                missing.update((node.number, node) for node in taken)
                return start
        for node in taken:
            self._release(node)
        for node in nodes:
            node.num_users -= 1
        return None

    def _allocate(self, count: int) -> int | None:
        start = self._arena.allocate(count)
        if start is not None:
            return start
        for job in reversed(self._jobs):
            for node in reversed(job.states.nodes):
                if node.start is not None and node.num_users == 0:
                    self._release(node)
                    start = self._arena.allocate(count)
                    if start is not None:
                        return start
        return None

    def _answer_scoring(self, job: Job[Any], index: int, found: dict[tuple[int, int, int], float]) -> None:
        item = job.ask.items[index]
        assert isinstance(item, Scoring)
        paths = job.paths[index]
        values: list[float] = []
        for continuation, path in zip(item.continuations, paths, strict=True):
            total = 0.0
            for place, token in enumerate(continuation):
                node, offset = _locate(path, len(item.token_ids) - 1 + place)
                total += found[node.number, offset, token]
            values.append(total)
        if any(value != value or value == float("inf") for value in values):
            job.error = ValueError("the model's logits are not finite; check the weights and the dtype")
        self._take_answer(job, index, values)
        for path in paths:
            for node, _ in path:
                node.num_users -= 1
        if job.trie is not job.states and job.pending:
            # a later scoring of this ask reads its own tokens, so they must be computed with it
            self._drop(job.trie)

    def _retire(self, row: Row) -> None:
        job: Job[Any] = row.owner
        self._free_row(row)
        if row.failed:
            job.error = ValueError("the model's logits are not finite; check the weights and the dtype")
        text = self._stops.text(row.generated)
        self._take_answer(job, row.index, Sample(tuple(row.generated), text, row.stop or "length", tuple(row.logps)))

    def _take_answer(self, job: Job[Any], index: int, answer: Answer) -> None:
        job.answers[index] = answer
        job.num_open -= 1
        if self._memory is not None and job.error is None:
            self._memory.note(job.name, job.ask.items[index], answer)

    def _free_row(self, row: Row) -> None:
        self._arena.release(row.start, row.request.max_new_tokens)
        for node, _ in row.path:
            node.num_users -= 1

    def _drop(self, trie: Trie) -> None:
        for node in trie.nodes:
            if node.start is not None and node.num_users == 0:
                self._release(node)

    def _release(self, node: Node) -> None:
        assert node.start is not None
        self._arena.release(node.start, len(node))
        node.start = None

    def _abandon(self) -> None:
        """Give everything back; only permanent nodes stay."""
        for row in self.wave.rows:
            self._free_row(row)
        self.wave.drop(self.wave.rows)
        for job in self._jobs:
            for trie in (job.trie, job.states):
                self._drop(trie)
            job.search.close()
        self._jobs = []


def _sequences(item: Request | Scoring) -> list[tuple[tuple[int, ...], int]]:
    """What an item needs in the trie, and how many leading tokens of it may be there already."""
    if isinstance(item, Request):
        return [(item.token_ids[:-1], len(item.token_ids) - 1)]
    return [((*item.token_ids, *continuation[:-1]), len(item.token_ids) - 1) for continuation in item.continuations]


def _reads(item: Scoring, paths: list[Path]) -> list[Read]:
    first = len(item.token_ids) - 1
    return [
        (*_locate(path, first + place), token)
        for continuation, path in zip(item.continuations, paths, strict=True)
        for place, token in enumerate(continuation)
    ]


def _locate(path: Path, position: int) -> tuple[Node, int]:
    """The token of a path at a position: its node, and which of the node's tokens it is."""
    for node, used in path:
        if node.position <= position < node.position + used:
            return node, position - node.position
    raise AssertionError(f"no token at position {position}")
