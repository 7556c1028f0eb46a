"""The main job on real input: ResNet-20 to low bits without data, judged on the 10,000 CIFAR-10 test images.

    python -m benchmarks.cifar10 --checkpoint cifar10_resnet20.safetensors --data cifar10_test.npz
    python -m benchmarks.cifar10 --checkpoint ... --data ... --ablation direction weights

Students of all recipes and bit widths are trained in lockstep on the images of one generator, which never looks at a student:
each result is that of `zsq-fast quantize resnet20 --recipe R -w B -a B` with the same schedule and seed (a test compares them
bit for bit). One record per student goes to benchmarks/results/, or one per ablation.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import zsq_fast as zsq
from benchmarks import record
from zsq_fast import papers
from zsq_fast.data import evaluate, load_eval_data
from zsq_fast.errors import TrainingError
from zsq_fast.methods import Progress, Result, run_together
from zsq_fast.models import load_model

# HAST's ablations at W3A3: tables of its supplement as `zsq_fast.papers` has them, sweeps like those of its figure 1, and what other
# papers would add to it, each the overrides of its students.
TABLES = ("direction", "weights", "alignment")
SWEEPS = {
    "direct_lambda": [("student.feature_weight", v, "student.alignment=direct") for v in (1, 10, 100, 1000)],  # not published
    "samples": [("images.count", n) for n in (256, 1280, 2560, 5120)],
    "epsilon": [("student.epsilon", v) for v in (0.002, 0.005, 0.01, 0.02, 0.05)],
    "lambda": [("student.feature_weight", v) for v in (0, 100, 500, 1000, 2000, 4000)],
    "gamma": [("images.hard_gamma", v) for v in (0, 0.5, 1, 2)],
}  # fmt: skip
ADDITIONS = {
    "none": [],
    "AIT's inundation": ["inundation.enabled=true", "student.weight_decay=0"],
    "SQuant's rounding as the start": ["quant.start=squant"],
    "SynQ's low-pass filter": ["student.low_pass=8"],
    "SynQ's activation maps": ["student.cam_weight=50"],
    "SynQ's gated cross entropy": ["student.ce_weight=0.5", "student.ce_gate=0.7"],
    "PLF's two labels": ["student.ce_weight=0.5", "student.pseudo_label=plf", "student.pseudo_threshold=[0.5,0.2]"],
    "cross entropy": ["student.ce_weight=0.5"],
    "learned ranges": ["quant.ranges=learned"],
}


def ablation(name: str) -> dict[str, tuple[list[str], float | None]]:
    """Label of every student -> (overrides, published top-1)."""
    if name in TABLES:
        rows = papers.rows(f"hast/{name}").values()
        found = [r for r in rows if r.id.endswith("-cifar10-w3a3")]
        return {r.id.split("/")[2].removesuffix("-cifar10-w3a3"): (list(r.overrides), r.top1) for r in found}
    if name == "additions":
        return {label: (overrides, None) for label, overrides in ADDITIONS.items()}
    return {str(v): ([f"{option}={v}", *more], None) for option, v, *more in SWEEPS[name]}


@dataclasses.dataclass
class Job:
    """What all students of a call share."""

    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.loaded = load_model("resnet20", self.args.checkpoint)
        self.teacher = self.loaded.model.to(self.args.device)
        self.images = load_eval_data(self.args.data, limit=self.args.limit)
        self.trainers: list[zsq.Trainer] = []
        self.environment = record.environment()

    def add(self, recipe: str, bits: int, overrides: Sequence[str] = (), label: str = "") -> zsq.Trainer:
        """The trainer of the resolved recipe, one for all who ask for the same."""
        resolved = zsq.load_recipe(
            recipe,
            input_size=(3, 32, 32),
            schedule=self.args.schedule,
            overrides=[*self.args.overrides, *overrides],
            weight_bits=bits,
            act_bits=bits,
        )
        for trainer in self.trainers:
            if trainer.recipe == resolved:
                return trainer
        first = self.trainers[0] if self.trainers else None
        self.trainers.append(
            zsq.Trainer(
                self.teacher,
                resolved,
                input_size=(3, 32, 32),
                seed=self.args.seed,
                evaluate=self.measure(f"{label or recipe} w{bits}a{bits}"),
                eval_every=self.args.eval_every,
                progress=None if first else Progress(),
                share=first,
                image_dir=self.args.images,
                track_cosine=self.args.track_cosine,
                track_updates=self.args.track_updates,
            )
        )
        return self.trainers[-1]

    def measure(self, name: str) -> Callable[[torch.nn.Module], float]:
        def top1(network: torch.nn.Module) -> float:
            mean, std = self.loaded.mean, self.loaded.std
            value = evaluate(network, self.images, mean=mean, std=std, channels_last=self.args.device == "cpu").top1
            print(f"{name} step {max(t.state.step for t in self.trainers)}: {value:.2f}", file=sys.stderr, flush=True)
            return value

        return top1

    def run(self) -> list[tuple[zsq.Trainer, Result | TrainingError]]:
        return list(zip(self.trainers, run_together(self.trainers), strict=True))

    def outcome(self, trainer: zsq.Trainer, result: Result | TrainingError) -> dict[str, Any]:
        """What a record says of one student."""
        if isinstance(result, TrainingError):
            return {"error": str(result), "recipe": trainer.recipe.to_dict(), "history": trainer.state.history}
        return {
            "results": {k: round(v, 2) for k, v in result.evaluations.items()},
            "chosen_epoch": result.chosen_epoch,
            "minutes": round(result.seconds / 60, 2),
            "summary": result.summary.to_dict(),
            "recipe": trainer.recipe.to_dict(),
            "history": result.history,
        }

    def about(self) -> dict[str, Any]:
        """What a record says of all of them."""
        minutes = "synthesis and this student's steps, without evaluations"
        if self.args.images:
            minutes += "; optimised images found in --images cost no more than reading them"
        return {
            "what": "CIFAR-10 ResNet-20, top-1 in percent on the test images; float, round-to-nearest (rtn), last epoch",
            "test_images": len(self.images), "checkpoint_sha256": self.loaded.sha256, "seed": self.args.seed,
            "schedule": self.args.schedule, "minutes_are": f"{minutes}; {len(self.trainers)} students shared it",
            "environment": self.environment,
        }  # fmt: skip


def train_recipes(job: Job) -> None:
    args = job.args
    for bits in args.bits:
        for name in args.recipes:
            job.add(name, bits)
    for trainer, result in job.run():
        recipe, outcome = trainer.recipe, job.outcome(trainer, result)
        width = f"w{recipe.quant.weight_bits}a{recipe.quant.act_bits}"
        alone = recipe.schedule.steps - recipe.student_steps
        name = f"cifar10_resnet20_{recipe.name}_{width}_{alone}+{recipe.student_steps}_seed{args.seed}"
        print(f"{name}: {outcome.get('results', outcome.get('error'))}, {outcome.get('minutes')} min", flush=True)
        record.write(args.out / f"{name}.json", {**job.about(), **outcome})


def train_ablations(job: Job) -> None:
    args, owners = job.args, []
    for name in args.ablation:
        for value, (overrides, published) in ablation(name).items():
            owners.append((name, value, published, job.add("hast", 3, overrides, f"{name} {value}")))
    outcomes: dict[str, dict[str, Any]] = {}
    results = {id(trainer): result for trainer, result in job.run()}
    for name, value, published, trainer in owners:
        outcomes.setdefault(name, {})[value] = outcome = job.outcome(trainer, results[id(trainer)])
        outcome |= {} if published is None else {"published": published}
        outcome.pop("summary", None)
        print(f"{name} {value}: {outcome.get('results', outcome.get('error'))}", flush=True)
    for name, students in outcomes.items():
        file = args.out / f"cifar10_resnet20_hast_w3a3_ablation_{name}_seed{args.seed}.json"
        record.write(file, {**job.about(), "ablation": name, "students": students})


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--recipes", nargs="+", default=["kl_only", "gdfq", "ait"])
    ap.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    ap.add_argument(
        "--ablation",
        nargs="+",
        choices=[*TABLES, *SWEEPS, "additions"],
        help="HAST's ablations at W3A3 instead of recipes",
    )
    ap.add_argument("--schedule", default="short")
    ap.add_argument("--set", nargs="+", default=[], dest="overrides")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--limit", type=int)
    ap.add_argument("--eval-every", type=int)
    ap.add_argument("--track-cosine", type=int, default=0, metavar="N", help="into the records: see zsq-fast quantize")
    ap.add_argument("--track-updates", action="store_true")
    ap.add_argument("--images", type=Path, help="where optimised images are kept and looked for")
    ap.add_argument("--out", type=Path, default=record.RESULTS)
    job = Job(ap.parse_args())
    train_ablations(job) if job.args.ablation else train_recipes(job)


if __name__ == "__main__":
    main()
