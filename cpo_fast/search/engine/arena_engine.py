"""The engine whose KV cache is the search forest: every shared prefix is computed once and read once for all below it.

Stock Hugging Face modules compute, with or without live LoRA adapters. Attention goes through `tree_decode`. Where that
runs in Triton, other parts of the modules are replaced by fewer and larger kernels too (`fewer_kernels`). An answer
depends on its request alone: in float32 on a CPU to the last bit, whatever else runs beside it. In bfloat16, on a GPU,
and for mixtures of experts (Mixtral, Qwen3-MoE, OLMoE: an expert's product has as many rows as are routed to it, so sums
are grouped by who is beside a row) equal trees are promised for equal settings only.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from cpo_fast.config import SearchConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine.cuda_graph_batch import CudaGraphBatch
from cpo_fast.search.engine.decode_batch import DecodeBatch
from cpo_fast.search.engine.forward_plans import ModelRunner, compute_nodes
from cpo_fast.search.engine.kv_arena import KVArena, KVTrie, default_num_tokens
from cpo_fast.search.engine.requests import Answer, AnswerCache, R, Requests, Search
from cpo_fast.search.engine.scheduler import Scheduler
from cpo_fast.search.engine.stopping import StopChecker
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.decode import arena_shapes, fewer_kernels
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.prepare import check_kernels
from cpo_kernels.integrations.transformers.proof import check_call, proved_attention
from cpo_kernels.tree_decode import resolve_tree_decode

MAX_HASHED = 1 << 24  # numbers of a tensor of an adapter: LoRA on the largest vocabularies has fewer


class ArenaEngine:
    """Answers what searches ask from one KV arena.

    Args:
        model, tokenizer: `transformers` or PEFT model with a language-model head. Prepared and set to eval mode here.
        config: `batch_size` requests of the decode batch, `questions_in_flight`, `arena_tokens`, `prefill_tokens`.
        make_batch: the decode batch, from the model runner and the stop checker. For measurements and tests. None: CUDA
            graphs where the device and `config` have them, else plain steps.
        stop_checker: says when a line ends. None is newline and end-of-sequence.
        keep_modules: leave the model's modules as they are, because it goes on training.
        max_tokens: that the arena holds, however much memory is free. None: no limit.

    Attributes:
        arena: keys and values. scheduler: what runs.

    Raises:
        ValueError: the model cannot be computed exactly this way. The sentence names why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SearchConfig,
        make_batch: Callable[[ModelRunner, StopChecker], DecodeBatch] | None = None,
        stop_checker: StopChecker | None = None,
        keep_modules: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self.model = prepare(model.eval())
        parts = model_parts(model)
        device, dtype = next(parts.causal_lm.parameters()).device, parts.causal_lm.dtype
        _check_device(device)
        check_kernels(parts, ("tree_decode", "sample_tokens"), proved_attention(parts))
        impl = resolve_tree_decode(None, device.type)  # once, for all layers of all forwards
        # launches cost time there, and no bits are promised against another batch's
        if impl == "triton" and not keep_modules:
            parts = fewer_kernels(model)
        shapes = arena_shapes(parts)
        num_tokens = config.arena_tokens or default_num_tokens(shapes, dtype, device)
        num_tokens = min(num_tokens, max_tokens or num_tokens)
        self.arena = KVArena(shapes, num_tokens, dtype, device)
        self._permanent = KVTrie()  # of the prompts that all questions share
        self._config = config
        self._runner = ModelRunner(parts, self.arena, impl)
        self._runner.try_out()
        self._weights = weights_fingerprint(model)
        stop_checker = stop_checker or StopChecker(model, tokenizer)
        # `tree_decode` in plain torch reads its plan on the host, which a recorded step cannot
        can_record = config.cuda_graphs and device.type == "cuda" and impl == "triton"
        make_batch = make_batch or (CudaGraphBatch if can_record else DecodeBatch)
        batch = make_batch(self._runner, stop_checker)
        self.scheduler = Scheduler(self._runner, self._permanent, batch, stop_checker, config)

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        self._check_weights()
        path = self._permanent.insert([token_ids])[0]
        missing = [node for node, _ in path if node.start is None]
        for node in missing:
            node.start = self.arena.allocate(len(node))
            if node.start is None:
                raise OutOfMemory(
                    f"the KV arena of {self.arena.num_tokens} tokens cannot hold the shared prompts; raise "
                    "search.arena_tokens"
                )
        compute_nodes(self._runner, missing, self._config.prefill_tokens)

    def answer(self, requests: Requests) -> list[Answer]:
        def search() -> Search[list[Answer]]:  # one that asks once
            return (yield requests)

        ((_, answers, _),) = self.run([("", search())])
        if isinstance(answers, Exception):
            raise answers  # `run` hands it on, because it must not end other searches
        return answers

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        """As `Engine.run`. Weights must not change before it ends.

        Raises:
            ValueError: the model was changed into one that cannot be computed exactly this way (`proof.check_call`).
        """
        self._check_weights()
        return self.scheduler.run(searches, cache)

    def counts(self) -> tuple[int, int]:
        """Thoughts and tokens generated so far, for whoever watches."""
        return self.scheduler.num_thoughts, self.scheduler.batch.counts.num_tokens

    def _check_weights(self) -> None:
        """Refuse a model that was changed into one that is not exact. Drop stored nodes of other weights or adapters."""
        check_call(self.model, self._runner.parts)
        now = weights_fingerprint(self.model)
        if now == self._weights:
            return
        self._weights = now
        self.scheduler.batch.forget_weights()
        for node in self._permanent.nodes:
            if node.start is not None:
                self.arena.drop(node)


def _check_device(device: torch.device) -> None:
    """Refuse a model away from the current CUDA device, where Triton launches and graphs are recorded."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"the model is on {device} and the current CUDA device is {torch.cuda.current_device()}; call "
            f"torch.cuda.set_device({device.index}) before"
        )


def weights_fingerprint(model: Any) -> str:
    """Changes with whatever a step of training, a merge or a switch of adapters can change, of any kind of adapter.

    A weight or buffer counts by its address and by how often it was changed in place, one of an adapter by its bytes too,
    unless it is a whole copy of an embedding or the like.
    """
    digest = hashlib.sha256()
    adapters = set(getattr(model, "peft_config", None) or ())
    for name, module in model.named_modules():
        if hasattr(module, "_disable_adapters"):  # PEFT's layers, and its wrappers of trained copies
            state = [(key, value) for key, value in vars(module).items() if _is_setting(value)]
            digest.update(f"{name} {state}".encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        version = 0 if tensor.is_inference() else tensor._version
        digest.update(f"{name} {tensor.data_ptr()} {version}".encode())
        if tensor.numel() <= MAX_HASHED and ("lora_" in name or adapters & set(name.split("."))):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_setting(value: Any) -> bool:
    """Whether an attribute of a layer is a plain value, or plain values by the name of an adapter, such as its scaling."""
    if isinstance(value, dict):
        return bool(value) and all(map(_is_setting, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, bool | int | float | str)
