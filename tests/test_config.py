"""Presets: what they set, what wins over them, and that every value in them is a valid setting."""

from pathlib import Path

import pytest

from cpo_fast.config import load_config
from cpo_fast.config.sections import PRESETS
from cpo_fast.errors import ConfigError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_valid_configuration(name: str) -> None:
    config = load_config(None, [f"preset={name}"])
    assert config.lora.r == 8
    assert config.train.patience is None or config.data.held_out > 0


def test_paper_and_official_differ_where_the_code_leaves_the_paper() -> None:
    paper, official = (load_config(None, [f"preset={name}"]) for name in ("paper", "official"))
    assert (paper.train.beta, official.train.beta) == (0.1, 0.2)
    assert (paper.data.eos, official.data.eos) == ("final", "every")
    assert (paper.search.value_impossible, official.search.value_impossible) == (1.0, 0.001)
    assert (paper.train.batch_pairs, official.train.batch_pairs) == (32, 16)


def test_file_wins_over_the_preset_and_override_over_both(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\ntrain:\n  lr: 1.0e-5\nseed: 4\n")
    config = load_config(path, ["search.num_kept=3"])
    assert config.train.lr == 1e-5
    assert config.train.num_epochs == 4
    assert config.search.num_kept == 3
    assert config.search.num_candidates == 10
    assert config.seed == 4
    assert load_config(path, ["train.lr=2e-5"]).train.lr == 2e-5


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="preset: expected one of paper, official, got 'papers'"):
        load_config(None, ["preset=papers"])


def test_misspelt_preset_key_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("presets: paper\n")
    with pytest.raises(ConfigError, match="unknown key 'presets'; did you mean 'preset'"):
        load_config(tmp_path / "c.yaml")


def test_patience_without_held_out_questions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.held_out"):
        load_config(None, ["train.patience=2"])
