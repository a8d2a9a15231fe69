"""A run as a job of a launcher."""

from __future__ import annotations

from pathlib import Path

from clplat.config.settings import Config
from clplat.launchers.jobs import Job, Outcome


class RunJob(Job):
    """A run: begun, gone on with from its last checkpoint, or complete already.

    Args:
        since: runs that were begun before this time, %Y%m%d-%H%M%S, are not gone on with; empty: any is.
    """

    def __init__(self, config: Config, folder: Path, since: str = "") -> None:
        self.config, self.folder, self.since = config, folder, since
        self.output, self.devices = Path(config.output), config.fabric.devices

    def do(self) -> Outcome:
        from clplat.api import resume, run_config
        from clplat.run.former import former

        known = former(self.config)
        if known is None or known.status == "unusable" or known.run_dir.name < self.since:
            return {"run_dir": str(run_config(self.config, quiet=True).run_dir.resolve())}
        if known.status == "partial":
            resume(known.run_dir, quiet=True)
        return {"run_dir": str(known.run_dir.resolve())}
