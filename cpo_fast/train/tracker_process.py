"""One tracker of one run, in a process of its own: `python -m cpo_fast.train.tracker_process NAME RUN`.

It shows a tracker what <run>/metrics.jsonl holds, from the first line on, and every further line until its standard input
ends, which is when the training closes that or dies. So every start of a training, a resume too, gives the tracker one
whole run with each step once, whatever a killed process has left. A tracker may be as slow, print as much and fail as it
likes here. Its files lie under <run>/trackers.
"""

import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from filelock import FileLock

POLL_SECONDS = 1.0  # between two looks at the metrics
FINISH_SECONDS = 600  # after which a tracker that does not end is ended
LOCK_SECONDS = 60  # that the process of a killed training may still take to end
PROJECT = "cpo-fast"


class Tracker(Protocol):
    """What a tracker has to do here. Metrics have the names of metrics.jsonl, none of them is None."""

    def log(self, metrics: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """An event file. Numbers are scalars, in float32; what is text is shown where it changes."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder / "tensorboard"))
        self.texts: dict[str, str] = {}
        self._write(0, [self._text("config", "```yaml\n" + yaml.safe_dump(config, sort_keys=False) + "```")])

    def log(self, metrics: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        texts = {name: value for name, value in metrics.items() if isinstance(value, str)}
        values += [self._text(name, text) for name, text in texts.items() if self.texts.get(name) != text]
        self.texts |= texts
        self._write(metrics["step"], values)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def _write(self, step: int, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _text(self, name: str, text: str) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        return Summary.Value(tag=name, metadata=metadata, tensor=tensor)


class Wandb:
    """A run of Weights & Biases: offline, for `wandb sync`, unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        own = {
            "MODE": "offline",
            "ERROR_REPORTING": "false",
            "CACHE_DIR": folder / "wandb",
            "CONFIG_DIR": folder / "wandb",
        }
        for name, value in own.items():  # before the import, which reads them
            os.environ.setdefault(f"WANDB_{name}", str(value))
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=POLL_SECONDS,
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", config["run"]),
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
            settings=settings,
        )

    def log(self, metrics: dict[str, Any]) -> None:
        self.run.log(metrics, step=metrics["step"])

    def flush(self) -> None:
        pass  # its own process writes

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio in its local data base."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read by the import
        import trackio

        self.run = trackio.init(
            project=PROJECT, name=run_id, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, metrics: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    def flush(self) -> None:
        pass  # a thread of its own writes

    def close(self) -> None:
        self.run.finish()


MAKERS: Mapping[str, Callable[[Path, dict[str, Any], str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def follow(path: Path, is_over: Callable[[], bool]) -> Iterator[list[dict[str, Any]]]:
    """The whole lines of a growing JSONL, in groups as they are found, until `is_over` and nothing is left."""
    place, over = 0, False
    while not over:
        over = is_over()
        if not path.exists():
            continue
        with open(path, "rb") as file:
            file.seek(place)
            whole, newline, _ = file.read().rpartition(b"\n")
        place += len(whole) + len(newline)
        yield [json.loads(line) for line in whole.splitlines()]


def track(name: str, run: Path) -> None:
    """Show the tracker `name` the metrics of `run` until standard input ends. Raises what the tracker raises."""
    folder = run / "trackers"
    with FileLock(folder / f".{name}.lock", timeout=LOCK_SECONDS):
        shutil.rmtree(folder / name, ignore_errors=True)
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        run_id = (folder / "run_id").read_text(encoding="utf-8")
        tracker = MAKERS[name](folder, config, run_id)
        for lines in follow(run / "metrics.jsonl", _input_has_ended):
            for line in lines:
                tracker.log({key: value for key, value in line.items() if value is not None})
            if lines:
                tracker.flush()
        signal.alarm(FINISH_SECONDS)
        tracker.close()


def _input_has_ended() -> bool:
    """Wait for the end of standard input, to which nothing is written, for `POLL_SECONDS` at most."""
    return bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])


if __name__ == "__main__":
    track(sys.argv[1], Path(sys.argv[2]))
