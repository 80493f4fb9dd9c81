"""Our training loop against TRL's own, unmodified DPOTrainer: the same pairs, the same batches, twenty SGD steps.

What several ranks do of it is in `test_several_ranks`.
"""

from pathlib import Path

from cpo_fast.config import validate_config
from cpo_fast.train.loop import train
from tests.train.dpo_of_trl import BOUND, TrlRun
from tests.train.runs import sgd


def test_twenty_steps_end_at_the_parameters_of_trl(trl_run: TrlRun, tmp_path: Path) -> None:
    ours, other_beta = tmp_path / "ours", tmp_path / "other beta"
    train(validate_config(trl_run.config(ours)), make_optimizer=sgd)
    movement, difference = trl_run.movement, trl_run.difference(ours)
    assert movement >= 1e-2
    assert difference <= BOUND * movement
    # the comparison has teeth: a slightly different objective ends elsewhere
    train(validate_config(trl_run.config(other_beta, beta=0.101)), make_optimizer=sgd)
    off = trl_run.difference(other_beta)
    assert off > BOUND * movement
    print(f"movement {movement:.3e}, difference {difference:.1e}, with beta 0.101 {off:.1e}")
