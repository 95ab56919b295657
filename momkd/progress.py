"""How a run shows itself in a terminal: a bar an epoch with losses, speed and time left; a line a fold."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.progress import Progress, TaskID

from momkd.experiment import Reporter
from momkd.terminal import note, progress_bar, say
from momkd.train import Progress as TrainingProgress

_SHORT = {
    "classification": "class",
    "memory": "memory",
    "soft_angle_slide": "slide angle",
    "soft_angle_omics": "omics angle",
    "reconstruction": "rebuild",
}


class ConsoleReporter(Reporter):
    """Prints notes and folds, and shows a progress bar where the console is a terminal."""

    def __init__(self, console: Console, name: str = "") -> None:
        self.console, self.name = console, name
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def note(self, text: str) -> None:
        note(text, console=self.console)

    def fold_begins(self, fold: int, folds: int, slides: dict[str, int]) -> None:
        self.bar = progress_bar(self.console, told=True)
        self.bar.start()
        self.task = self.bar.add_task(f"{self.name} fold {fold} ".lstrip(), total=None, told="")

    def progress(self, progress: TrainingProgress) -> None:
        if self.bar is None:
            return
        losses = "  ".join(f"{_SHORT.get(name, name)} {value:.3f}" for name, value in progress.losses.items())
        best = "" if progress.best is None else f"  val AUC {progress.best:.3f}"
        told = f"{losses}{best}  {progress.patches_per_second:,.0f} patches/s"
        done = progress.epoch + progress.step / progress.steps
        self.bar.update(self.task, total=progress.epochs, completed=round(done, 1), told=told)

    def fold_ends(self, fold: int, log: pd.DataFrame, slides: dict[str, int]) -> None:
        self.close()
        counts = ", ".join(f"{count} {part}" for part, count in slides.items())
        line = f"{self.name} fold {fold}: {len(log)} epochs on {counts} slides".lstrip()
        if log["val_auc"].notna().any():
            best = int(log["val_auc"].argmax())
            line += f"; best validation AUC {log['val_auc'].max():.3f} after epoch {best + 1}"
        say(line, console=self.console)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
