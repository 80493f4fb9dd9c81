"""Training on more ranks: measured on this machine's cores, and what the split of a step allows on 8 to 512 GPUs.

    python -m benchmarks.scaling [--ranks 1,2,4] [--rounds 2] [--no-measure] [--no-record]

Measured: `cpo-fast train --gpus R` on the same steps, one thread a rank, the numbers of ranks in turn. The adapters have to
agree within 1e-5 before anything is shown. Ranks beyond the machine's cores share them.

Simulated: how busy ranks are depends on the split alone, which is computed here by the code that trains. Pairs a second
come from it by the assumptions in `Cluster`, none of which has been measured.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Check, Timing, plot, record, results_folder, show
from cpo_fast.data.batches import epoch_batches
from cpo_fast.data.examples import Example
from cpo_fast.train.dealing import deal, num_tokens

NUM_QUESTIONS = 2000  # about 27,000 pairs, the size of the paper's sets
FEW_SHOT = 400
SIMULATED_RANKS = (1, 8, 16, 32, 64, 128, 256, 512)
# order, pairs of a step, and whether that is a rank's share or all
SETTINGS = (
    ("pairs", 32, False),  # the paper's step
    ("pairs", 16, True),
    ("pairs", 32, True),
    ("questions", 64, True),
    ("questions", 128, True),
)
NUM_BATCHES = 3
MEASURED = {
    "lr": 1e-3,
    "batch_pairs": 64,
    "max_steps": 8,
    "num_epochs": 8,
    "max_tokens": 2048,
    "batch_order": "questions",
}
BOUND = 1e-5


@dataclass(frozen=True)
class Cluster:
    """Assumed: A100s that train a LoRA of rank 8 on q, k and v of a 7B model with a cached reference under ZeRO 0.

    A token costs a forward and a backward through frozen weights, 4 operations a weight. Gradients are summed in a ring
    over the slowest link. A step has a fixed part for the host, the optimizer and the metrics.
    """

    weights: float = 6.7e9
    operations_a_second: float = 0.5 * 312e12
    adapter_bytes: float = 4 * 6.3e6
    link_bytes_a_second: float = 10e9  # of a node's network card of 100 Gb/s, at 0.8
    step_seconds: float = 0.05

    def seconds(self, busiest_tokens: float, num_ranks: int) -> float:
        """Of a step whose busiest rank computes so many tokens."""
        exchange = 2 * (num_ranks - 1) / num_ranks * self.adapter_bytes / self.link_bytes_a_second
        return busiest_tokens * 4 * self.weights / self.operations_a_second + exchange + self.step_seconds


def searched_questions(num_questions: int, few_shot: int, vocab_size: int, most: int = 6) -> list[Example]:
    """Pairs along winning chains of two to `most` thoughts of 15 to 45 tokens, with one to `most` losers at each."""
    generator = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(5, vocab_size) for _ in range(generator.randint(low, high)))

    shared, examples = ids(few_shot, few_shot), []
    for question in range(num_questions):
        prompt = shared + ids(40, 90)
        for depth in range(1, generator.randint(2, most) + 1):
            chosen = ids(15, 45)
            for _ in range(generator.randint(1, most)):
                examples.append(Example(prompt, (chosen, ids(15, 45)), f"q{question}", depth, f"f:{len(examples)}"))
            prompt = prompt + chosen
    return examples


def simulate(examples: list[Example], order: str, batch_pairs: int, num_ranks: int) -> dict[str, float] | None:
    """The split of a few steps, or None where a step would have more pairs than there are."""
    if batch_pairs > len(examples):
        return None
    groups = [example.group for example in examples]
    one = busiest = together = 0
    batches = epoch_batches(groups, batch_pairs, order, 0, 0)[: len(examples) // batch_pairs]  # type: ignore[arg-type]
    batches = batches[:NUM_BATCHES]  # full ones
    for indices in batches:
        batch = [examples[index] for index in indices]
        loads = [num_tokens(batch, places) if places else 0 for places in deal(batch, num_ranks)]
        one += num_tokens(batch, range(len(batch)))
        busiest += max(loads)
        together += sum(loads)
    pairs = sum(map(len, batches))
    seconds = Cluster().seconds(busiest / len(batches), num_ranks) * len(batches)
    return {
        "split_efficiency": one / (num_ranks * busiest),
        "tokens_a_pair": together / pairs,
        "pairs_a_second": pairs / seconds,
    }


def simulated() -> list[dict[str, Any]]:
    """Every setting on every number of ranks."""
    examples = searched_questions(NUM_QUESTIONS, FEW_SHOT, 30_000)
    found = []
    for order, size, is_share in SETTINGS:
        for num_ranks in SIMULATED_RANKS:
            batch_pairs = size * num_ranks if is_share else size
            values = simulate(examples, order, batch_pairs, num_ranks)
            if values is not None:
                setting = f"{order}, {size} {'a rank' if is_share else 'in all'}"
                found.append({"setting": setting, "ranks": num_ranks, "batch_pairs": batch_pairs, **values})
    return found


def make_training(folder: Path) -> Path:
    """A model whose step takes most of a second on a core, pairs, and the configuration."""
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=tiny_tokenizer().vocab_size,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = []
    for example in searched_questions(60, 100, config.vocab_size):
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        row: dict[str, Any] = dict(zip(names, map(list, (example.prompt_ids, *example.responses)), strict=True))
        rows.append(row | {"tree": example.group, "step": example.step, "chosen_final": False, "rejected_final": False})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"path": str(folder / "pairs.jsonl")},
        "train": {**MEASURED, "zero_stage": 0},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def measure(counts: list[int], num_rounds: int) -> tuple[list[Check], dict[int, Timing]]:
    """Seconds of a step on each number of ranks, and how far their adapters are apart."""
    from safetensors.torch import load_file

    seconds: dict[int, list[float]] = {count: [] for count in counts}
    checks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_training(folder)
        for turn in range(num_rounds):
            for count in counts:
                run = folder / f"run-{turn}-{count}"
                command = [sys.executable, "-m", "cpo_fast", "train", str(config), f"run={run}", "--gpus", str(count)]
                subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                seconds[count] += [line["seconds"] for line in lines[2:]]  # the first two are slower
                first, this = (
                    load_file(each / "adapter" / "adapter_model.safetensors")
                    for each in (folder / f"run-0-{counts[0]}", run)
                )
                apart = max(float((first[key] - this[key]).abs().max()) for key in first)
                checks.append(Check(f"adapter of {count} ranks, round {turn + 1}", apart, BOUND))
    return checks, {count: Timing(tuple(values)) for count, values in seconds.items()}


def one_thread() -> dict[str, str]:
    """The environment of a rank with one core."""
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    checks: list[Check] = []
    results: dict[str, Any] = {}
    if not options.no_measure:
        counts = [int(part) for part in options.ranks.split(",")]
        checks, timings = measure(counts, options.rounds)
        pairs = MEASURED["batch_pairs"]
        measured = [
            {
                "ranks": count,
                "seconds_a_step": timing.median,
                "spread": timing.spread,
                "pairs_a_second": pairs / timing.median,  # type: ignore[operator]
                "speed_up": timings[counts[0]].median / timing.median,
            }
            for count, timing in timings.items()
        ]
        results["measured"] = measured
    results["simulated"] = simulated()
    if not options.no_record:
        print(f"recorded in {record('scaling', ' '.join(sys.argv), checks, results)}")
    if "measured" in results:
        show(
            "measured, one thread a rank",
            ("ranks", "s a step", "pairs/s", "times one rank"),
            [
                (str(m["ranks"]), f"{m['seconds_a_step']:.2f}", f"{m['pairs_a_second']:.1f}", f"{m['speed_up']:.2f}")
                for m in results["measured"]
            ],
            f"largest difference of an adapter: {max(check.error for check in checks):.1e}",
        )
    show(
        "simulated: how busy GPUs are by the split alone, and pairs/s by assumption",
        ("order, pairs a step", "GPUs", "pairs in a step", "busy", "tokens a pair", "pairs/s (assumed)"),
        [
            (
                each["setting"],
                str(each["ranks"]),
                str(each["batch_pairs"]),
                f"{each['split_efficiency']:.2f}",
                f"{each['tokens_a_pair']:.0f}",
                f"{each['pairs_a_second']:.0f}",
            )
            for each in results["simulated"]
        ],
        f"assumed, not measured: {Cluster()}",
    )
    if not options.no_record:
        lines: dict[str, list[tuple[float, float]]] = {}
        busy: dict[str, list[tuple[float, float]]] = {}
        for each in results["simulated"]:
            lines.setdefault(each["setting"], []).append((each["ranks"], each["pairs_a_second"]))
            busy.setdefault(each["setting"], []).append((each["ranks"], each["split_efficiency"]))
        panels = {"pairs a second (7B on A100s, assumed)": lines, "share of a step that GPUs are busy": busy}
        title = "simulated from the split of a step; nothing here ran on a GPU"
        print(plot(results_folder() / "scaling.png", title, panels, "GPUs", "") or "no picture: matplotlib is missing")


if __name__ == "__main__":
    main()
