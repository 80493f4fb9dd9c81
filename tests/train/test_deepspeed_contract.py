"""What the product takes DeepSpeed's names for, on real engines at every stage: a release that changes one fails here.

`cpo_fast.train.deepspeed_engine` uses private names to go on from a checkpoint. Attributes that are only set would be set
on any object, so a name that is gone would be noticed late, or never.
"""

import inspect
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from cpo_fast.config import TrainConfig
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.ranks import Ranks
from cpo_fast.train.communication import Communicator, connect
from cpo_fast.train.deepspeed_engine import (
    MOMENTS,
    OLDEST,
    adamw,
    deepspeed_config,
    initialize_engine,
    partition,
    read_adapter,
    read_moments,
    restore_optimizer,
)
from cpo_fast.train.loop import train
from tests.train.runs import MakeConfig

STAGES = (0, 1, 2, 3)
ZERO_STAGES = (1, 2, 3)
CPU = torch.device("cpu")
SHAPE = (5, 3)
CONFIG = TrainConfig(lr=0.1, max_grad_norm=0.0)


class Module(torch.nn.Module):
    """Two trainable matrices beside a frozen one, and a loss of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen, self.first, self.second = (
            torch.nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(3)
        )
        self.frozen.requires_grad_(False)

    def forward(self, scale: float) -> torch.Tensor:
        return scale * (self.frozen * self.first * self.second.square()).sum()


class Trained:
    """An engine around `Module`, and what the loop hands to the functions under test."""

    def __init__(self, stage: int, weights: dict[str, torch.Tensor] | None = None) -> None:
        connect(Communicator(Ranks(), CPU), 60, None)
        self.stage, module = stage, Module()
        self.parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
        if weights is not None:
            with torch.no_grad():
                for name, value in weights.items():
                    self.parameters[name].copy_(value)
        if stage == 3:
            partition(module, CONFIG, CPU)
        optimizer = adamw(CONFIG, list(self.parameters.values()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.optimizer = optimizer
        self.engine = initialize_engine(module, optimizer, scheduler, CONFIG, stage, CPU)
        self.engine.train()

    def step(self, *scales: float) -> None:
        """One update from several backwards, as the loop takes it."""
        for scale in scales:
            self.engine.backward(self.engine(scale), scale_wrt_gas=False)
        self.engine.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in read_adapter(self.parameters, self.stage).items()}

    def moments(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in read_moments(self.engine, self.parameters, self.stage).items()}

    def flat(self) -> list[torch.Tensor]:
        """The tensors that torch's optimizer updates."""
        zero = self.engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)


def plainly(*updates: tuple[float, ...]) -> tuple[Module, torch.optim.Optimizer]:
    """The same updates by torch alone."""
    module = Module()
    optimizer = adamw(CONFIG, [module.first, module.second])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for scales in updates:
        optimizer.zero_grad()
        sum(module(scale) for scale in scales).backward()  # type: ignore[union-attr]
        optimizer.step()
        scheduler.step()
    return module, optimizer


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left.flatten(), right.detach().flatten(), rtol=1e-5, atol=1e-7)


ENGINE = ("enable_backward_allreduce", "global_steps", "global_rank", "skipped_steps", "lr_scheduler", "optimizer")
ENGINE_METHODS = ("backward", "step", "get_lr", "get_global_grad_norm")
ZERO = {
    1: ("optimizer", "single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state"),
    2: ("optimizer", "single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state"),
    3: ("optimizer", "fp32_partitioned_groups_flat", "_get_fp32_opt_state_partition"),
}
PARAMETER = ("ds_shape", "ds_numel", "partition_numel")  # of every weight under stage 3
UTILS = ("safe_get_full_optimizer_state", "safe_set_full_optimizer_state", "safe_get_full_fp32_param")


def missing(owner: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(owner, name)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_name_that_the_product_uses_is_there(stage: int) -> None:
    made = Trained(stage)
    import deepspeed  # once the product has said for which device
    import deepspeed.utils

    # the engine's own class sets these before the product does: on a second engine, made without it
    bare, *_ = deepspeed.initialize(model=Module(), config=deepspeed_config(CONFIG, 0))
    wanted: list[tuple[str, Any, tuple[str, ...]]] = [
        ("the engine", bare, ENGINE + ENGINE_METHODS),
        ("deepspeed.utils", deepspeed.utils, UTILS),
        ("deepspeed.zero", deepspeed.zero, ("Init", "GatheredParameters")),
        ("the ZeRO optimizer", made.engine.optimizer, ZERO.get(stage, ())),
    ]
    if stage == 3:
        wanted += [(f"parameter {name}", each, PARAMETER) for name, each in made.engine.module.named_parameters()]
    gone = [f"{what} has no {name}" for what, owner, names in wanted for name in missing(owner, names)]
    assert not gone, (
        f"DeepSpeed {deepspeed.__version__} is not the one that cpo_fast/train/deepspeed_engine.py is written for: "
        + "; ".join(gone)
    )
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert {"module", "config_dict_or_path", "dtype"} <= set(inspect.signature(deepspeed.zero.Init).parameters)
    assert {"auto_mpi_discovery", "verbose"} <= set(inspect.signature(deepspeed.init_distributed).parameters)


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_is_that_of_the_summed_gradient(stage: int) -> None:
    """No mean over the backwards, no scaling, and no update on the way: unmanaged accumulation, clipping off."""
    made = Trained(stage)
    made.step(1.0, 2.0)
    made.step(0.5)
    module, _ = plainly((1.0, 2.0), (0.5,))
    for name, value in made.weights().items():
        assert close(value, getattr(module, name)), name
    assert made.engine.global_steps == 2
    assert made.engine.skipped_steps == 0
    assert made.engine.get_lr() == [pytest.approx(0.1 / 3)]
    if stage > 0:
        expected = torch.stack([getattr(module, name).grad.norm() for name in made.parameters]).norm()
        assert float(made.engine.get_global_grad_norm()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("allreduce", [False, True])
def test_the_switch_of_stage_0_leaves_gradients_alone(allreduce: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable_backward_allreduce` decides whether DeepSpeed reduces a step's gradients, which the loop has summed."""
    made, reductions = Trained(0), []
    assert made.engine.enable_backward_allreduce is False
    made.engine.enable_backward_allreduce = allreduce
    monkeypatch.setattr(made.engine, "buffered_allreduce_fallback", lambda *args, **options: reductions.append(1))
    made.step(1.0)
    assert bool(reductions) is allreduce


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_the_flat_tensors_hold_the_weights_and_are_what_torch_updates(stage: int) -> None:
    made = Trained(stage)
    flat = made.flat()
    updated = [each for group in made.engine.optimizer.optimizer.param_groups for each in group["params"]]
    assert made.engine.optimizer.optimizer is made.optimizer
    # at stage 3 the optimizer holds one of them at a time, in its own step
    assert stage == 3 or [id(each) for each in updated] == [id(each) for each in flat]
    module = Module()
    numbers = torch.cat([module.first.detach().flatten(), module.second.detach().flatten()])
    held = torch.cat([each.detach().flatten() for each in flat])
    assert torch.equal(held[held != 0].sort().values, numbers.sort().values)  # in any order, with zeros behind
    made.step(1.0)
    assert all(each in made.optimizer.state for each in flat)
    assert all(set(MOMENTS) <= set(made.optimizer.state[each]) for each in flat)


@pytest.mark.parametrize("stage", STAGES)
def test_moments_are_those_of_torch(stage: int) -> None:
    made = Trained(stage)
    assert made.moments() == {}
    made.step(1.0)
    made.step(2.0)
    module, optimizer = plainly((1.0,), (2.0,))
    assert made.moments().keys() == {f"{moment}.{name}" for name in made.parameters for moment in MOMENTS}
    for name in made.parameters:
        for moment in MOMENTS:
            assert close(made.moments()[f"{moment}.{name}"], optimizer.state[getattr(module, name)][moment])


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_is_given_moments_goes_on_bit_for_bit(stage: int) -> None:
    one = Trained(stage)
    one.step(1.0)
    one.step(2.0)
    weights, moments = one.weights(), one.moments()
    other = Trained(stage, weights)
    restore_optimizer(other.engine, other.parameters, moments, 2, stage)
    for name, value in other.moments().items():
        assert torch.equal(value, moments[name]), name
    for made in (one, other):
        made.step(3.0)
        made.step(1.0)
    assert one.engine.get_lr() == other.engine.get_lr()
    assert one.engine.global_steps == other.engine.global_steps == 4
    for left, right in ((one.weights(), other.weights()), (one.moments(), other.moments())):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_part_of_stage_3_is_a_view_of_the_state_and_as_long_as_said() -> None:
    """What `restore_optimizer` writes into, in the place of DeepSpeed's own setter."""
    made = Trained(3)
    made.step(1.0)
    for parameter in made.parameters.values():
        part, _ = made.engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key="exp_avg"
        )
        assert part.numel() == parameter.partition_numel() == parameter.ds_numel == 15  # type: ignore[attr-defined]
        assert parameter.ds_shape == torch.Size(SHAPE)  # type: ignore[attr-defined]
        part.data.fill_(7.0)
    assert all(bool((value == 7).all()) for name, value in made.moments().items() if name.startswith("exp_avg."))


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_that_is_left_out_in_silence_is_counted(stage: int) -> None:
    """Releases and stages differ in what they do with a gradient that is not finite, which the loop refuses before."""
    made = Trained(stage)
    before = made.weights()
    made.step(float("nan"))
    is_unchanged = all(torch.equal(before[name], value) for name, value in made.weights().items())
    assert made.engine.skipped_steps == is_unchanged
    assert made.engine.global_steps == 1


@pytest.mark.parametrize("stage", [0, 3])
def test_an_older_deepspeed_is_refused_by_name(
    make_config: MakeConfig, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.19.2")
    with pytest.raises(EnvironmentProblem) as raised:
        train(make_config(zero_stage=stage))
    assert str(raised.value) == (
        f"DeepSpeed 0.19.2 is too old for training, which needs {OLDEST} or newer; install it: "
        f"pip install 'deepspeed>={OLDEST}'"
    )
    assert raised.value.exit_code == 5


def test_the_oldest_deepspeed_is_the_one_that_the_package_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"deepspeed>={OLDEST}" in project["dependencies"]


def test_store_of_one_process_answers_all_that_nccl_asks_a_store() -> None:
    """A lone process meets nobody, so its group has a store in memory. NCCL's groups take more of a store than gloo's."""
    store = dist.PrefixStore("default_pg", dist.HashStore()).clone()  # type: ignore[attr-defined]  # torch's stub lacks it
    store.set_timeout(timedelta(seconds=60))
    store.set("id", b"\0\xff")  # NCCL's name for a communicator is binary
    store.wait(["id"], timedelta(seconds=60))
    assert store.get("id") == b"\0\xff"
    assert store.check(["id"])
    assert not store.check(["dump"])  # its watchdog looks for this one
    assert store.add("count", 1) == 1
    assert store.compare_set("who", "", "me") == b"me"
    store.multi_set(["a", "b"], ["1", "2"])
    assert store.multi_get(["a", "b"]) == [b"1", b"2"]
    assert store.delete_key("a")
    assert store.has_extended_api()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("stage", [0, 2])
def test_one_gpu_trains(make_config: MakeConfig, stage: int) -> None:
    """In a process of its own: the group of this one is gloo's."""
    config = make_config(max_steps=2, zero_stage=stage, model={"device": "cuda"})
    path = Path(config.run).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "cpo_fast", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((Path(config.run) / "metrics.jsonl").read_text().splitlines()) == 2
