"""A step waits for the device once, where it reads its numbers: counted on a real step of the tiny model.

Two modes watch every call: tensor methods that hand a value to Python, and aten ops whose result has a size or a value that
only the device knows. Where a call happens decides: while a forest is packed everything is on the host by design (`_pack`
sends it to the device at its end); DeepSpeed's own step is DeepSpeed's; `Metrics.read` is the one wait that is meant.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_fast.train import metrics
from cpo_fast.train.loop import train
from cpo_fast.train.objective import Objective
from tests.train.runs import MakeConfig

METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}
ATEN = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
HOST_STAGE = "_pack"  # everything there happens before anything is on the device
DECLARED_READ = "read"
# lists that the eager ops read of a plan's copy on the host: runs of keys, and chunks of rows; the Triton kernels have none
HOST_LISTS = {"key_runs", "_chunks"}


class Waits:
    """Counts (function of ours, call) outside what is allowed, and the declared reads."""

    def __init__(self) -> None:
        self.undeclared: Counter[tuple[str, str]] = Counter()
        self.num_reads = 0

    def note(self, call: str) -> None:
        frame, names = sys._getframe(1), []
        while frame is not None:
            path = frame.f_code.co_filename
            if "/deepspeed/" in path and frame.f_code.co_name == "step":
                return
            if "/cpo_fast/" in path or "/cpo_kernels/" in path:
                names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        if "step" not in names:
            return
        if DECLARED_READ in names and call in ("cpu", "numpy"):
            self.num_reads += call == "cpu"
        elif not {HOST_STAGE, *HOST_LISTS} & set(names):
            self.undeclared[(names[0] if names else "?", call)] += 1


class Ops(TorchDispatchMode):
    """Aten ops that wait for the device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(getattr(i, "dtype", None) in (torch.bool, torch.uint8) for i in args[1])
        sizeless = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in ATEN or by_mask or sizeless:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Tensor methods that give Python a value."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Watches everything that the test runs; what is not inside a step of the loop is not counted."""
    monkeypatch.setenv("CPO_KERNELS_IMPL", "eager")  # native attention is for tensors that are on the host already
    found = Waits()
    with Ops(found), Methods(found):
        yield found


STEP = {"num_epochs": 1, "max_steps": 1, "max_tokens": 100}


@pytest.mark.parametrize(
    "options",
    [
        {"reference": "online"},
        {"reference": "cached"},
        {"reference": "online", "loss_type": "ipo", "nll_weight": 0.5},
        {"reference": "online", "gradient_checkpointing": "non_reentrant"},
    ],
    ids=str,
)
def test_a_step_waits_once(make_config: MakeConfig, waits: Waits, options: dict[str, Any]) -> None:
    result = train(make_config(**STEP, **options))
    assert result.first["micro_batches"] > 1
    assert waits.undeclared == {}
    assert waits.num_reads == 1


def test_a_step_with_weighted_pairs_in_16_bits_waits_once(make_config: MakeConfig, waits: Waits) -> None:
    config = make_config(model={"dtype": "bfloat16"}, **STEP)
    config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"weight": "question"})})
    train(config)
    assert waits.undeclared == {}
    assert waits.num_reads == 1


def test_a_fine_tuning_step_waits_once(make_config: MakeConfig, waits: Waits, tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1?", "completion": f" Answer: {n}\n"} for n in range(6)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(make_config(data={"path": str(tmp_path / "sft.jsonl")}, method="sft", **STEP))
    assert waits.undeclared == {}
    assert waits.num_reads == 1


@pytest.mark.parametrize("call", ["item", "nonzero", "bool mask", "tolist", "bincount", "unique"])
@pytest.mark.parametrize("where", [Objective, metrics.Metrics])
def test_a_wait_that_is_put_in_is_seen(
    make_config: MakeConfig, waits: Waits, monkeypatch: pytest.MonkeyPatch, call: str, where: Any
) -> None:
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda losses: float(losses.sum()),
        "nonzero": lambda losses: (losses > 0).nonzero(),
        "bool mask": lambda losses: losses[losses > 0],
        "tolist": lambda losses: losses.tolist(),
        "bincount": lambda losses: torch.bincount((losses > 0).long()),
        "unique": lambda losses: torch.unique(losses),
    }
    name = "score" if where is Objective else "add"
    real = getattr(where, name)

    def waiting(self: Any, *args: Any) -> Any:
        result = real(self, *args)
        calls[call]((result or args[-1]).columns["losses"])
        return result

    monkeypatch.setattr(where, name, waiting)
    train(make_config(**STEP))
    assert waits.undeclared != {}
