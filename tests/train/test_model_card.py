"""Cards say what the run knows, load as they say, and cannot be broken by what stands in a path."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config, validate_config
from cpo_fast.evaluate.statistics import wilson_interval
from cpo_fast.files import read_jsonl
from cpo_fast.model_card import Training, adapter_card, code, merged_card
from cpo_fast.models import merge, model_hash
from cpo_fast.train.loop import train
from tests.train.runs import MakeConfig

HOSTILE = "a\"b'c`d``e\n---\n# x | y <script>&amp; \u202e ]( {{7*7}} ```\n```python"


def facts(config: Config, **changes: Any) -> Training:
    values = {"base_hash": "b" * 16, "data_hash": "d" * 16, "adapter_hash": "", "dtype": "float32", "kind": "lora"}
    counts = {"num_items": 24, "num_questions": 3, "num_held_out": 6, "num_steps": 8}
    return Training(config=config, **{**values, **counts, **changes})


def parsed(card: str) -> tuple[dict[str, Any], list[Any]]:
    """Front matter and markdown tokens."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(body)


def snippet(card: str) -> str:
    (block,) = (token.content for token in parsed(card)[1] if token.type == "fence")
    return str(block)


def runs(card: str, folder: Path, last: str) -> str:
    """What the card's Python prints, run as written inside `folder`."""
    script = f"{snippet(card)}\n{last}"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_training_writes_cards_with_its_figures_equal_for_equal_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    config, again = (make_config(data={"held_out": 0.3}, num_epochs=2) for _ in range(2))
    result = train(config)
    card = (result.adapter_path / "README.md").read_text()
    lines = {line["step"]: line for _, line in read_jsonl(result.metrics_path)}
    best = lines[result.best_step]
    of_step = ("rewards/margins", "loss") if result.best_step else ()  # the starting point has none
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", *of_step):
        assert f"| `{name}` | {best[name]:.6g} |" in card
    assert f"steps: {result.best_step} of {result.num_steps}, 12 pairs each" in card
    assert f"hash `{model_hash(config.model.path)}`" in card
    assert f"{result.num_items} pairs of 3 questions trained on, {result.num_held_out} held out" in card
    front, _ = parsed(card)
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["cpo-fast", "lora", "preference"],
    }
    assert ModelCard(card).data.library_name == "peft"
    assert (Path(config.run) / "adapter-best" / "README.md").read_text() == card
    assert config.run not in card
    other = train(again)
    for file in sorted(result.adapter_path.iterdir()):
        assert file.read_bytes() == (other.adapter_path / file.name).read_bytes()
    print_norm = "print(type(model).__name__, sum(float(p.double().abs().sum()) for p in model.parameters()))"
    model = config.model.model_copy(update={"adapter": str(result.adapter_path)})
    merged = merge(config.model_copy(update={"model": model}), tmp_path / "merged", ["a b c"], 1e-2)
    merged_text = (merged.path / "README.md").read_text()
    assert adapter_hash(result.adapter_path) in merged_text
    assert f"mean {merged.mean_kl:.2e}" in merged_text
    assert parsed(merged_text)[0]["library_name"] == "transformers"
    one, two = runs(card, result.adapter_path, print_norm), runs(merged_text, merged.path, print_norm)
    assert one.split()[0] == two.split()[0] == "LlamaForCausalLM"
    assert float(one.split()[1]) == pytest.approx(float(two.split()[1]), rel=1e-7)


def test_intervals_alarms_and_the_starting_point_are_said() -> None:
    config = validate_config({"model": {"path": "org/name-1.7B"}, "data": {"path": "trees.jsonl"}})
    low, high = wilson_interval(30, 40)
    card = adapter_card(
        facts(config), 5, {"eval_accuracy": 0.75, "loss": None}, {"eval_accuracy": (low, high)}, "step 3: rang"
    )
    assert f"| `eval_accuracy` | 0.75 | {low:.4f} to {high:.4f} |" in card
    assert "`loss`" not in card
    assert "## Alarms\n\nstep 3: rang" in card
    assert parsed(card)[0]["base_model"] == "org/name-1.7B"
    start = adapter_card(facts(config), 0, {}, {}, "")
    assert "this is the starting point" in start
    assert "None had rung" in start


def test_hostile_paths_are_text() -> None:
    config = validate_config(
        {
            "model": {"path": HOSTILE, "adapter": HOSTILE},
            "data": {"mixture": [{"path": HOSTILE}, {"path": "`"}]},
            "lora": {"target_modules": [HOSTILE]},
        }
    )
    plain = validate_config(
        {"model": {"path": "p", "adapter": "q"}, "data": {"mixture": [{"path": "r"}, {"path": "s"}]}}
    )
    kl = (1e-3, 1e-2, 7)
    for make in (
        lambda c: adapter_card(facts(c), 1, {"loss": 0.5}, {}, ""),
        lambda c: merged_card(c, "b", "a", "float32", kl),
    ):
        front, tokens = parsed(make(config))
        assert "base_model" not in front
        assert [token.type for token in tokens] == [token.type for token in parsed(make(plain))[1]]
        spans = [each for token in tokens for each in token.children or [] if each.type == "code_inline"]
        assert sum("<script>" in span.content for span in spans) == (3 if make(config).count("data:") else 2)
        assert not any(each.type == "html_inline" for token in tokens for each in token.children or [])
        assert "\u202e" not in make(config)
        compile(snippet(make(config)), "README.md", "exec")
    assert repr(HOSTILE) in snippet(adapter_card(facts(config), 1, {}, {}, ""))


@pytest.mark.parametrize("text", ["plain", "`", "a`b", "``", " a ", "", "a\\n", "|", "\x1b[31m", "\n", "é 漢"])
def test_a_code_span_holds_its_text(text: str) -> None:
    (inline,) = (token for token in MarkdownIt("commonmark").parse(f"- x {code(text)} y") if token.type == "inline")
    (span,) = (each.content for each in inline.children or [] if each.type == "code_inline")
    shown = text if text.isprintable() else text.encode("unicode_escape").decode()
    assert span.strip() == shown.strip()
