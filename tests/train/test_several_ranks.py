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
from tests.train import valued_trees
from tests.train.dpo_of_trl import BOUND as TRL_BOUND
from tests.train.dpo_of_trl import TrlRun
from tests.train.rank_process import Run, launch, take
from tests.train.runs import CONSTANT_RATE, id_rows, largest_difference
from tests.train.talker_runs import COLLAPSING, DEV, by_votes, make_inputs

BOUND = 1e-5
STAGES = (0, 1, 2, 3)
BAD_TOKEN = 250  # ids of rows are below it
# nothing stays gathered or is gathered ahead; with DeepSpeed's defaults a tiny model is never cut at all
CUT_UP = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
# one process against several ranks: options of section train, and the stages in `make test`; `make soak` has all
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, STAGES),
    "one pair a step": ({"batch_pairs": 1}, (0, 3)),  # the other rank has nothing to do
    "recomputed": ({"gradient_checkpointing": "non_reentrant"}, (3,)),
    "online": ({"reference": "online"}, (0,)),
    "imitation": ({"method": "sft"}, (0, 3)),
    "ranking": ({"method": "tpo"}, (0, 2)),
    "tied": ({"model": "tied"}, (3,)),
    "accuracy": ({"stop_on": "accuracy", "max_steps": 4}, (2,)),  # three questions, of which the other rank has one
    "gradient": (CONSTANT_RATE | {"max_steps": 1, "max_grad_norm": 0.0}, (0, 2, 3)),
}
OFFLOADED = [(1, "optimizer"), (3, "optimizer"), (3, "all")]
BAD_STAGES = (0, 3)
BFLOAT16_STAGES = (0, 3)
Make = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """Where the runs are, and how their configurations are made."""

    folder: Path
    make: Make

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        """Of the last step: `<run>/adapter` is that of the best one."""
        folder = self.folder / name / "checkpoints"
        return load_file(folder / (folder / "LATEST").read_text() / "adapter.safetensors")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Without the times."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def last_checkpoint(self, name: str) -> dict[str, bytes]:
        folder = self.folder / name / "checkpoints"
        newest = folder / (folder / "LATEST").read_text()
        return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}

    def state(self, name: str) -> dict[str, Any]:
        """Of the newest checkpoint."""
        folder = self.folder / name / "checkpoints"
        state: dict[str, Any] = json.loads((folder / (folder / "LATEST").read_text() / "state.json").read_text())
        return state

    def errors(self, name: str) -> list[str]:
        return [file.read_text() for file in sorted((self.folder / name).glob("error-*"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Models, data, and how runs are made of them."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model", max_position_embeddings=4096)  # prompts of the questions fit
    save_tiny_model(folder / "tied", tie_word_embeddings=True)
    save_tiny_model(folder / "broken")
    weights = load_file(folder / "broken" / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN] = torch.inf
    save_file(weights, folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    rows = id_rows(num_questions=5)
    write(folder / "pairs.jsonl", rows)
    write(folder / "completions.jsonl", [row | {"completion_token_ids": row["chosen_token_ids"]} for row in rows[::3]])
    valued_trees.write(folder / "trees.jsonl", valued_trees.valued_trees(5))
    bad = [dict(row) for row in rows]
    bad[7]["rejected_token_ids"] = [*bad[7]["rejected_token_ids"][:-1], BAD_TOKEN, 9]
    write(folder / "bad.jsonl", bad)
    write(folder / "questions.jsonl", [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(3)])
    (folder / "cut-up.json").write_text(json.dumps(CUT_UP))
    make_inputs(folder)

    def make(
        name: str,
        model: str = "model",
        data: str = "pairs",
        held_out: float = 0.2,
        dtype: str = "float32",
        **train: Any,
    ) -> dict[str, Any]:
        data = {"sft": "completions", "tpo": "trees"}.get(train.get("method", ""), data)
        # steep enough that gradients are clipped, micro-batches small enough that ranks have several
        options = {"lr": 0.01, "batch_pairs": 12, "num_epochs": 4, "max_steps": 10, "max_tokens": 60}
        return {
            "run": str(folder / name),
            "model": {"path": str(folder / model), "dtype": dtype, "device": "cpu"},
            "task": {"path": str(folder / "questions.jsonl")},
            "eval": {"max_new_tokens": 4},
            "data": {"path": str(folder / f"{data}.jsonl"), "held_out": held_out},
            "lora": {"r": 4, "alpha": 8},
            "train": options
            | {"max_grad_norm": 0.05, "zero_stage": 0, "deepspeed": str(folder / "cut-up.json")}
            | train,
        }

    return Trained(folder, make)


def of_variant(made: Trained, name: str, where: str, **options: Any) -> Run:
    """A run of a variant, called `name, where`."""
    return Run(made.make(f"{name}, {where}", **VARIANTS[name][0], **options), sgd=name == "gradient")


def sampling(made: Trained, where: str) -> Run:
    """A run of the talker, of which chains are sampled before training, and which comes to no answer after two steps.

    Of five questions, of which the other rank has two; two are contradicted then.
    """
    rows = [{"id": f"q{number}", "question": DEV[number]} for number in range(1, 6)]
    write(made.folder / "five.jsonl", rows)
    options = COLLAPSING | {"max_steps": 3, "alarm_chains": 2, "zero_stage": 0}
    config = by_votes(
        made.folder, made.folder / f"sampling, {where}", dev_path=str(made.folder / "five.jsonl"), **options
    )
    return Run(config.model_dump(mode="json") | {"seed": 3}, samples=True)


@pytest.fixture(scope="module")
def trained(made: Trained, trl_run: TrlRun) -> Trained:
    """Every run of `make test`."""
    make = made.make
    for name in VARIANTS:
        take(of_variant(made, name, "one"))
    take(Run(make("bfloat16, one", dtype="bfloat16")))
    take(sampling(made, "one"))
    take(Run(make("0@1 to 3@2"), signal_at=4))
    of_two = [
        of_variant(made, name, str(stage), zero_stage=stage)
        for name, (_, stages) in VARIANTS.items()
        for stage in stages
    ]
    of_two.append(sampling(made, "two"))
    of_two += [Run(make(f"{what} offloaded, {stage}", zero_stage=stage, offload=what)) for stage, what in OFFLOADED]
    of_two += [Run(make(f"bad, {stage}", "broken", "bad", held_out=0.0, zero_stage=stage)) for stage in BAD_STAGES]
    of_two += [Run(make(f"bfloat16, {stage}", dtype="bfloat16", zero_stage=stage)) for stage in BFLOAT16_STAGES]
    of_two += [Run(make(f"off, {stage}", zero_stage=stage), off_rank=1) for stage in STAGES]
    for stage in STAGES:
        options = {"zero_stage": stage, "deepspeed": str(made.folder / "cut-up.json")}
        of_two.append(Run(trl_run.config(made.folder / f"trl, {stage}", **options), sgd=True))
    # interrupted in the middle of an epoch, by a signal that only rank 1 receives, and taken up again
    for stage in STAGES:
        interrupted = make(f"resumed, {stage}", zero_stage=stage)
        of_two += [Run(interrupted, signal_at=4, signal_rank=1), Run(interrupted)]
    of_two += [Run(make(f"{stage}@2 to {other}@1", zero_stage=stage), signal_at=5) for stage, other in ((3, 0), (2, 3))]
    for reference in ("online", "cached"):
        gathering = make(f"gathers, {reference}", held_out=0.0, zero_stage=3, reference=reference)
        of_two.append(Run(gathering, gathers=True))
    launch(of_two, 2, made.folder / "first launch")
    for stage, other in ((3, 0), (2, 3)):
        take(Run(make(f"{stage}@2 to {other}@1", zero_stage=other)))
    launch([Run(make("0@1 to 3@2", zero_stage=3))], 2, made.folder / "second launch")
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in VARIANTS for stage in VARIANTS[name][1]])
def test_two_ranks_end_at_the_parameters_and_metrics_of_one_process(trained: Trained, name: str, stage: int) -> None:
    one, two = f"{name}, one", f"{name}, {stage}"
    assert largest_difference(trained.adapter(one), trained.adapter(two)) < BOUND
    # what depends on how a step is cut into forests, and signs of margins that are rounding errors before the first steps
    cut = {"micro_batches", "tokens/computed", "tokens/saved", "eval_micro_batches"}
    for left, right in zip(trained.metrics(one), trained.metrics(two), strict=True):
        assert {key for key in left if key not in cut} == {key for key in right if key not in cut}
        for key in left.keys() - cut:
            if "accuracies" in key and left["step"] <= 3:
                continue
            close = left[key] if isinstance(left[key], str) else pytest.approx(left[key], rel=1e-4, abs=1e-5)
            assert right[key] == close, (left["step"], key)


def test_ranks_sample_the_chains_that_one_process_samples(trained: Trained) -> None:
    one, two = (trained.state(f"sampling, {where}")["validator"] for where in ("one", "two"))
    assert one["sampled"] == two["sampled"]
    assert one["alarm"]["lost"] == two["alarm"]["lost"] == [1, 0, 0, 0, 1]
    for where in ("one", "two"):
        lines = trained.metrics(f"sampling, {where}")
        assert [line["eval_contradicted"] for line in lines] == [0, 0, 0.4, 0.4], where


def test_gradients_are_clipped_and_ranks_have_several_and_not_equally_many_micro_batches(trained: Trained) -> None:
    lines = trained.metrics("plain, 0")[1:]  # after the validation of the start
    assert sum(line["grad_norm"] > 0.05 for line in lines) >= 5
    assert max(line["micro_batches"] for line in lines) >= 4
    assert any(line["micro_batches"] % 2 for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_end_at_the_parameters_of_trl(trained: Trained, trl_run: TrlRun, stage: int) -> None:
    movement, difference = trl_run.movement, trl_run.difference(trained.folder / f"trl, {stage}")
    assert movement >= 1e-2
    assert difference <= TRL_BOUND * movement
    print(f"stage {stage}: movement {movement:.3e}, difference {difference:.1e}")


@pytest.mark.parametrize("stage", BFLOAT16_STAGES)
def test_two_ranks_train_on_a_bfloat16_base(
    trained: Trained, stage: int, record_property: Callable[[str, object], None]
) -> None:
    """Other forests round otherwise in 16 bits, and so does ZeRO 3's own linear: the difference is shown, not judged."""
    one, two = trained.adapter("bfloat16, one"), trained.adapter(f"bfloat16, {stage}")
    assert len(trained.metrics("bfloat16, one")) == len(trained.metrics(f"bfloat16, {stage}")) == 11
    assert all(bool(each.isfinite().all()) for each in two.values())
    difference = largest_difference(one, two)
    record_property("largest_difference", difference)
    print(f"bfloat16 base, stage {stage}: two ranks end {difference:.1e} from one process")


@pytest.mark.soak
def test_four_ranks_end_at_the_parameters_of_one_process(made: Trained) -> None:
    for name in VARIANTS:
        take(of_variant(made, name, "alone"))
    offloaded = [(stage, "optimizer") for stage in (1, 2, 3)] + [(3, "all")]
    # stage 3 cannot generate
    cases = [(name, stage) for name in VARIANTS for stage in STAGES if (name, stage) != ("accuracy", 3)]
    of_four = [of_variant(made, name, f"{stage} of four", zero_stage=stage) for name, stage in cases]
    of_four += [Run(made.make(f"{what} off, {stage}", zero_stage=stage, offload=what)) for stage, what in offloaded]
    launch(of_four, 4, made.folder / "four")
    for name, stage in cases:
        assert largest_difference(made.adapter(f"{name}, alone"), made.adapter(f"{name}, {stage} of four")) < BOUND
    for stage, what in offloaded:
        assert largest_difference(made.adapter("plain, alone"), made.adapter(f"{what} off, {stage}")) < BOUND


@pytest.mark.parametrize(("stage", "what"), OFFLOADED)
def test_offloading_changes_nothing(trained: Trained, stage: int, what: str) -> None:
    offloaded = trained.adapter(f"{what} offloaded, {stage}")
    assert largest_difference(trained.adapter("plain, one"), offloaded) < BOUND


@pytest.mark.parametrize(("reference", "num_gathers"), [("online", 3), ("cached", 2)])
def test_a_micro_batch_gathers_the_head_once_and_a_layer_once_a_pass(
    trained: Trained, reference: str, num_gathers: int
) -> None:
    """The passes are policy, reference and backward.

    The head has no backward of its own, nor have the first layer's projections, whose input has no gradient.
    """
    found = json.loads((trained.folder / f"gathers, {reference}" / "gathers.json").read_text())
    per_micro_batch = {weight: count / found["counts"]["lm_head.weight"] for weight, count in found["counts"].items()}
    linear = {weight: count for weight, count in per_micro_batch.items() if "layers" in weight and "_proj" in weight}
    first = {weight: count for weight, count in linear.items() if "layers.0" in weight and "base_layer" in weight}
    assert len(linear) == 14
    assert len(first) == 3
    assert set(first.values()) == {num_gathers - 1}
    assert {count for weight, count in linear.items() if weight not in first} == {num_gathers}
    # what a pass gathered is released after it, backward's and the reference's. The weight that is needed next may be there
    assert found["whole"] == 0
    assert len(found["whole_after_pass"]) > 2
    assert all(len(whole) <= 1 for whole in found["whole_after_pass"])
    assert not any("layers" in name for whole in found["whole_after_pass"] for name in whole)


@pytest.mark.parametrize("stage", BAD_STAGES)
def test_a_value_that_is_not_finite_on_one_rank_ends_all_and_names_the_row(trained: Trained, stage: int) -> None:
    errors = trained.errors(f"bad, {stage}")
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith("7 the loss of 1 rows is not finite at step")
    assert "bad.jsonl:8" in errors[0]
    assert "weights were not updated" in errors[0]
    assert not (trained.folder / f"bad, {stage}" / "adapter").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_that_is_not_its_reference_on_one_rank_ends_all_before_the_first_step(
    trained: Trained, stage: int
) -> None:
    errors = trained.errors(f"off, {stage}")
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith("1 self-test: rewards at step 0 reach ")
    assert "on rank 1, not 0, so the reference is not the starting point" in errors[0]
    assert not (trained.folder / f"off, {stage}" / "metrics.jsonl").exists()


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
    assert steps == list(range(11))
