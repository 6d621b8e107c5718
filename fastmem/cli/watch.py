"""fastmem watch: show a running sweep."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmem.sweeps.watch import Watcher, progress_table


@dataclass(frozen=True)
class Watch:
    """Shows a sweep of another process while it runs: runs done, running and failed, the best
    result of each model, and the time left. It ends when the sweep ends; Ctrl-C stops only it.

    Example: fastmem watch capacity-laptop
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""
    once: bool = False
    """Show the progress once and exit."""
    every: float = 2.0
    """Seconds between updates."""


def run_watch(command: Watch) -> int:
    from rich.console import Console
    from rich.live import Live

    if not 0 < command.every < float("inf"):
        raise ValueError(f"every must be above 0 seconds, not {command.every}: give it 2")
    watcher, console = Watcher(command.folder), Console()
    progress = watcher.look()
    if command.once:
        console.print(progress_table(progress, command.folder))
        return 0
    with Live(
        progress_table(progress, command.folder), console=console, auto_refresh=False
    ) as live:
        while progress.at_work:
            time.sleep(command.every)
            progress = watcher.look()
            live.update(progress_table(progress, command.folder), refresh=True)
    return 0
