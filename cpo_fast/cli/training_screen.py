"""What `cpo-fast train` shows: a progress line on a terminal, one plain line a step elsewhere, and a final table."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class TrainingScreen:
    """Progress of the steps; used as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        """`quiet` shows nothing."""
        self.console = Console(quiet=quiet)
        self.progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
        self.task: Any = None

    def __enter__(self) -> "TrainingScreen":
        """Start the progress line."""
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the progress line, also after an error."""
        if self.progress is not None:
            self.progress.stop()

    def update(self, values: dict[str, Any], num_steps: int) -> None:
        """Show one step."""
        text = (
            f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.2f}  "
            f"margin {values['rewards/margins']:+.4f}  saved {values['tokens/saved']:.0%}"
        )
        if self.progress is None:
            self.console.print(f"step {values['step']}/{num_steps}  {text}  {values['seconds']:.1f} s", highlight=False)
            return
        if self.task is None:
            self.task = self.progress.add_task(text, total=num_steps)
        self.progress.update(self.task, completed=values["step"], description=text)

    def summary(self, result: Any) -> None:
        """The final table: first and last step side by side, and where the adapter is."""
        table = Table(title=f"{result.num_pairs} pairs, {result.num_steps} steps, {result.seconds:.0f} s")
        table.add_column("")
        table.add_column("first step", justify="right")
        table.add_column("last step", justify="right")
        names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "grad_norm"]
        for name in names:
            table.add_row(name, f"{result.first[name]:.4f}", f"{result.last[name]:.4f}")
        table.add_row("tokens/saved", f"{result.first['tokens/saved']:.1%}", f"{result.last['tokens/saved']:.1%}")
        self.console.print(table)
        self.console.print(f"adapter: {result.adapter_path}", highlight=False, soft_wrap=True)
        self.console.print(f"metrics: {result.metrics_path}", highlight=False, soft_wrap=True)
