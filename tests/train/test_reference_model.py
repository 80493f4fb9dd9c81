"""`train.reference_model: base`: a training that goes on from an adapter is measured against the model without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError, CpoFastError
from cpo_fast.train import policy
from cpo_fast.train.loop import train
from tests.train.runs import CONSTANT_RATE, MakeConfig, adapter_of, id_rows, largest_difference, metrics_of, sgd

BETA, EOS = 0.1, 2


@pytest.fixture
def adapter(make_config: MakeConfig) -> Path:
    """An adapter that says clearly other things than its base."""
    return train(make_config(num_epochs=2, lr=0.05)).adapter_path


def of_adapter(make_config: MakeConfig, adapter: Path, **changes: Any) -> Config:
    return make_config(model={"adapter": str(adapter)}, **{"batch_pairs": 36, "num_epochs": 1, **changes})


def rewards(folder: Path, adapter: Path) -> dict[str, float]:
    """Mean over the rows of beta (log p with the adapter - log p without it), by plain forwards, a row at a time."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, adapter).double().eval()

    def logp(prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([[*prompt, *response]])
        values = model(ids).logits[0].log_softmax(-1)  # [T, V]
        return float(sum(values[len(prompt) + place - 1, token] for place, token in enumerate(response)))

    found: dict[str, list[float]] = {"chosen": [], "rejected": []}
    with torch.no_grad():
        for row in id_rows():
            for name, values in found.items():
                ids = row["prompt_token_ids"], row[f"{name}_token_ids"] + [EOS] * row[f"{name}_final"]
                with_adapter = logp(*ids)
                with model.disable_adapter():
                    values.append(BETA * (with_adapter - logp(*ids)))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("reference", ["online", "cached"])
def test_rewards_of_the_first_step_are_those_against_the_base(
    make_config: MakeConfig, tiny_folder: Path, adapter: Path, reference: str
) -> None:
    expected = rewards(tiny_folder, adapter)
    assert expected["chosen"] > 0.01
    first = metrics_of(of_adapter(make_config, adapter, reference=reference, reference_model="base"))[0]
    for name, value in expected.items():
        assert first[f"rewards/{name}"] == pytest.approx(value, abs=1e-5)


def test_without_it_the_reference_is_a_copy_and_the_adapter_another_one(make_config: MakeConfig, adapter: Path) -> None:
    options: dict[str, Any] = {**CONSTANT_RATE, "reference": "online"}
    own = adapter_of(of_adapter(make_config, adapter, **options), make_optimizer=sgd)
    base = adapter_of(of_adapter(make_config, adapter, **options, reference_model="base"), make_optimizer=sgd)
    cached = of_adapter(make_config, adapter, **(options | {"reference": "cached"}), reference_model="base")
    assert largest_difference(base, adapter_of(cached, make_optimizer=sgd)) < 1e-6
    assert largest_difference(own, base) > 1e-5
    # a file of log-probs of the one is never taken for those of the other
    again = cached.model_copy(update={"train": cached.train.model_copy(update={"reference_model": None})})
    for name in ("checkpoints/LATEST", "metrics.jsonl"):
        Path(cached.run, name).unlink()
    for path in Path(cached.run, "checkpoints").glob("step-*"):
        path.rename(path.with_name(f"old-{path.name}"))
    train(again, make_optimizer=sgd)
    assert len(list(Path(cached.run, "reference").glob("*.safetensors"))) == 2
    assert largest_difference(own, load_file(Path(cached.run, "adapter/adapter_model.safetensors"))) < 1e-6


def test_it_goes_on_bit_for_bit_and_is_part_of_what_makes_a_training_the_same(
    make_config: MakeConfig, adapter: Path
) -> None:
    options = {"batch_pairs": 12, "reference_model": "base", "save_every": 1, "lr": 0.02}
    whole = of_adapter(make_config, adapter, **options)
    train(whole)
    cut = of_adapter(make_config, adapter, **options)

    def stop(values: dict[str, Any], num_steps: int) -> None:
        if values["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, progress=stop)
    other = cut.model_copy(update={"train": cut.train.model_copy(update={"reference_model": None})})
    with pytest.raises(CpoFastError, match="reference_model was 'base', is None"):
        train(other)
    train(cut)
    file = "adapter/adapter_model.safetensors"
    assert Path(cut.run, file).read_bytes() == Path(whole.run, file).read_bytes()
    config = json.loads(Path(cut.run, "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_a_reference_that_is_not_the_base_is_refused(
    make_config: MakeConfig, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_policy = policy.load_policy

    def with_copy(config: Config, *arguments: Any) -> policy.Policy:
        return load_policy(
            config.model_copy(update={"train": config.train.model_copy(update={"reference_model": None})})
        )

    monkeypatch.setattr("cpo_fast.train.loop.load_policy", with_copy)
    with pytest.raises(
        CpoFastError, match=r"self-test: log-probs of the reference differ by .* so the reference is not the base"
    ):
        train(of_adapter(make_config, adapter, reference="online", reference_model="base"))


def test_an_adapter_that_changes_the_base_when_loaded_has_no_base_to_go_back_to(
    make_config: MakeConfig, tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32)
    PeftModel.from_pretrained(base, adapter).save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    config = of_adapter(make_config, tmp_path / "whole", reference_model="base")
    with pytest.raises(ConfigError, match="brings embeddings of its own"):
        train(config)
    train(config.model_copy(update={"train": config.train.model_copy(update={"reference_model": None})}))
