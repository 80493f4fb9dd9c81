"""Two gloo ranks and DeepSpeed end where one process ends, whatever the ZeRO stage, and go on where a signal stopped them.

All runs of two ranks are trained in two launches. What one process does is trained in this one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_model
from tests.train.rank_process import Run, launch, take
from tests.train.runs import CONSTANT_RATE, id_rows, largest_difference

BOUND = 1e-5
STAGES = (0, 1, 2, 3)
BAD_TOKEN = 250  # ids of rows are below it
# nothing stays gathered, as of a large model; with DeepSpeed's defaults a tiny one is never cut at all
CUT_UP = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 4000,
        "stage3_max_reuse_distance": 1000,
        "stage3_prefetch_bucket_size": 3000,
    }
}
# one process against two ranks: name, options of section train, other options
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one pair a step": {"batch_pairs": 1},  # the other rank has nothing to do
    "recomputed": {"gradient_checkpointing": "non_reentrant"},
    "cached": {"reference": "cached"},
    "imitation": {"method": "sft"},
}
OFFLOADED = [(stage, "optimizer") for stage in (1, 2, 3)] + [(3, "all")]
Make = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """Where the runs are, and how their configurations are made."""

    folder: Path
    make: Make

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Without the times."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def last_checkpoint(self, name: str) -> dict[str, bytes]:
        folder = self.folder / name / "checkpoints"
        newest = folder / (folder / "LATEST").read_text()
        return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}

    def errors(self, name: str) -> list[str]:
        return [file.read_text() for file in sorted((self.folder / name).glob("error-*"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every run of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "tied", tie_word_embeddings=True)
    save_tiny_model(folder / "broken")
    weights = load_file(folder / "broken" / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN] = torch.inf
    save_file(weights, folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    rows = id_rows(num_questions=5)
    write(folder / "pairs.jsonl", rows)
    write(folder / "completions.jsonl", [row | {"completion_token_ids": row["chosen_token_ids"]} for row in rows])
    bad = [dict(row) for row in rows]
    bad[7]["rejected_token_ids"] = [*bad[7]["rejected_token_ids"][:-1], BAD_TOKEN, 9]
    write(folder / "bad.jsonl", bad)
    (folder / "cut-up.json").write_text(json.dumps(CUT_UP))

    def make(
        name: str, model: str = "model", data: str = "pairs", held_out: float = 0.2, **train: Any
    ) -> dict[str, Any]:
        if train.get("method") == "sft":
            data = "completions"
        # steep enough that gradients are clipped, micro-batches small enough that ranks have several
        options = {"lr": 0.01, "batch_pairs": 12, "num_epochs": 4, "max_steps": 10, "max_tokens": 120}
        return {
            "run": str(folder / name),
            "model": {"path": str(folder / model), "dtype": "float32", "device": "cpu"},
            "data": {"path": str(folder / f"{data}.jsonl"), "held_out": held_out},
            "lora": {"r": 4, "alpha": 8},
            "train": options
            | {"max_grad_norm": 0.05, "zero_stage": 0, "deepspeed": str(folder / "cut-up.json")}
            | train,
        }

    runs = Trained(folder, make)
    gradient = CONSTANT_RATE | {"max_steps": 1, "max_grad_norm": 0.0}
    for name, options in VARIANTS.items():
        take(Run(make(f"{name}, one", **options)))
    take(Run(make("tied, one", model="tied")))
    take(Run(make("gradient, one", **gradient), sgd=True))
    take(Run(make("0@1 to 3@2"), signal_at=4))
    of_two = [
        Run(make(f"{name}, {stage}", zero_stage=stage, **options))
        for name, options in VARIANTS.items()
        for stage in (STAGES if name in ("plain", "one pair a step") else (0, 3))
    ]
    of_two += [Run(make(f"tied, {stage}", model="tied", zero_stage=stage)) for stage in (0, 3)]
    of_two += [Run(make(f"gradient, {stage}", zero_stage=stage, **gradient), sgd=True) for stage in STAGES]
    of_two += [Run(make(f"{what} offloaded, {stage}", zero_stage=stage, offload=what)) for stage, what in OFFLOADED]
    of_two += [Run(make(f"bad, {stage}", "broken", "bad", held_out=0.0, zero_stage=stage)) for stage in STAGES]
    for (
        stage
    ) in STAGES:  # interrupted in the middle of an epoch, by a signal that only rank 1 receives, and taken up again
        interrupted = make(f"resumed, {stage}", zero_stage=stage)
        of_two += [Run(interrupted, signal_at=4, signal_rank=1), Run(interrupted)]
    of_two += [Run(make(f"{stage}@2 to {other}@1", zero_stage=stage), signal_at=5) for stage, other in ((3, 0), (2, 3))]
    of_two += [
        Run(
            make(f"gathers, {reference}, {how}", zero_stage=3, reference=reference, gradient_checkpointing=how),
            gathers=True,
        )
        for reference in ("online", "cached")
        for how in ("off", "non_reentrant")
    ]
    launch(of_two, 2, folder / "first launch")
    for stage, other in ((3, 0), (2, 3)):
        take(Run(make(f"{stage}@2 to {other}@1", zero_stage=other)))
    launch([Run(make("0@1 to 3@2", zero_stage=3))], 2, folder / "second launch")
    return runs


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*VARIANTS, "tied", "gradient"])
def test_two_ranks_end_at_the_parameters_and_metrics_of_one_process(trained: Trained, name: str, stage: int) -> None:
    if not (trained.folder / f"{name}, {stage}").exists():
        pytest.skip("stages 1 and 2 have no code of their own here")
    one, two = f"{name}, one", f"{name}, {stage}"
    assert largest_difference(trained.adapter(one), trained.adapter(two)) < BOUND
    ours, theirs = trained.metrics(one), trained.metrics(two)
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        # what depends on how a step is cut into forests
        cut = {"micro_batches", "tokens/computed", "tokens/saved", "eval_micro_batches"}
        assert {key for key in left if key not in cut} == {key for key in right if key not in cut}
        for key in left.keys() - cut:
            assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), (left["step"], key)


def test_gradients_are_clipped_and_ranks_have_several_micro_batches(trained: Trained) -> None:
    lines = trained.metrics("plain, 0")
    assert sum(line["grad_norm"] > 0.05 for line in lines) >= 5
    assert all(line["micro_batches"] >= 4 for line in lines)


@pytest.mark.parametrize(("stage", "what"), OFFLOADED)
def test_offloading_changes_nothing(trained: Trained, stage: int, what: str) -> None:
    offloaded = trained.adapter(f"{what} offloaded, {stage}")
    assert largest_difference(trained.adapter("plain, one"), offloaded) < BOUND


@pytest.mark.parametrize(("reference", "num_forwards"), [("online", 2), ("cached", 1)])
@pytest.mark.parametrize(("how", "num_backwards"), [("off", 1), ("non_reentrant", 2)])
def test_a_micro_batch_gathers_the_head_once_and_layers_once_a_pass(
    trained: Trained, reference: str, num_forwards: int, how: str, num_backwards: int
) -> None:
    """Policy and reference are a pass each, recomputation is one more, and the head has no backward of its own."""
    name = f"gathers, {reference}, {how}"
    found = json.loads((trained.folder / name / "gathers.json").read_text())
    per_micro_batch = {weight: count / found["counts"]["lm_head.weight"] for weight, count in found["counts"].items()}
    assert per_micro_batch["lm_head.weight"] == 1
    linear = [weight for weight in per_micro_batch if "layers" in weight and "_proj" in weight]
    assert len(linear) == 14
    assert {per_micro_batch[weight] for weight in linear} == {num_forwards + num_backwards}
    assert found["whole"] == 0
    assert largest_difference(trained.adapter("plain, one"), trained.adapter(name)) < BOUND


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_that_is_not_finite_on_one_rank_ends_all_and_names_the_row(trained: Trained, stage: int) -> None:
    errors = trained.errors(f"bad, {stage}")
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith("7 the loss of 1 rows is not finite at step")
    assert "bad.jsonl:8" in errors[0]
    assert "weights were not updated" in errors[0]
    assert not (trained.folder / f"bad, {stage}" / "adapter").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_to_one_rank_ends_all_and_the_same_run_goes_on_bit_for_bit(trained: Trained, stage: int) -> None:
    name = f"resumed, {stage}"
    errors = trained.errors(name)
    assert len(errors) == 2
    assert all(error.startswith("143 SIGTERM after step") for error in errors)
    assert trained.last_checkpoint(name) == trained.last_checkpoint(f"plain, {stage}")
    assert trained.metrics(name) == trained.metrics(f"plain, {stage}")
    assert largest_difference(trained.adapter(name), trained.adapter(f"plain, {stage}")) == 0


@pytest.mark.parametrize("name", ["3@2 to 0@1", "0@1 to 3@2", "2@2 to 3@1"])
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(trained: Trained, name: str) -> None:
    assert any("after step" in error for error in trained.errors(name))
    assert largest_difference(trained.adapter("plain, one"), trained.adapter(name)) < BOUND
    steps = [line["step"] for line in trained.metrics(name)]
    assert steps == list(range(1, 11))
