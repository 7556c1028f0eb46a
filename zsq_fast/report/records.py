"""A committed record of `benchmarks.cifar10` or `benchmarks.imagenet` as a run: what was measured, without networks and images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zsq_fast import papers
from zsq_fast.errors import BadFileError
from zsq_fast.methods.held_out import chosen_record
from zsq_fast.report.published import CLASSES
from zsq_fast.report.reading import JSON_LIMIT, Fields, Run, bounded, curves, epochs, read_recipe, updates
from zsq_fast.runs.storage import from_json


def read_record(path: Path, label: str) -> Run:
    """Raises BadFileError for another file, or one that is damaged or too large."""
    bounded(path, JSON_LIMIT)
    record = Fields(path, from_json(path.read_bytes(), path))
    if not {"what", "results", "recipe", "history", "summary"} <= record.values.keys():
        raise BadFileError(f"{path} is neither a run directory nor a record of one student.")
    recipe = read_recipe(path, record.table("recipe").values)
    history, summary, where = epochs(path, record.list("history")), record.table("summary"), record.table("environment")
    dataset, network = _subject(record.text("what"))
    gpu = where.text("gpu", "")
    chosen = chosen_record([r for r in history if {"held_out_agreement", "held_out_kl"} <= r.keys()])
    found = {"last": history[-1] if history else None, "chosen": chosen}
    return Run(
        path=path,
        label=label,
        model=network,
        recipe=recipe,
        input_size=next((row.input_size for row in _rows() if row.dataset == dataset), ()),
        classes=CLASSES.get(dataset, 0),
        top1=record.table("results").numbers(),
        chosen_epoch=None if chosen is None else int(chosen["epoch"]),
        agreement={name: r["held_out_agreement"] for name, r in found.items() if r and "held_out_agreement" in r},
        minutes=record.number("minutes"),
        device=gpu or "cpu",
        threads=where.whole("threads", 0),
        float_bytes=summary.whole("float_bytes"),
        packed_bytes=summary.whole("packed_bytes"),
        curves=curves(history),
        **updates(history),
        layers=(),
        left_float=(),
        environment=_environment(record, where, gpu),
        command=tuple(where.text("command", "").split()),
        started=where.text("date", ""),
        test_images=f"{record.whole('test_images', 0):,} of {dataset}",
        analyses=(),
        sheet=None,
    )


def _rows() -> list[papers.Row]:
    return [row for paper in papers.papers() for row in papers.rows(paper).values()]


def _subject(what: str) -> tuple[str, str]:
    """ "CIFAR-10 ResNet-20, top-1 ..." -> (dataset, network)."""
    name = what.partition(",")[0]
    dataset = next((known for known in sorted(CLASSES, key=len, reverse=True) if name.startswith(known)), "")
    return dataset, re.sub(rf"^{re.escape(dataset)}\W+", "", name) if dataset else name


def _environment(record: Fields, where: Fields, gpu: str) -> tuple[tuple[str, str], ...]:
    threads = where.values.get("threads", "?")
    rows: dict[str, Any] = {
        "Ended": where.text("date", "").replace("T", " "),
        "Device": gpu
        or f"{where.text('processor', 'cpu')}, {threads} threads of {where.values.get('cores', '?')} cores",
        "Versions": ", ".join(f"{n} {where.values[n]}" for n in ("python", "torch", "zsq_fast") if n in where.values),
        "Commit": where.text("commit", ""),
        "Seed": str(record.values.get("seed", "")),
        "SHA-256 of the checkpoint": record.text("checkpoint_sha256", ""),
        "Minutes are": record.text("minutes_are", ""),
    }
    return tuple((what, value) for what, value in rows.items() if value)
