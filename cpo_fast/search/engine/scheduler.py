"""Many searches at once: what they ask is put into common prefills and one decode batch.

`Scheduler.step` is one round: it admits what fits, computes the prompts that are missing in one packed prefill, answers
the score requests from it, and takes one decode step for every running request. A search that has all its answers goes
on at once, and what it asks next fills the free batch slots.

When the arena is full, stored nodes that nothing reads are dropped, to be computed again as they were. When that is not
enough, fewer requests run together.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from cpo_fast.config import SearchConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine.decode_batch import DecodeBatch, RunningRequest
from cpo_fast.search.engine.forward_plans import ModelRunner, Read, compute_nodes
from cpo_fast.search.engine.kv_arena import MIN_SHARED, KVNode, KVPath, KVTrie
from cpo_fast.search.engine.requests import (
    Answer,
    AnswerCache,
    R,
    Requests,
    Sample,
    SampleRequest,
    ScoreRequest,
    Search,
    answer_to_nothing,
    check_length,
)
from cpo_fast.search.engine.sampler import NOT_FINITE_MESSAGE
from cpo_fast.search.engine.stopping import StopChecker
from cpo_kernels.integrations.transformers.proof import check_path


@dataclass(eq=False)
class ActiveSearch:
    """One search in flight.

    Attributes:
        states: the trie of the prompts that it continues, and of what was generated behind them. verdicts: of prompts that
            nothing continues, of which what several share is kept. trie: that of the present requests.
        passing: of each trie, nodes that the next prompts take out unless they begin with them.
        paths: of each request, one. Of a score request, one for each continuation.
        pending: requests not yet admitted. num_open: requests without an answer.
        reads: of the score requests without an answer, what is read for each continuation. logps: what was read so far.
    """

    name: str
    search: Search[Any]
    states: KVTrie
    verdicts: KVTrie
    started: float
    trie: KVTrie = field(init=False)
    passing: dict[KVTrie, set[KVNode]] = field(default_factory=dict)
    requests: Requests = field(init=False)
    paths: list[list[KVPath]] = field(default_factory=list)
    answers: Any = None  # `send(None)` starts a generator
    pending: list[int] = field(default_factory=list)
    num_open: int = 0
    reads: dict[int, list[list[Read]]] = field(default_factory=dict)
    logps: dict[Read, float] = field(default_factory=dict)
    error: Exception | None = None
    result: Any = None
    done: bool = False

    def __post_init__(self) -> None:
        self.trie = self.states


class Scheduler:
    """Answers what searches ask.

    Args:
        runner: the model and its arena. permanent: the trie of prompts that stay.
        batch: generates. stop_checker: gives the text of what was generated.
        config: `batch_size`, `questions_in_flight` and `prefill_tokens`.

    Attributes:
        batch: its counts say what was read. num_prefilled: tokens computed into nodes.
        num_thoughts: samples that are finished, verdicts left out.
    """

    def __init__(
        self,
        runner: ModelRunner,
        permanent: KVTrie,
        batch: DecodeBatch,
        stop_checker: StopChecker,
        config: SearchConfig,
    ) -> None:
        self.batch = batch
        self.num_prefilled = self.num_thoughts = 0
        self._runner, self._arena, self._permanent = runner, runner.arena, permanent
        self._stop_checker = stop_checker
        self._config = config
        self._batch_size, self._questions_in_flight = config.side_by_side(runner.is_tiny)
        # where attention gives keys the same bits whichever forward computes them and however paths are cut into nodes, as
        # all else does in float32
        self._is_exact = runner.impl == "native"
        self._active: list[ActiveSearch] = []
        self._cache: AnswerCache | None = None

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        with _fewer_objects_to_collect():
            yield from self._run(iter(searches), cache)

    def _run(
        self, waiting: Iterator[tuple[str, Search[R]]], cache: AnswerCache | None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        self._cache = cache
        try:
            self._start(waiting)
            while self._active:
                if not all(active.done for active in self._active):
                    self.step()
                for active in [active for active in self._active if not active.done and active.num_open == 0]:
                    self._resume(active)
                for active in [active for active in self._active if active.done]:
                    self._active.remove(active)
                    self._drop_unused([*active.states.nodes, *active.verdicts.nodes])
                    yield active.name, active.result, time.perf_counter() - active.started
                self._start(waiting)
        finally:
            self._abandon()

    def step(self) -> None:
        """One round: admit, prefill, answer score requests, decode one token for each running request."""
        nodes, running, scored = self._admit()
        computed = set(nodes)
        # also for score requests that wait: what they read is not computed again for them while it is stored
        reads = [
            (active, [read for read in chain(*chain(*active.reads.values())) if read[0] in computed])
            for active in self._active
            if computed
        ]
        logps = compute_nodes(
            self._runner, nodes, self._config.prefill_tokens, list(chain.from_iterable(some for _, some in reads))
        )
        for active, some in reads:
            active.logps.update((read, logps[read]) for read in some)
        self.num_prefilled += sum(map(len, nodes))
        for active, index in scored:
            self._finish_scores(active, index)
        self.batch.add(running)
        for ended in self.batch.step():
            self._finish_sample(ended)

    def _start(self, waiting: Iterator[tuple[str, Search[Any]]]) -> None:
        """Begin searches as long as there is room for them."""
        while len(self._active) < self._questions_in_flight and (entry := next(waiting, None)) is not None:
            states, verdicts = (KVTrie(self._permanent, 1 if self._is_exact else MIN_SHARED) for _ in range(2))
            active = ActiveSearch(*entry, states, verdicts, time.perf_counter())
            self._active.append(active)
            self._resume(active)

    def _resume(self, active: ActiveSearch) -> None:
        """Give a search its answers, or its error, until it asks for something that must be computed."""
        try:
            while not active.pending:  # all answered by the cache, or refused: it may go on at once
                if active.trie is active.verdicts:
                    alone = set(active.verdicts.nodes) - _shared_nodes(active)
                    if self._is_exact:
                        active.passing[active.verdicts] = alone
                    else:  # more and smaller nodes on a path, which a GPU would have to read
                        self._take_out(active.verdicts, alone)
                refused, active.error = active.error, None  # raised at the search's `yield`, once
                search = active.search
                self._accept(active, search.throw(refused) if refused else search.send(active.answers))
        except StopIteration as stop:
            active.done, active.result = True, stop.value
        except Exception as error:
            active.done, active.result = True, error

    def _accept(self, active: ActiveSearch, requests: Requests) -> None:
        """Lay the prompts of new requests out in the trie. None is pending when all are known, or one is refused."""
        cache = self._cache
        try:
            lengths = dict.fromkeys((len(item.token_ids), item.max_new_tokens) for item in requests.items)
            for num_tokens, num_new in (min(lengths), max(lengths, key=sum)) if lengths else ():
                self._check(num_tokens, num_new)  # where these pass, all do
        except ValueError as error:
            active.error = error
            return
        active.requests = requests
        active.trie = active.states if requests.keep else active.verdicts
        active.answers = [None if cache is None else cache.get(active.name, item) for item in requests.items]
        for index, item in enumerate(requests.items):
            if (answer := answer_to_nothing(item)) is not None:
                active.answers[index] = answer
        # what a score request reads must be computed with it, so only the prompt's tokens before the last may be there
        prompts = [_prompts(item) for item in requests.items]
        limits = [len(item.token_ids) - 1 for item, some in zip(requests.items, prompts, strict=True) for _ in some]
        paths = iter(active.trie.insert(list(chain(*prompts)), limits))
        active.paths = [list(islice(paths, len(some))) for some in prompts]
        passing = active.passing.pop(active.trie, set())
        self._take_out(active.trie, passing.difference(node for node, _ in chain(*chain(*active.paths))))
        for item_paths, answer in zip(active.paths, active.answers, strict=True):
            if answer is not None:  # its nodes were computed once, so later prompts must not split them now either
                for node in (node for path in item_paths for node, _ in path):
                    node.fixed = True
        active.pending = [index for index, answer in enumerate(active.answers) if answer is None]
        active.num_open = len(active.pending)
        active.logps = {}
        active.reads = {
            index: _reads(item, active.paths[index])
            for index, item in enumerate(requests.items)
            if active.answers[index] is None and isinstance(item, ScoreRequest)
        }

    def _check(self, num_tokens: int, num_new_tokens: int) -> None:
        parts = self._runner.parts
        check_length(num_tokens, num_new_tokens, getattr(parts.config, "max_position_embeddings", None))
        check_path(parts, num_tokens + num_new_tokens)

    def _admit(self) -> tuple[list[KVNode], list[RunningRequest], list[tuple[ActiveSearch, int]]]:
        """Take pending requests, in the order of the searches, as far as KV slots and batch slots go.

        Returns:
            Nodes to compute, sample requests that join the decode batch, and score requests: whose each is, and which of
            the owner's items.

        Raises:
            OutOfMemory: nothing runs that could end and make room, and none fits.
        """
        nodes, running, scored = self._take_pending()
        is_stuck = not (running or scored or self.batch.running) and any(active.pending for active in self._active)
        if is_stuck:  # what nothing reads may lie between free intervals that are large enough together
            for active in self._active:
                self._drop_unused([*active.states.nodes, *active.verdicts.nodes])
            nodes, running, scored = self._take_pending()
            if not (running or scored):
                raise OutOfMemory(
                    f"the KV arena of {self._arena.num_tokens} tokens cannot hold one prompt and its longest continuation; "
                    "raise search.arena_tokens, or lower search.max_thought_tokens"
                )
        return nodes, running, scored

    def _take_pending(self) -> tuple[list[KVNode], list[RunningRequest], list[tuple[ActiveSearch, int]]]:
        nodes: list[KVNode] = []
        running: list[RunningRequest] = []
        scored: list[tuple[ActiveSearch, int]] = []
        num_free = self.batch.num_free(self._batch_size)
        for active in self._active:
            while active.pending:
                index = active.pending[0]
                item, paths = active.requests.items[index], active.paths[index]
                num_own = item.max_new_tokens if isinstance(item, SampleRequest) else 0
                if isinstance(item, SampleRequest) and len(running) >= num_free:
                    break
                # every slot that it can ever need, so nothing that runs is taken back half way
                first_slot = self._reserve([node for path in paths for node, _ in path], num_own, nodes)
                if first_slot is None:
                    break  # a later request of this search does not overtake
                active.pending.pop(0)
                if isinstance(item, SampleRequest):
                    keep = self._is_exact and active.requests.keep
                    running.append(RunningRequest(item, active, index, paths[0], first_slot, keep))
                else:
                    scored.append((active, index))
        return nodes, running, scored

    def _reserve(self, nodes: list[KVNode], num_own: int, to_compute: list[KVNode]) -> int | None:
        """KV slots for nodes that have none, which join `to_compute`, and for a request's own tokens.

        Returns:
            The first of the request's own slots. None where not all fit, and then nothing is kept.
        """
        for node in nodes:
            node.num_users += 1  # before anything is dropped to make room
        placed: list[KVNode] = []
        first_slot: int | None = None
        for node in nodes:
            if node.start is None:
                node.start = self._allocate(len(node))
                if node.start is None:
                    break
                placed.append(node)
        else:
            first_slot = self._allocate(num_own) if num_own else 0  # 0: a score request has none
        if first_slot is None:
            for node in placed:
                self._arena.drop(node)
            _stop_using(nodes)
        else:
            to_compute += placed
        return first_slot

    def _allocate(self, count: int) -> int | None:
        """As `KVArena.allocate`, after dropping stored nodes that nothing reads where that makes room."""
        start = self._arena.allocate(count)
        if start is not None:
            return start
        # verdicts' before states, of the youngest search first, and there the newest
        youngest = self._active[::-1]
        for trie in chain((active.verdicts for active in youngest), (active.states for active in youngest)):
            for node in reversed(trie.nodes):
                if node.start is not None and node.num_users == 0:
                    self._arena.drop(node)
                    start = self._arena.allocate(count)
                    if start is not None:
                        return start
        return None

    def _finish_scores(self, active: ActiveSearch, index: int) -> None:
        values: list[float] = []
        for continuation in active.reads.pop(index):
            total = 0.0
            for read in continuation:
                total += active.logps[read]
            values.append(total)
        is_finite = not any(value != value or value == float("inf") for value in values)  # -inf is a log-prob
        self._finish(active, index, values, is_finite)
        _stop_using([node for path in active.paths[index] for node, _ in path])

    def _finish_sample(self, running: RunningRequest) -> None:
        if running.leaves_node:
            self._leave_node(running)
        else:
            self._release(running)
        self.num_thoughts += running.owner.requests.keep  # verdicts are not kept
        text = self._stop_checker.text(running.generated)
        sample = Sample(tuple(running.generated), text, running.stop or "length", tuple(running.logps))
        self._finish(running.owner, running.index, sample, not running.failed)

    def _finish(self, active: ActiveSearch, index: int, answer: Answer, is_finite: bool) -> None:
        active.answers[index] = answer
        active.num_open -= 1
        if not is_finite:
            active.error = ValueError(NOT_FINITE_MESSAGE)
        if self._cache is not None and active.error is None:
            self._cache.put(active.name, active.requests.items[index], answer)

    def _leave_node(self, running: RunningRequest) -> None:
        """Make a node of what a request has computed: a prompt that continues its thought begins behind it."""
        active, request = running.owner, running.request
        # the last token that was generated is the first one that the continuation reads
        ids = [request.token_ids[-1], *running.generated[:-1]]
        active.passing.setdefault(active.states, set()).add(active.states.adopt(running.path, ids, running.first_slot))
        if num_unused := request.max_new_tokens - len(ids):
            self._arena.release(running.first_slot + len(ids), num_unused)
        _stop_using([node for node, _ in running.path])

    def _release(self, running: RunningRequest) -> None:
        self._arena.release(running.first_slot, running.request.max_new_tokens)
        _stop_using([node for node, _ in running.path])

    def _take_out(self, trie: KVTrie, gone: set[KVNode]) -> None:
        self._drop_unused(trie.take_out(gone))

    def _drop_unused(self, nodes: Iterable[KVNode]) -> None:
        for node in nodes:
            if node.start is not None and node.num_users == 0:
                self._arena.drop(node)

    def _abandon(self) -> None:
        """Give everything back but the permanent nodes, also when the caller stops reading `run`."""
        for running in self.batch.running:
            self._release(running)
        self.batch.drop(self.batch.running)
        for active in self._active:
            self._drop_unused([*active.states.nodes, *active.verdicts.nodes])
            active.search.close()
        self._active = []


@contextmanager
def _fewer_objects_to_collect() -> Iterator[None]:
    """Leave what exists now to itself while searches run.

    A pass of the garbage collector walks every object of torch and transformers, and a search of a tiny model allocates
    so much that passes were a tenth of its time.
    """
    is_ours = gc.get_freeze_count() == 0
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def _stop_using(nodes: Iterable[KVNode]) -> None:
    for node in nodes:
        node.num_users -= 1


def _shared_nodes(active: ActiveSearch) -> set[KVNode]:
    """The nodes that at least two of the present prompts have."""
    paths_of = {item.token_ids: paths for item, paths in zip(active.requests.items, active.paths, strict=True)}
    counts = Counter(chain(*({node for path in paths for node, _ in path} for paths in paths_of.values())))
    return {node for node, count in counts.items() if count > 1}


def _prompts(item: SampleRequest | ScoreRequest) -> list[tuple[int, ...]]:
    """What a request needs in the trie: what stands before the first token it generates, or each token it scores."""
    if answer_to_nothing(item) is not None:
        return []
    if isinstance(item, SampleRequest):
        return [item.token_ids[:-1]]
    return [(*item.token_ids, *continuation[:-1]) for continuation in item.continuations]


def _reads(item: ScoreRequest, paths: list[KVPath]) -> list[list[Read]]:
    """For each continuation and each of its tokens, the token before it and its id."""
    first = len(item.token_ids) - 1
    return [
        [(*_locate(path, position), token) for position, token in enumerate(continuation, first)]
        for continuation, path in zip(item.continuations, paths, strict=True)
    ]


def _locate(path: KVPath, position: int) -> tuple[KVNode, int]:
    """The token of a path at a position: its node, and which of the node's tokens it is."""
    for node, used in reversed(path):  # it is mostly near the end
        if node.position <= position < node.position + used:
            return node, position - node.position
    raise AssertionError(f"no token at position {position}")
