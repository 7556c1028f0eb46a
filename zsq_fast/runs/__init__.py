"""Run directories: recipe, metrics, verified checkpoints; stop requests; progress."""

from zsq_fast.runs.directory import RunDir
from zsq_fast.runs.progress import Progress
from zsq_fast.runs.signals import StopRequest
from zsq_fast.runs.storage import storage_error

__all__ = ["Progress", "RunDir", "StopRequest", "storage_error"]
