"""The main job on real input: ResNet-20 to low bits without data, judged on the 10,000 CIFAR-10 test images.

    python -m benchmarks.cifar10 --checkpoint cifar10_resnet20.safetensors --data cifar10_test.npz

Students of all recipes and bit widths are trained in lockstep on the images of one generator, which never looks at a student:
each result is that of `zsq-fast quantize resnet20 --recipe R -w B -a B` with the same schedule and seed (a test compares them
bit for bit). One record per student goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import zsq_fast as zsq
from benchmarks import record
from zsq_fast.data import evaluate, load_eval_data
from zsq_fast.methods import Progress, run_together
from zsq_fast.models import load_model


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--recipes", nargs="+", default=["kl_only", "gdfq", "ait"])
    ap.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    ap.add_argument("--schedule", default="short")
    ap.add_argument("--set", nargs="+", default=[], dest="overrides")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--limit", type=int)
    ap.add_argument("--eval-every", type=int)
    ap.add_argument("--images", type=Path, help="where optimised images are kept and looked for")
    ap.add_argument("--out", type=Path, default=record.RESULTS)
    args = ap.parse_args()

    loaded = load_model("resnet20", args.checkpoint)
    teacher = loaded.model.to(args.device)
    images = load_eval_data(args.data, limit=args.limit)
    progress = Progress()

    def measure(name: str) -> Callable[[torch.nn.Module], float]:
        def top1(network: torch.nn.Module) -> float:
            value = evaluate(network, images, mean=loaded.mean, std=loaded.std, channels_last=args.device == "cpu").top1
            print(f"{name} step {trainers[0].state.step}: {value:.2f}", file=sys.stderr, flush=True)
            return value

        return top1

    trainers: list[zsq.Trainer] = []
    for bits in args.bits:
        for name in args.recipes:
            recipe = zsq.load_recipe(
                name,
                input_size=(3, 32, 32),
                schedule=args.schedule,
                overrides=args.overrides,
                weight_bits=bits,
                act_bits=bits,
            )
            trainers.append(
                zsq.Trainer(
                    teacher,
                    recipe,
                    input_size=(3, 32, 32),
                    seed=args.seed,
                    evaluate=measure(f"{name} w{bits}a{bits}"),
                    eval_every=args.eval_every,
                    progress=progress if not trainers else None,
                    share=trainers[0] if trainers else None,
                    image_dir=args.images,
                )
            )
    environment = record.environment()
    for trainer, result in zip(trainers, run_together(trainers), strict=True):
        recipe = trainer.recipe
        width = f"w{recipe.quant.weight_bits}a{recipe.quant.act_bits}"
        alone = recipe.schedule.steps - recipe.student_steps
        name = f"cifar10_resnet20_{recipe.name}_{width}_{alone}+{recipe.student_steps}_seed{args.seed}"
        minutes = round(result.seconds / 60, 2)
        values = {k: round(v, 2) for k, v in result.evaluations.items()}
        print(f"{name}: {values}, {minutes} min", flush=True)
        record.write(
            args.out / f"{name}.json",
            {
                "what": "CIFAR-10 ResNet-20, top-1 in percent on the test images; float, round-to-nearest (rtn), last epoch",
                "test_images": len(images), "checkpoint_sha256": loaded.sha256, "seed": args.seed, "schedule": args.schedule,
                "results": values, "minutes": minutes,
                "minutes_are": f"synthesis and this student's steps, without evaluations; {len(trainers)} students shared it",
                "summary": result.summary.to_dict(), "environment": environment, "recipe": recipe.to_dict(), "history": result.history,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
