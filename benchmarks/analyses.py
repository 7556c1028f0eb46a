"""The analyses of docs/analyses.md as records and pictures, from runs that were trained and analysed before:

    for R in kl_only ait hast; do
      zsq-fast quantize resnet20 --checkpoint cifar10_resnet20.safetensors --eval-data cifar10_test.npz --recipe $R -w 3 -a 3 \\
        --schedule short --track-cosine 40 --track-updates --out runs/$R
      zsq-fast analyze runs/$R --what hessian updates
    done
    python -m benchmarks.analyses runs/kl_only runs/ait runs/hast

One record per run in benchmarks/results/, pictures in docs/pictures/; the page's tables come from the records (benchmarks.table).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import record
from zsq_fast.analysis import find
from zsq_fast.analysis.gradients import draw_history
from zsq_fast.runs import RunDir

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
ANALYSES = ("hessian", "updates")
TRACKED = ("epoch", "cosine", "update_ratio", "net_update_ratio")


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of a run's record and what it holds. Raises what RunDir raises, and FileNotFoundError without the analyses."""
    run = RunDir.open(path, read_only=True)
    result, quant = run.load_json("result.json"), run.recipe["quant"]
    found = {name: json.loads((path / "analysis" / f"{name}.json").read_text()) for name in ANALYSES}
    network = f"{result['model'].rpartition(':')[2]}_{result['recipe']}_w{quant['weight_bits']}a{quant['act_bits']}"
    name = f"analyses_{network}_seed{result['seed']}"
    info = {key: _named(run.info.get(key)) for key in ("command", "commit", "started", "machine", "versions", "job")}
    held = {
        "what": "gradient cosines and changed codes of every epoch of a run, Hessian of its last student on held-out images",
        "run": info, "recipe": run.recipe, "results": result["top1"], "layers": found["updates"]["layers"],
        "hessian": found["hessian"],
        "history": [{k: r[k] for k in TRACKED if k in r} for r in run.read_metrics()],
        "environment": record.environment(),
    }  # fmt: skip
    return name, held


def _named(value: Any) -> Any:
    """The same with files by their names: the folders of this machine say nothing to others."""
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_named(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


class Numbers(dict[str, Any]):
    """The written numbers of an analysis under the names of its result, as `draw` takes it."""

    def __getattribute__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattribute__(name)


def _save(draw: Callable[[Figure], None], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+", type=Path)
    ap.add_argument("--out", type=Path, default=record.RESULTS)
    ap.add_argument("--pictures", type=Path, default=PICTURES)
    args = ap.parse_args()
    for path in args.runs:
        name, held = read(path)
        record.write(args.out / f"{name}.json", held)
        args.pictures.mkdir(parents=True, exist_ok=True)
        for analysis in ANALYSES:
            draw = find(analysis)[1]
            result = json.loads((path / "analysis" / f"{analysis}.json").read_text(), object_hook=Numbers)
            _save(
                lambda figure, draw=draw, result=result: draw(result, figure), args.pictures / f"{name}_{analysis}.png"
            )
        _save(lambda figure, held=held: draw_history(held["history"], figure), args.pictures / f"{name}_cosine.png")
        print(f"{name}: {held['results']}", flush=True)


if __name__ == "__main__":
    main()
