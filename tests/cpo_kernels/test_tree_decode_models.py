"""Stock models over an arena: prefill and greedy decode through plans equal `generate` with sdpa, token for token."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits, row_multiple
from cpo_kernels.integrations.transformers.hook import cpo_tree_attention
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.tree_decode import DecodePlan
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model, with_lora

ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "granite": (GraniteConfig, {"logits_scaling": 0.5}),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 2.0}),
}
# parent and number of tokens of each node, parents first; states at depths 1 to 4, one of them below a single token
TREE = [(None, 140), (0, 9), (0, 1), (1, 66), (3, 5), (2, 17), (0, 3)]
STATES = [4, 1, 5, 6]
NUM_NEW = 8
LOGP_BOUND = 1e-5  # of one log-prob against a forward without a cache


class Search:
    """The nodes of TREE and a private suffix for each state, in one arena; NaN until written."""

    def __init__(self, model: torch.nn.Module, states: Sequence[int] = STATES) -> None:
        self.model, self.states = model, list(states)
        config = model_parts(model).config
        generator = torch.Generator().manual_seed(3)
        self.tokens = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for _, length in TREE]
        self.starts = [sum(length for _, length in TREE[:node]) for node in range(len(TREE))]
        self.suffixes = [sum(length for _, length in TREE) + NUM_NEW * place for place in range(len(states))]
        self.dump_row = self.suffixes[-1] + NUM_NEW
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, self.dump_row + 1, config.num_key_value_heads, head_dim)
        self.arena = [(layer[0], layer[1]) for layer in torch.full(shape, float("nan"))]

    def path(self, node: int | None) -> list[int]:
        """Ancestors and the node itself, root first."""
        return [] if node is None else [*self.path(TREE[node][0]), node]

    def prompt(self, node: int) -> torch.Tensor:
        return torch.cat([self.tokens[above] for above in self.path(node)])

    def prefill(self, pieces: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """One forward of tokens [first, last) of nodes, padded; the logits after the last token of each piece."""
        items, ids, positions, slots, ends = [], [], [], [], []
        for node, first, last in pieces:
            row, num = len(slots), last - first
            above = self.path(TREE[node][0])
            items += [(row, num, self.starts[n], TREE[n][1], TREE[n][1]) for n in above]
            items.append((row, num, self.starts[node], last, first + 1))
            ids.append(self.tokens[node][first:last])
            depth = sum(TREE[n][1] for n in above)
            positions += range(depth + first, depth + last)
            slots += range(self.starts[node] + first, self.starts[node] + last)
            ends.append(len(slots) - 1)
        num_padding = -len(slots) % row_multiple()
        starts = [0] * len(slots) + [self.dump_row] * num_padding
        lengths = [0] * len(slots) + [1] * num_padding
        plan = DecodePlan.build(slots + [self.dump_row] * num_padding, items, starts, lengths)
        token_ids = torch.cat([*ids, torch.zeros(num_padding, dtype=torch.int64)])
        position_ids, rows = torch.tensor(positions + [0] * num_padding), torch.tensor(ends)
        hidden = decode_forward(self.model, token_ids, position_ids, plan, self.arena, rows=rows)
        return next_logits(self.model, hidden)

    def decode(self, token_ids: Sequence[int], step: int, places: Sequence[int]) -> torch.Tensor:
        """Logits after one more token of some states, which stand in depth-first order; padded."""
        num_padding = -len(places) % row_multiple()
        items = []
        for node in range(len(TREE)):
            below = [at for at, place in enumerate(places) if node in self.path(self.states[place])]
            if below:
                assert below[-1] - below[0] + 1 == len(below)
                items.append((below[0], len(below), self.starts[node], TREE[node][1], TREE[node][1]))
        starts = [self.suffixes[place] for place in places] + [self.dump_row] * num_padding
        lengths = [step + 1] * len(places) + [1] * num_padding
        plan = DecodePlan.build([s + n - 1 for s, n in zip(starts, lengths, strict=True)], items, starts, lengths)
        depths = [len(self.prompt(self.states[place])) + step for place in places] + [0] * num_padding
        ids = torch.tensor([*token_ids, *[0] * num_padding])
        hidden = decode_forward(self.model, ids, torch.tensor(depths), plan, self.arena)
        return next_logits(self.model, hidden)[: len(places)]


def whole_nodes() -> list[list[tuple[int, int, int]]]:
    """Every node in one forward."""
    return [[(node, 0, length) for node, (_, length) in enumerate(TREE)]]


def in_chunks() -> list[list[tuple[int, int, int]]]:
    """64 tokens of a node a forward."""
    return [
        [(node, first, min(first + 64, length))]
        for node, (_, length) in enumerate(TREE)
        for first in range(0, length, 64)
    ]


def greedy(search: Search, forwards: list[list[tuple[int, int, int]]]) -> tuple[list[list[int]], torch.Tensor]:
    """NUM_NEW tokens of every state and their log-probs [states, NUM_NEW]."""
    after: dict[int, torch.Tensor] = {}
    for pieces in forwards:
        after |= dict(zip((node for node, _, _ in pieces), search.prefill(pieces), strict=True))
    logits = torch.stack([after[state] for state in search.states])
    places = range(len(search.states))
    tokens, logps = [], []
    for step in range(NUM_NEW):
        best = logits.argmax(dim=-1)
        tokens.append(best)
        logps.append(logits.log_softmax(dim=-1).gather(1, best[:, None])[:, 0])
        if step + 1 < NUM_NEW:
            logits = search.decode(best.tolist(), step, places)
    return torch.stack(tokens, dim=1).tolist(), torch.stack(logps, dim=1)


def stock(model: torch.nn.Module, prompts: list[torch.Tensor]) -> tuple[list[list[int]], torch.Tensor]:
    """What `generate` gives for each prompt alone, and log-probs of its tokens from one forward without a cache."""
    tokens, logps = [], []
    for prompt in prompts:
        ids = prompt[None]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1
        )
        with torch.no_grad():
            scores = model(input_ids=out, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        tokens.append(out[0, len(prompt) :].tolist())
        logps.append(scores.gather(1, out[0, len(prompt) :, None])[:, 0])
    return tokens, torch.stack(logps)


def assert_equals_generate(model: torch.nn.Module) -> None:
    prompts = [Search(model).prompt(state) for state in STATES]
    expected_tokens, expected_logps = stock(model, prompts)
    assert len({tuple(row) for row in expected_tokens}) == len(STATES)
    prepare(model)
    for forwards in (whole_nodes(), in_chunks()):
        tokens, logps = greedy(Search(model), forwards)
        assert tokens == expected_tokens
        assert float((logps - expected_logps).abs().max()) <= LOGP_BOUND


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_generate(name: str, lora: bool) -> None:
    config, changes = ARCHITECTURES[name]
    model = tiny_model(config, **changes)
    assert_equals_generate(with_lora(model) if lora else model)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_greedy_tokens_equal_generate_with_mqa_and_mha(kv_heads: int) -> None:
    assert_equals_generate(tiny_llama(num_key_value_heads=kv_heads))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_have_the_same_bits_alone_in_company_and_after_a_chunked_prefill(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        config, changes = ARCHITECTURES[name]
        model = prepare(with_lora(tiny_model(config, **changes)))
        together, alone = Search(model), Search(model)
        for pieces in whole_nodes():
            together.prefill(pieces)
        for pieces in in_chunks():
            alone.prefill(pieces)
        for step in range(3):
            ids = [5 + step, 17, 3, 40]
            expected = together.decode(ids, step, range(4))
            for place in range(4):
                assert torch.equal(alone.decode([ids[place]], step, [place])[0], expected[place])
    finally:
        torch.set_num_threads(before)


def test_hook_hands_on_the_scale_of_the_layer() -> None:
    module = torch.nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    plan = DecodePlan.build(range(5), [(0, 5, 0, 5, 1)], [0] * 5, [0] * 5)
    arena = [(torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)) for _ in range(2)]
    out, _ = cpo_tree_attention(module, q, k, v, None, scaling=0.9, decode_plan=plan, decode_arena=arena)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.9)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_model_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(ValueError, match="call prepare"):
        Search(tiny_llama()).prefill([(0, 0, 5)])


def test_copy_of_a_prepared_model_is_refused_until_it_is_proved() -> None:
    """It would run without the windows that were proved."""
    model = copy.deepcopy(prepare(tiny_llama()))
    with pytest.raises(ValueError, match="an arena of 2 layers for a model that was proved with 0"):
        Search(model).prefill([(0, 0, 5)])


def test_layer_that_does_not_use_the_arena_is_noticed() -> None:
    model = prepare(tiny_llama())
    model.model.layers[1].self_attn.config = tiny_llama().config
    with pytest.raises(RuntimeError, match="1 of 2 layers of LlamaForCausalLM"):
        Search(model).prefill([(0, 0, 5)])


@pytest.mark.parametrize(
    ("layer", "layers_seen", "message"),
    [
        (0, {0}, "layer 0 .* asks for attention twice"),
        (1, set(), "is decoder layer 1 of 1"),
        (None, set(), "is decoder layer None of 1"),
    ],
)
def test_layer_whose_keys_and_values_a_search_would_not_find_again_is_refused(
    layer: int | None, layers_seen: set[int], message: str
) -> None:
    module = torch.nn.Module()
    module.layer_idx = layer  # type: ignore[assignment]
    heads, arena = torch.zeros(1, 2, 1, 8), [(torch.zeros(1, 2, 8),) * 2]
    plan = DecodePlan.build([0], [], [0], [1])
    given = {"layers_seen": layers_seen, "decode_plan": plan, "decode_arena": arena}
    with pytest.raises(ValueError, match=message):
        cpo_tree_attention(module, heads, heads, heads, None, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "bidirectional attention"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"query": torch.zeros(2, 2, 1, 8)}, "one row without a KV cache"),
        ({"key": torch.zeros(1, 2, 3, 8)}, "one row without a KV cache"),
    ],
)
def test_what_the_op_does_not_compute_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    heads = torch.zeros(1, 2, 1, 8)
    given: dict[str, Any] = {"query": heads, "key": heads, "value": heads} | arguments
    plan = DecodePlan.build([0], [], [0], [1])
    with pytest.raises(ValueError, match=message):
        cpo_tree_attention(
            module, attention_mask=None, decode_plan=plan, decode_arena=[(torch.zeros(1, 2, 8),) * 2], **given
        )
