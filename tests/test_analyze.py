"""`zsq-fast analyze`: a finished run in, numbers and pictures out, one sentence for whatever is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_support import assert_one_sentence, call, make_tiny, one_thread, schedule
from test_analysis_forecast import made
from torch import nn

import zsq_fast as zsq
from zsq_fast import analysis
from zsq_fast.analysis import forecast
from zsq_fast.analysis.forecast import Calibration, Network, calibrated_on, network_of
from zsq_fast.analysis.subject import load_subject
from zsq_fast.cli.job import Job, load
from zsq_fast.cli.result import STUDENT, load_student
from zsq_fast.errors import UsageError
from zsq_fast.methods.synthesis import Synthesis
from zsq_fast.models import load_model
from zsq_fast.runs import RunDir

RUN = [
    *schedule(epochs=4, warmup_epochs=2, calibration_epochs=1, iterations=3, batch_size=8, held_out=20),
    "--threads",
    "1",
]
RUN += ["--quiet", "--set", "quant.ema=plain", "--set", "student.lr=0.02"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def train(capsys, tiny, out: Path, recipe: str, *extra: object) -> Path:
    code, _, err = call(
        capsys, "quantize", *tiny.model, "--recipe", recipe, "-w", 3, "-a", 4, "--out", out, *RUN, *extra
    )
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with everything on; made once, for tests that only read it."""
    from zsq_fast.cli import main

    out = tmp_path_factory.mktemp("runs") / "ait"
    words = [
        "quantize",
        *tiny.model,
        "--recipe",
        "ait",
        "-w",
        "3",
        "-a",
        "4",
        "--out",
        str(out),
        "--track-updates",
        *RUN,
    ]
    with one_thread():
        assert main([*words, "--eval-data", str(tiny.images)]) == 0
    return out


def analyze(capsys, run: Path, *words: object) -> tuple[int, str, str]:
    return call(capsys, "analyze", run, "--allow-import", "--what", *words)


def calibrated(monkeypatch, run: Path) -> None:
    """On runs like this one: of its network, its bits and, at one end, its agreement and KL."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads((run / "result.json").read_text())
    points = [replace(p, weight_bits=3, act_bits=4) for p in made(20, noise=0.3)]
    points.append(replace(points[0], agreement=last["held_out_agreement"], kl=last["held_out_kl"]))
    network = Network(found["float_bytes"] // 4, (3, 8, 8), 4)
    monkeypatch.setattr(forecast, "calibration", lambda _: Calibration(points))
    monkeypatch.setattr(forecast, "calibrated_on", lambda: network)


def load_it(run: Path, **options):
    with one_thread():
        run_dir = RunDir.open(run, read_only=True)
        job, teacher = load(Job.from_info(run_dir.info, run, allow_import=True))
        student = load_student(run_dir, job, teacher, STUDENT)
        return (
            load_subject(run_dir, teacher, student, input_size=job.input_size, seed=job.seed, **options),
            job,
            teacher,
        )


def test_everything_is_written_and_shown(capsys, run):
    pytest.importorskip("matplotlib")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = analyze(capsys, run, "layers", "samples", "updates", "layers")
    assert code == 0, err
    for name in ("layers", "samples", "updates"):
        numbers = json.loads((run / "analysis" / f"{name}.json").read_text())
        assert numbers and (run / "analysis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert out.splitlines().count(name) == 1
    assert "SQNR dB" in out and "difficulty" in out and "net, end of the epoch" in out and str(run / "analysis") in out
    updates = json.loads((run / "analysis" / "updates.json").read_text())
    assert updates["epochs"] == [2, 3] and len(updates["net"][0]) == len(updates["layers"]) == 3
    assert all(path.read_bytes() == data for path, data in before.items())  # nothing else is touched
    code, out, _ = call(capsys, "resume", run, "--allow-import")  # nor in the way
    assert code == 0 and "last epoch" in out


def test_the_losses_around_the_student(capsys, run):
    pytest.importorskip("matplotlib")
    code, out, err = analyze(capsys, run, "cosine", "hessian", "surface", "--images", 12)
    assert code == 0, err
    found = {
        name: json.loads((run / "analysis" / f"{name}.json").read_text()) for name in ("cosine", "hessian", "surface")
    }
    assert "CE-KL" in out and f"{found['cosine']['pairs']['ce-kl']['total']:+.3f}" in out
    assert found["hessian"]["images"] == 12 and f"{found['hessian']['losses']['kl']['trace']['mean']:.4g}" in out
    assert found["surface"]["losses"]["kl"][7][7] == found["surface"]["centre"]["kl"]
    assert all((run / "analysis" / f"{name}.png").stat().st_size > 1000 for name in found)


def test_options(capsys, run):
    pytest.importorskip("matplotlib")
    code, _, err = analyze(
        capsys, run, "hessian", "surface", "cosine", "--images", 8, "--set", "surface.directions=eigenvectors",
        "surface.points=5", "surface.dimensions=1", "surface.span=0.5", "surface.losses=kl", "surface.steps=12", "--set",
        "hessian.probes=3", "hessian.steps=4", "hessian.count=2", "hessian.losses=kl,ce",
        "hessian.parameters=0.weight", "cosine.losses=ce,kl",
    )  # fmt: skip
    assert code == 0, err
    hessian, surface, cosine = (
        json.loads((run / "analysis" / f"{name}.json").read_text()) for name in ("hessian", "surface", "cosine")
    )
    assert surface["offsets"] == [-0.5, -0.25, 0, 0.25, 0.5] and list(surface["losses"]) == ["kl"]
    (title,) = surface["directions"]
    assert title.startswith("eigenvector of KL, eigenvalue ") and len(surface["losses"]["kl"]) == 5
    assert surface["options"] == {
        "directions": "eigenvectors", "dimensions": 1, "points": 5, "span": 0.5, "losses": ["kl"], "hessian": "kl",
        "steps": 12, "seed": 0, "batches": 1}  # fmt: skip
    found = hessian["losses"]["kl"]
    assert (
        list(hessian["losses"]) == ["kl", "ce"] and hessian["parameters"] == load_it(run)[0].student[0].weight.numel()
    )
    assert (len(found["trace"]["samples"]), len(found["density"]["nodes"]), len(found["top"]["values"])) == (3, 4, 2)
    assert hessian["options"]["runs"] == 1 and list(cosine["pairs"]) == ["ce-kl"]
    (run / "analysis" / "surface.json").unlink()
    code, _, err = analyze(capsys, run, "all", "--set", "surface.points=4", "--images", 4, "--no-pictures")
    assert code == 2 and "surface: a surface needs" in errors(err)[0]  # an option is asked for by name
    assert not (run / "analysis" / "surface.json").exists()


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("zsq-fast: error: ")]


def test_json_without_pictures(capsys, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = analyze(capsys, run, "samples", "--json", "--no-pictures", "--images", 12)
    assert code == 0, err
    assert json.loads(out)["samples"]["count"] == 12
    assert json.loads((run / "analysis" / "samples.json").read_text()) == json.loads(out)["samples"]
    code, _, err = analyze(capsys, run, "samples")
    assert code == 2 and "zsq-fast[demo]" in assert_one_sentence(err)


def test_the_images_are_those_held_out_with_their_labels(run):
    subject, job, teacher = load_it(run, batch_size=6)
    assert [len(b.images) for b in subject.batches] == [6, 6, 6, 2] == [len(b.labels) for b in subject.batches]
    _, groups, state = RunDir.open(run, read_only=True).load_checkpoint()
    assert torch.equal(subject.images, groups["held_out"]["images"]) and list(subject.history) == state["history"]
    synthesis = Synthesis(teacher, subject.recipe, job.input_size, job.seed, torch.channels_last)
    drawn = torch.cat([synthesis.sample("held-out", i).labels for i in range(3)])[:20]
    assert torch.equal(torch.cat([b.labels for b in subject.batches]), drawn) and len(drawn.unique()) > 1
    assert subject.trained_on is None and subject.layout == torch.channels_last
    assert not subject.student.training and not any(p.requires_grad for p in subject.teacher.parameters())
    assert all(m.frozen for m in subject.student.modules() if isinstance(m, zsq.QuantAct))
    with torch.no_grad():
        same = (subject.student(subject.images).argmax(1) == subject.teacher(subject.images).argmax(1)).double().mean()
    assert same == subject.history[-1]["held_out_agreement"] and subject.evaluations["last"] >= 0


def test_an_older_checkpoint_draws_its_labels_again(run, monkeypatch):
    labels = torch.cat([b.labels for b in load_it(run)[0].batches])
    read = RunDir.load_checkpoint

    def without(self):
        step, groups, state = read(self)
        return step, {**groups, "held_out": {k: v for k, v in groups["held_out"].items() if k != "labels"}}, state

    monkeypatch.setattr(RunDir, "load_checkpoint", without)
    assert torch.equal(torch.cat([b.labels for b in load_it(run)[0].batches]), labels)


def test_optimised_images_and_a_run_that_held_none_out(capsys, tiny, tmp_path):
    images = [f"--set=images.{k}={v}" for k, v in {"count": 10, "batch_size": 4, "iterations": 2}.items()]
    out = train(
        capsys,
        tiny,
        tmp_path / "zeroq",
        "zeroq",
        *images,
        "--set",
        "schedule.held_out=0",
        "--set",
        "student.batch_size=4",
    )
    subject, *_ = load_it(out, count=9)
    assert subject.trained_on.images.shape == (9, 3, 8, 8) and len(subject.images) == 9
    some = load_it(out, count=3)[0].trained_on
    assert torch.equal(some.images, subject.trained_on.images[:3]) and torch.equal(
        some.labels, subject.trained_on.labels[:3]
    )
    code, printed, err = analyze(capsys, out, "samples", "--no-pictures")
    assert code == 0 and "10 optimised images" in printed, err
    code, _, err = analyze(capsys, out, "updates", "--no-pictures")
    assert code == 2 and "--track-updates" in assert_one_sentence(err)
    code, _, err = analyze(capsys, out, "samples", "--chosen", "--no-pictures")
    assert code == 4 and "chose no epoch" in assert_one_sentence(err)


def test_one_refusal_stops_no_other(capsys, tiny, tmp_path):
    """Each is named, the first decides the exit code, and `all` leaves out what the run cannot have."""
    out = train(capsys, tiny, tmp_path / "run", "rtn")
    code, printed, err = analyze(capsys, out, "updates", "samples", "forecast", "--no-pictures")
    assert code == 2 and [line.split(": ")[2] for line in errors(err)] == ["updates", "forecast"]
    assert "difficulty" in printed and [p.name for p in (out / "analysis").iterdir()] == ["samples.json"]
    code, printed, err = analyze(capsys, out, "all", "--json", "--no-pictures", "--images", 4)
    (line,) = (line for line in err.splitlines() if line.startswith("zsq-fast: "))
    done, left = set(json.loads(printed)), set(analysis.ANALYSES) - set(json.loads(printed))
    assert code == 0 and {"layers", "samples", "cosine", "hessian", "surface"} <= done
    assert {"updates", "forecast"} <= left and all(f"{name} (" in line for name in left)
    for words in (("all", "updates"), ("all", "--fail-above", 3)):  # what was asked for by name has to be there
        code, _, err = analyze(capsys, out, *words, "--no-pictures", "--images", 4)
        assert code == 2 and "not for this run" in err and len(errors(err)) == 1


def test_superposed_images_have_soft_labels(capsys, tiny, tmp_path):
    out = train(capsys, tiny, tmp_path / "qimera", "qimera", "--set", "generator.superpose_probability=0.7")
    subject, *_ = load_it(out)
    labels = torch.cat([b.labels for b in subject.batches])
    assert labels.shape == (20, 4) and torch.allclose(labels.sum(1), torch.ones(20))
    hard = (labels.amax(1) == 1).view(-1)
    assert 0 < hard.sum() < 20  # batches of both kinds
    code, _, err = analyze(capsys, out, "samples", "layers", "--no-pictures")
    assert code == 0, err


def test_the_chosen_student(capsys, run, monkeypatch):
    calibrated(monkeypatch, run)
    chosen = json.loads((run / "result.json").read_text())["chosen_epoch"]
    code, out, err = analyze(capsys, run, "layers", "forecast", "--chosen", "--json", "--no-pictures")
    assert code == 0, err
    found = json.loads(out)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[chosen])
    assert found["forecast"]["kl"] == pytest.approx(record["held_out_kl"])
    assert found["layers"]["divergence"] == pytest.approx(record["held_out_kl"], rel=1e-3)


def test_the_forecast_as_a_gate(capsys, run, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(forecast, "calibration", lambda _: Calibration([]))  # too few
        code, _, err = analyze(capsys, run, "forecast", "--no-pictures", "--fail-above", 3)
        assert code == 2 and "not calibrated" in assert_one_sentence(err)
    code, _, err = analyze(capsys, run, "forecast", "--no-pictures", "--fail-above", 3)
    assert code == 2 and "beyond the calibration" in assert_one_sentence(err)  # of the committed records
    calibrated(monkeypatch, run)
    code, out, err = analyze(capsys, run, "forecast", "--json", "--no-pictures")
    assert code == 0, err
    found = json.loads(out)["forecast"]
    top1 = json.loads((run / "result.json").read_text())["top1"]
    assert found["measured"] == pytest.approx(top1["float"] - top1["last"]) and found["weight_bits"] == 3
    drop = found["forecast"]["drop"]
    code, out, _ = analyze(capsys, run, "forecast", "--fail-above", drop + 0.01, "--no-pictures")
    assert code == 0 and "forecast without data" in out and "measured on the test images" in out
    code, out, err = analyze(capsys, run, "forecast", "--fail-above", drop - 0.01, "--no-pictures")
    assert code == 7 and "above the limit" in assert_one_sentence(err) and "forecast without data" in out
    assert (run / "analysis" / "forecast.json").exists()
    monkeypatch.setattr(forecast, "calibrated_on", lambda: Network(269_722, (3, 32, 32), 10))
    code, out, err = analyze(capsys, run, "forecast", "--fail-above", drop + 99, "--no-pictures")
    assert code == 2 and "(network, input size, classes), which therefore is no gate" in assert_one_sentence(err)
    assert "beyond the calibration (network, input size, classes): the interval promises nothing" in out


def test_a_network_is_known_by_its_sizes():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 7)).train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    assert network_of(teacher, (3, 8, 8)) == Network(3 * 4 * 9 + 4 + 8 + 4 * 36 * 7 + 7, (3, 8, 8), 7)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items()) and teacher.training
    assert network_of(load_model("resnet20_a", num_classes=10).model, (3, 32, 32)) == calibrated_on()


def test_a_run_prints_its_forecast(capsys, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(forecast, "calibration", lambda _: Calibration([]))  # too few
        out = train(capsys, tiny, tmp_path / "without", "kl_only")
        held = json.loads((out / "result.json").read_text())
        assert held["forecast"] is None and held["forecast_before"] is None
        code, printed, _ = call(capsys, "resume", out)
        assert code == 0 and "forecast without data" not in printed
    known = [replace(p, weight_bits=3, act_bits=4) for p in made(20, noise=0.3)]
    monkeypatch.setattr(forecast, "calibration", lambda _: Calibration(known))
    out = train(capsys, tiny, tmp_path / "with", "kl_only", "--eval-data", tiny.images)
    held = json.loads((out / "result.json").read_text())
    assert held["forecast"]["kl"] == held["held_out"]["last"]["kl"]
    assert held["forecast"]["measured"] == pytest.approx(held["top1"]["float"] - held["top1"]["last"])
    assert held["forecast_before"]["measured"] == held["forecast"]["measured"]
    code, printed, _ = call(capsys, "resume", out)
    assert code == 0 and "forecast without data: top-1 drops by" in printed and "measured on the test images" in printed
    assert "forecast before training: top-1 drops by" in printed and "; measured " in printed
    code, printed, _ = call(capsys, "quantize", *tiny.model, "--recipe", "kl_only", "-w", 3, "-a", 4, *RUN, "--dry-run")
    assert code == 0 and "forecast before training: top-1 drops by" in printed and "; measured " not in printed
    out = train(capsys, tiny, tmp_path / "rtn", "rtn")
    assert json.loads((out / "result.json").read_text())["forecast"] is None  # nothing was held out
    code, _, err = analyze(capsys, out, "forecast", "--no-pictures")
    assert code == 2 and "held no images out" in assert_one_sentence(err)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["leyers"], 2, "there is no analysis 'leyers'. Did you mean 'layers'?"),
        (["samples", "xyzzy"], 2, "Known: "),
        (["layers", "--fail-above", "2"], 2, "add it to --what"),
        (["forecast", "--fail-above", "nan"], 2, "'nan' is not a number of points"),
        (["layers", "--images", "0"], 2, "--images"),
        (["surface", "--set", "surface.point=5"], 2, "has no option 'point'. Did you mean 'points'?"),
        (["surface", "--set", "surfaces.points=5"], 2, "Did you mean 'surface'?"),
        (["surface", "--set", "surface.points=five"], 2, "surface.points takes a number (int), got 'five'"),
        (["surface", "--set", "points=5"], 2, "not an option of an analysis such as"),
        (["layers", "--set", "layers.points=5"], 2, "has no option 'points'. It has none."),
        (["layers", "--set", "surface.points=5"], 2, "add it to --what"),
        (["layers", "--picture"], 2, "Did you mean '--no-pictures'?"),
    ],
)
def test_wrong_words(capsys, run, words, code, text):
    found, out, err = analyze(capsys, run, *words)
    assert (found, out) == (code, "") and text in assert_one_sentence(err)


def test_no_run_and_an_unfinished_one(capsys, tiny, tmp_path):
    code, _, err = analyze(capsys, tmp_path, "layers", "--no-pictures")
    assert code == 4 and "not a run directory" in assert_one_sentence(err)
    out = train(capsys, tiny, tmp_path / "run", "rtn")
    code, _, err = call(capsys, "analyze", out, "--what", "layers", "--no-pictures")
    assert code == 2 and "--allow-import" in assert_one_sentence(err)
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    code, _, err = analyze(capsys, out, "layers", "--no-pictures")
    assert code == 4 and "holds no checkpoint" in assert_one_sentence(err)
    (out / "student.safetensors").unlink()
    code, _, err = analyze(capsys, out, "layers", "--no-pictures")
    assert code == 4 and "not finished" in assert_one_sentence(err) and not (out / "analysis").exists()


def test_every_analysis_has_its_functions():
    for name in analysis.ANALYSES:
        compute, draw = analysis.find(name)
        assert callable(compute) and callable(draw)
    with pytest.raises(UsageError, match="Did you mean 'updates'"):
        analysis.find("update")
