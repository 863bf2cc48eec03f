"""A run's folder: what is written while training, and what is made of it afterwards."""

from hybrid.run.checkpoint import clear_parts, disk_errors, filled_folder, write_file
from hybrid.run.checkpoints import MANIFEST, CheckpointConfig, Checkpoints
from hybrid.run.compare import comparison_table, write_comparison
from hybrid.run.measures import better_end
from hybrid.run.report import Summary, SummaryRow, summary, summary_table, write_report
from hybrid.run.signals import stop_requested
from hybrid.run.state_file import load_state, save_state
from hybrid.run.track import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    FINISHED,
    SAMPLES,
    RunLog,
    check_unlocked,
    finished_step,
    open_run_folder,
    read_jsonl,
)
from hybrid.run.trackers import Trackers, check_trackers, make_trackers

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EXPORT",
    "FINISHED",
    "MANIFEST",
    "SAMPLES",
    "CheckpointConfig",
    "Checkpoints",
    "RunLog",
    "Summary",
    "SummaryRow",
    "Trackers",
    "better_end",
    "check_trackers",
    "check_unlocked",
    "clear_parts",
    "comparison_table",
    "disk_errors",
    "filled_folder",
    "finished_step",
    "load_state",
    "make_trackers",
    "open_run_folder",
    "read_jsonl",
    "save_state",
    "stop_requested",
    "summary",
    "summary_table",
    "write_comparison",
    "write_file",
    "write_report",
]
