"""Run directories: recipe, metrics, verified checkpoints; stop requests; progress and status."""

from zsq_fast.runs.directory import RunDir
from zsq_fast.runs.progress import Progress
from zsq_fast.runs.signals import StopRequest
from zsq_fast.runs.status import reporting
from zsq_fast.runs.storage import storage_error

__all__ = ["Progress", "RunDir", "StopRequest", "reporting", "storage_error"]
