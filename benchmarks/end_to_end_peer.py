"""The obvious alternative to this project, from what others ship: `generate`, TRL's DPOTrainer and PEFT.

    search      the same search by the same code, all questions in step: what they ask at one time is generated in common,
                left-padded batches. A prompt that several samples continue is read once, and so is the few-shot part
    training    DPOTrainer on pairs of token ids, LoRA by PEFT, the whole batch of a step at once
    evaluation  all chains side by side in one `generate`, each row ended where its chain ends, the adapter merged

It is meant to be as fast as these libraries let it be. What `generate` cannot do is to keep the keys and values of a
state for the next level, and to give a row that has ended to another sample.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from cpo_fast.config import Config
from cpo_fast.data.batches import epoch_batches
from cpo_fast.evaluate.chain import Chain, ChainReader
from cpo_fast.search.engine import Answer, AnswerCache, Requests, Sample, SampleRequest, ScoreRequest, Search
from cpo_fast.tasks import Task

SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}  # ours, and transformers' name of it
Ids = tuple[int, ...]
Processors = Callable[[Sequence[SampleRequest]], LogitsProcessorList]


class GenerateEngine:
    """Answers searches by `generate` on a stock model.

    Args:
        model, tokenizer: of `transformers`.
        batch_size: rows of a batch, at most.
        processors: choose the tokens of a batch's requests in place of sampling. None samples.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, processors: Processors | None = None) -> None:
        self.model, self.tokenizer, self.batch_size, self._processors = model.eval(), tokenizer, batch_size, processors
        self._prefixes: list[tuple[Ids, Any]] = [((), None)]
        pieces = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
        self.newlines = [token for token, piece in enumerate(pieces) if "\n" in piece]
        self.eos: int = tokenizer.eos_token_id

    @torch.inference_mode()
    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Read these leading ids once."""
        cache = self.model(input_ids=torch.tensor([list(token_ids)]), use_cache=True, logits_to_keep=1).past_key_values
        self._prefixes.append((tuple(token_ids), cache))
        self._prefixes.sort(key=lambda entry: -len(entry[0]))  # the longest that fits is found first

    def run(
        self, searches: Iterable[tuple[str, Search[Any]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, Any, float]]:
        """All searches in step."""
        started = time.perf_counter()
        answers: dict[str, list[Answer] | None] = {}
        going = dict(searches)
        while going:
            asks: dict[str, Requests] = {}
            for name, search in list(going.items()):
                try:
                    asks[name] = search.send(answers[name]) if name in answers else next(search)
                except StopIteration as end:
                    del going[name]
                    yield name, end.value, time.perf_counter() - started
            found = iter(self.answer(Requests(tuple(item for ask in asks.values() for item in ask.items), keep=False)))
            answers = {name: list(islice(found, len(ask.items))) for name, ask in asks.items()}

    def answer(self, requests: Requests) -> list[Answer]:
        """Answers in the order of the items."""
        items, found = requests.items, dict[int, Answer]()
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, item in enumerate(items):
            settings = (item.temperature, item.max_new_tokens) if isinstance(item, SampleRequest) else ()
            groups.setdefault((self._prefix(item.token_ids)[0], *settings), []).append(place)
        for places in groups.values():
            places.sort(key=lambda place: (len(items[place].token_ids), items[place].token_ids))  # little padding
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                rows: list[Any] = [items[place] for place in batch]
                answer = self._score if isinstance(rows[0], ScoreRequest) else self._sample
                found.update(zip(batch, answer(rows), strict=True))
        return [found[place] for place in range(len(items))]

    def _sample(self, rows: Sequence[SampleRequest]) -> Iterator[Answer]:
        options = {"do_sample": True, "temperature": rows[0].temperature, "top_k": 0}
        if self._processors is not None or not rows[0].temperature:
            options = {"do_sample": False}
        generated = self.generate(
            [row.token_ids for row in rows],
            GenerationConfig(**options, max_new_tokens=rows[0].max_new_tokens, eos_token_id=[self.eos, *self.newlines]),
            logits_processor=self._processors(rows) if self._processors else LogitsProcessorList(),
        )
        newlines = frozenset(self.newlines)
        for ids in generated:
            end = next((place for place, token in enumerate(ids) if token == self.eos or token in newlines), len(ids))
            stop = "length" if end == len(ids) else "eos" if ids[end] == self.eos else "newline"
            line = tuple(ids[: end + (stop == "newline")])
            yield Sample(line, self.tokenizer.decode(line, clean_up_tokenization_spaces=False), stop, ())

    @torch.inference_mode()
    def _score(self, rows: Sequence[ScoreRequest]) -> list[list[float]]:
        ids, mask, _, known, cache = self._rows([row.token_ids for row in rows])
        logits = self._forward(ids[:, known:], mask, cache).logits[:, -1]
        labels = torch.tensor([row.continuations for row in rows]).squeeze(-1)  # fails unless each is one token
        found: list[list[float]] = logits.double().log_softmax(-1).gather(1, labels).tolist()
        return found

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Ids], config: GenerationConfig, **options: Any) -> list[list[int]]:
        """What `generate` puts behind each prompt, filled up with padding behind a row's end."""
        unique = list(dict.fromkeys(prompts))
        ids, mask, width, known, cache = self._rows(unique)
        if width > known + 1:  # `generate` itself would read a prompt once for each of its samples
            cache = self._forward(ids[:, known : width - 1], mask[:, : width - 1], cache).past_key_values
        place = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts])
        if cache is not None and len(rows) != len(unique):
            cache.reorder_cache(rows)
        config.pad_token_id = self.tokenizer.pad_token_id
        config.use_cache = True
        result = self.model.generate(
            input_ids=ids[rows], attention_mask=mask[rows], past_key_values=cache, generation_config=config, **options
        )
        generated: list[list[int]] = result[:, width:].tolist()
        return generated

    def _rows(self, prompts: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor, int, int, Any]:
        """Ids and mask [B, width], width, how many of the first columns are cached, and their cache of B rows."""
        prefix, cache = self._prefix(prompts[0])
        known, width = len(prefix), max(map(len, prompts))
        gaps = [width - len(prompt) for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*prefix, *[pad] * gap, *ids[known:]] for ids, gap in zip(prompts, gaps, strict=True)])
        mask = torch.tensor([[1] * known + [0] * gap + [1] * (width - known - gap) for gap in gaps])
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long))
        return ids, mask, width, known, cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip

    def _prefix(self, prompt: Ids) -> tuple[Ids, Any]:
        return next(entry for entry in self._prefixes if len(prompt) > len(entry[0]) == len_shared(prompt, entry[0]))


def len_shared(prompt: Ids, prefix: Ids) -> int:
    """The length of `prefix` where the prompt begins with it, else -1."""
    return len(prefix) if prompt[: len(prefix)] == prefix else -1


class ChainEnd(StoppingCriteria):
    """Ends a row where its chain ends: an answer line, another question, or the last step. Looks at newlines alone."""

    def __init__(self, engine: GenerateEngine, task: Task, start: int, max_steps: int) -> None:
        self._tokenizer, self._task, self._start, self._max_steps = engine.tokenizer, task, start, max_steps
        self._is_newline = torch.zeros(engine.model.config.vocab_size, dtype=torch.bool)
        self._is_newline[engine.newlines] = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """[B] bool, which rows are done."""
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for row in self._is_newline[input_ids[:, -1]].nonzero().flatten().tolist():
            text = self._tokenizer.decode(input_ids[row, self._start :], clean_up_tokenization_spaces=False)
            lines = [line for line in text.split("\n")[:-1] if line.strip()]
            ends = (self._task.is_answer_line, self._task.leaves_question)
            done[row] = len(lines) >= self._max_steps or any(end(line) for line in lines for end in ends)
        return done


def greedy_chains(
    engine: GenerateEngine, prompts: Mapping[str, Sequence[int]], task: Task, max_new_tokens: int, max_steps: int
) -> dict[str, Chain]:
    """The greedy chain after each prompt."""
    chains: dict[str, Chain] = {}
    by_length = sorted(prompts, key=lambda name: len(prompts[name]))
    for first in range(0, len(by_length), engine.batch_size):
        names = by_length[first : first + engine.batch_size]
        rows = [tuple(prompts[name]) for name in names]
        stopping = StoppingCriteriaList([ChainEnd(engine, task, max(map(len, rows)), max_steps)])
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=engine.eos)
        for name, ids in zip(names, engine.generate(rows, config, stopping_criteria=stopping), strict=True):
            reader = ChainReader(engine.tokenizer, task, max_steps, max_new_tokens)
            for token in ids:
                if reader.stop is None:
                    reader.end_sequence() if token == engine.eos else reader.add(token)
            chains[name] = reader.chain()
    return chains


def token_rows(pairs: Path, eos: int) -> list[dict[str, Any]]:
    """The pairs of a file as TRL's collator reads them, end-of-sequence behind what ends a chain, and their question."""
    rows = []
    for line in pairs.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = {f"{name}_ids": row[f"{name}_token_ids"] for name in ("prompt", "chosen", "rejected")}
        for name in ("chosen", "rejected"):
            ids[f"{name}_ids"] = ids[f"{name}_ids"] + [eos] * row[f"{name}_final"]
        rows.append(ids | {"question": row["tree"]})
    return rows


def train_with_trl(config: Config, model: Any, tokenizer: Any, pairs: Path, folder: Path) -> None:
    """Train the first steps of `config.train` by DPOTrainer, within one pass over the pairs, and save the adapter.

    Batches are those that ours takes, in its order. The reference is computed in the steps, as one pass needs no cache.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset  # else TRL would put an end-of-sequence behind every step of a chain

    rows, train, steps = token_rows(pairs, tokenizer.eos_token_id), config.train, config.train.max_steps
    assert steps is not None
    groups = [row.pop("question") for row in rows]
    order = epoch_batches(groups, train.batch_pairs, train.batch_order, config.seed, 0)[:steps]
    torch.manual_seed(config.seed)
    trainer = OnTokenIds(
        model=model,
        args=DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, seed=config.seed, beta=train.beta, max_length=None,
            per_device_train_batch_size=train.batch_pairs, train_sampling_strategy="sequential", max_steps=steps,
            learning_rate=train.lr, lr_scheduler_type=SCHEDULES[train.schedule],
            warmup_steps=math.ceil(train.warmup_ratio * steps), max_grad_norm=train.max_grad_norm,
            weight_decay=train.weight_decay, adam_beta1=train.adam_beta1, adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_eps, gradient_checkpointing=False, dataloader_pin_memory=False,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=steps,
        ),
        train_dataset=Dataset.from_list([rows[place] for batch in order for place in batch]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=list(config.lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(str(folder / "adapter"))
