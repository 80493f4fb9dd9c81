"""The engine whose KV cache is the search forest: every shared prefix is computed once and read once for all below it.

Stock Hugging Face modules compute, with or without live LoRA adapters; attention goes through `tree_decode`. An answer
depends on its item alone: in float32 on a CPU to the last bit, whatever else runs beside it. In bfloat16, and on a GPU,
a matrix product may be summed in another order for another number of rows; there equal trees are promised for equal
settings only.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from cpo_fast.config import SearchConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine.forward_plans import compute_nodes
from cpo_fast.search.engine.kv_arena import Arena, Trie, default_num_tokens
from cpo_fast.search.engine.requests import Answer, Ask, Features, Memory, R, Search
from cpo_fast.search.engine.scheduler import Scheduler
from cpo_fast.search.engine.stopping import Stops
from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.prepare import check_kernels


class ArenaEngine:
    """Answers what searches ask from one KV arena.

    Args:
        model: `transformers` or PEFT model with a language-model head; prepared and set to eval mode here.
        tokenizer: its tokenizer.
        settings: `batch_size` rows of a wave, `questions_in_flight`, `arena_tokens`, `prefill_tokens`.
        features: None is all that this device has, but for what `settings` switches off.
        stops: say when a line ends; None is newline and end-of-sequence.

    Raises:
        ValueError: the model cannot be computed exactly this way; the sentence names why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: SearchConfig,
        features: Features | None = None,
        stops: Stops | None = None,
    ) -> None:
        self.model = prepare(model.eval())
        self._parts = model_parts(model)
        first = next(self._parts.causal_lm.parameters())
        _check_device(first.device)
        check_kernels(self._parts, ("tree_decode",))
        dtype = self._parts.causal_lm.dtype
        num_tokens = settings.arena_tokens or default_num_tokens(self._parts.config, dtype, first.device)
        self._settings = settings
        self._arena = Arena(self._parts.config, num_tokens, dtype, first.device)
        self._permanent = Trie()
        self._weights = weights_fingerprint(model)
        self.scheduler = Scheduler(
            self._parts,
            self._arena,
            self._permanent,
            stops or Stops(model, tokenizer),
            settings.batch_size,
            settings.questions_in_flight,
            settings.prefill_tokens,
            features or Features(graphs=settings.cuda_graphs and _can_record(first.device)),
        )

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute these leading ids now and keep them; later prompts that start with them read them."""
        if not token_ids:
            return
        self._check_weights()
        path = self._permanent.insert([token_ids])[0]
        missing = [node for node, _ in path if node.start is None]
        for node in missing:
            node.start = self._arena.allocate(len(node))
            if node.start is None:
                raise OutOfMemory(
                    f"the KV arena of {self._arena.num_tokens} tokens cannot hold the shared prompts; raise "
                    "search.arena_tokens"
                )
        compute_nodes(self._parts, self._arena, missing, self._settings.prefill_tokens)

    def answer(self, ask: Ask) -> list[Answer]:
        """As `request.Engine.answer`."""
        ((_, answers, _),) = self.run([("", _alone(ask))])
        if isinstance(answers, Exception):
            raise answers
        return answers

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], memory: Memory | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        """As `request.Engine.run`; weights must not change before it ends."""
        self._check_weights()
        return self.scheduler.run(searches, memory)

    def _check_weights(self) -> None:
        """Forget every stored node when a weight or the choice of adapters has changed since it was computed."""
        now = weights_fingerprint(self.model)
        if now == self._weights:
            return
        self._weights = now
        self.scheduler.wave.forget()
        for node in self._permanent.nodes:
            if node.start is not None:
                self._arena.release(node.start, len(node))
                node.start = None


def _check_device(device: torch.device) -> None:
    """Refuse a model away from the current CUDA device, where Triton launches and graphs are recorded."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"the model is on {device} and the current CUDA device is {torch.cuda.current_device()}; call "
            f"torch.cuda.set_device({device.index}) before"
        )


def _can_record(device: torch.device) -> bool:
    """Whether steps can become CUDA graphs: `tree_decode` in plain torch reads its plan on the host."""
    available = available_implementations(device.type)
    return device.type == "cuda" and resolve_implementation("tree_decode", None, "cuda", available) == "triton"


def weights_fingerprint(model: Any) -> str:
    """Changes with any weight that a step of training or a switch of adapters can change.

    Adapters by their bytes; the base by its tensors' identity and their counters of changes in place.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            state = (module.active_adapters, module.merged_adapters, module.disable_adapters)
            digest.update(f"{name} {state}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.data_ptr()} {parameter._version}".encode())
        if "lora_" in name:
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _alone(ask: Ask) -> Search[list[Answer]]:
    answers = yield ask
    return answers
