"""What names a search: the dtype that a model has, not the word that asked for it."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import GptOssConfig, JetMoeConfig, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from cpo_fast.errors import DataError
from cpo_fast.models import load_model
from cpo_fast.search.collect import collect
from cpo_fast.search.tree_store import _keeps_bits, provenance_of
from cpo_fast.tasks import Prompts, load_questions
from cpo_fast.tree import SearchTree, read_trees
from tests.tiny import tiny_model


@pytest.fixture
def run_in(make_config, model, tokenizer, tmp_path, processor):
    """run_in(dtype, ratio) -> a configuration that names the dtype, on a CPU where bfloat16 takes `ratio` of the time."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(dtype, ratio):
        processor(bf16_ratio=ratio)
        config = make_config(max_steps=1, num_candidates=2, num_kept=1, max_thought_tokens=4)
        section = config.model.model_copy(update={"path": str(folder), "device": "cpu", "dtype": dtype})
        return config.model_copy(update={"model": section})

    return make


def provenance(config):
    task, _ = load_questions(config)
    model, tokenizer = load_model(config.model)
    return provenance_of(config, Prompts(task, tokenizer, config.task.chat), model)


@pytest.mark.parametrize(("name", "ratio"), [("float32", 40.0), ("bfloat16", 0.5)])
def test_auto_is_the_same_search_as_the_name_it_resolves_to(run_in, name, ratio):
    by_name, by_auto = provenance(run_in(name, ratio)), provenance(run_in("auto", ratio))
    assert by_auto == by_name
    # as every version so far has written it: the name is what is hashed
    config = run_in(name, ratio)
    task, _ = load_questions(config)
    settings = {
        "search": config.search.result_settings(),
        "dtype": name,
        "chat": False,
        "few_shot_evaluators": [task.few_shot_evaluator, task.few_shot_conclusion_evaluator],
    }
    text = json.dumps(settings, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert by_auto.config_hash == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_trees_of_another_dtype_are_refused_and_those_of_the_same_are_kept(run_in):
    collect(run_in("bfloat16", 0.5))
    assert collect(run_in("auto", 0.5)).num_resumed == 3
    with pytest.raises(DataError) as caught:
        collect(run_in("auto", 40.0))  # the same settings on a CPU that is slow in bfloat16
    sentence = str(caught.value)
    assert "another search configuration or dtype (model.dtype was bfloat16, is float32)" in sentence
    assert "set it as it was (model.dtype=auto follows the device), set another folder in 'run'" in sentence
    assert collect(run_in("bfloat16", 40.0)).num_resumed == 3


def test_a_tree_says_where_equal_settings_alone_give_it_again(run_in, tmp_path):
    exact = collect(run_in("float32", 0.5))
    assert all("equal_for" not in json.loads(line) for line in Path(exact.trees_path).read_text().splitlines())
    config = run_in("bfloat16", 0.5)
    rounded = collect(config.model_copy(update={"run": str(tmp_path / "bfloat16")}))
    arena = config.search.engine == "arena"
    trees = read_trees(rounded.trees_path)
    assert [tree.equal_for for tree in trees] == ["settings" if arena else ""] * len(trees)
    assert [SearchTree.from_dict(tree.to_dict()) for tree in trees] == trees


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig, OlmoeConfig, GptOssConfig, JetMoeConfig])
def test_mixtures_of_experts_keep_no_bits(config_class):
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert not _keeps_bits(tiny_model(config_class, attention="eager", **experts))
    assert _keeps_bits(tiny_model(LlamaConfig))
