"""`--tensorboard`: the event files hold what the run recorded and nothing twice, and the run is the same with them and without."""

from __future__ import annotations

import errno
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import assert_one_sentence, call, make_tiny, schedule
from networks import tiny as network
from torch import nn

from zsq_fast.methods import Trainer, load_recipe
from zsq_fast.nn import QuantAct

pytest.importorskip("tensorboard")
from zsq_fast.live import tensorboard
from zsq_fast.live.tensorboard import TensorBoard, scalars

NUMBERS = dict(
    epochs=4, warmup_epochs=2, calibration_epochs=1, iterations=2, batch_size=8, milestones="[3]", held_out=8
)
TRACK = ["--track-updates", "--track-cosine", 1]
HAST = ["--set", "images.count=8", "--set", "images.batch_size=8", "--set", "images.iterations=2"]
HAST += ["--set", "student.feature_points=['3']"]
STEPS = [2, 4, 6, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny, out: Path, *more: object, recipe: str = "ait") -> list[object]:
    return ["quantize", *tiny.model, "--recipe", recipe, "-w", 3, "-a", 4, "--out", out, *schedule(**NUMBERS),
            "--eval-data", tiny.images, "--threads", 1, "--quiet", *more]  # fmt: skip


def events(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), size_guidance=dict(scalars=0, images=0, histograms=0)).Reload()


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(run)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_scalars_are_the_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every tag against its key; event files hold single precision."""
    found, records = read_scalars(run), metrics(run)
    for key, tag in tensorboard.SCALARS.items():
        expected = [(r["step"], float(np.float32(r[key]))) for r in records if r.get(key) is not None]
        assert found.get(tag, []) == expected, tag
    for key, tag in tensorboard.PER_WEIGHT.items():
        having = [r for r in records if key in r]
        for i, name in enumerate(("0", "3", "8")):
            expected = [(r["step"], float(np.float32(r[key][i]))) for r in having]
            assert found.get(f"{tag}/{name}", []) == expected, (tag, name)
        means = [(r["step"], float(np.float32(sum(r[key]) / len(r[key])))) for r in having]
        assert found.get(f"{tag}/mean", []) == [(s, pytest.approx(v)) for s, v in means]
    return found


def test_the_log_is_what_was_recorded_and_the_run_the_same(capsys, tiny, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    for path, more in ((plain, []), (run, ["--tensorboard"])):
        code, _, err = call(capsys, *words(tiny, path, *TRACK, *more))
        assert code == 0, err
    assert not (plain / "tensorboard").exists()
    last = f"checkpoints/step-{STEPS[-1]:08d}"
    for name in ("student.safetensors", "chosen.safetensors", "metrics.jsonl", f"{last}/generator.safetensors"):
        assert (run / name).read_bytes() == (plain / name).read_bytes(), name

    found = assert_scalars_are_the_metrics(run)
    records = metrics(run)
    for pair in ("ce-kl",):
        expected = [(r["step"], np.float32(r["cosine"][pair]["total"])) for r in records if "cosine" in r]
        assert found[f"cosine_total/{pair}"] == expected and len(expected) == 2
    rates = [(r["step"], pytest.approx(r["lr_factor"] * 1e-4)) for r in records]
    assert found["lr/student"] == rates and [v for _, v in rates] != [rates[0][1]] * 4
    assert found["lr/generator"] == [(r["step"], pytest.approx(r["lr_factor"] * 1e-3)) for r in records]
    assert {"top1/test_images", "kl/held_out", "net_updates/0", "updates/mean"} <= found.keys()


def finished_student(tiny, run: Path) -> nn.Module:
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import STUDENT, load_student
    from zsq_fast.runs import RunDir

    directory = RunDir.open(run, read_only=True)
    job, teacher = load(Job.from_info(directory.info, run, allow_import=True))
    return load_student(directory, job, teacher, STUDENT)


@pytest.fixture(scope="module")
def learned(tiny, tmp_path_factory):
    """A run with learned ranges and its events."""
    from zsq_fast.cli import main

    run = tmp_path_factory.mktemp("learned") / "run"
    assert (
        main([str(w) for w in words(tiny, run, "--tensorboard", "--set", "quant.ranges=learned", recipe="gdfq")]) == 0
    )
    return run


def test_histograms_of_codes(tiny, learned):
    student, found = finished_student(tiny, learned), events(learned)
    layers = {n: m for n, m in student.named_modules() if hasattr(m, "integer_codes")}
    assert {t for t in found.Tags()["histograms"] if t.startswith("codes/")} == {f"codes/{n}" for n in layers}
    for name, layer in layers.items():
        series = found.Histograms(f"codes/{name}")
        assert [e.step for e in series] == STEPS
        last, codes = series[-1].histogram_value, layer.integer_codes().flatten().double()
        assert list(last.bucket) == [float((codes == c).sum()) for c in range(8)]
        assert list(last.bucket_limit) == [c + 0.5 for c in range(8)] and (last.min, last.max) == (-0.5, 7.5)
        assert (last.num, last.sum, last.sum_squares) == (len(codes), codes.sum(), codes.square().sum())


def test_histograms_of_activation_ranges(tiny, learned):
    student, found = finished_student(tiny, learned), events(learned)
    acts = [m for m in student.modules() if isinstance(m, QuantAct)]
    assert len(acts) == 2 and all(m.learns for m in acts)
    top = [float(m.step.detach() * m.codes[1]) for m in acts]
    low, high = (found.Histograms(f"activation_range/{end}")[-1].histogram_value for end in ("low", "high"))
    assert (low.num, low.min, low.max) == (2, 0.0, 0.0)
    assert (high.min, high.max) == (pytest.approx(min(top)), pytest.approx(max(top)))
    assert len(found.Histograms("activation_range/high")) == 4


def test_ends_of_a_range():
    act = QuantAct(bits=3)
    act.lo.fill_(-1.0)
    act.hi.fill_(3.0)
    assert [float(v) for v in tensorboard._ends(act)] == [-1.0, 3.0]
    act = QuantAct(bits=3, ranges="learned")
    act.lo.fill_(-1.0)
    act.hi.fill_(3.0)
    act.freeze()
    assert [float(v) for v in tensorboard._ends(act)] == [pytest.approx(-4.0), pytest.approx(3.0)]  # codes -4 to 3


def pictures(run: Path):
    from PIL import Image

    (tag,) = (found := events(run)).Tags()["images"]
    return [(e.step, Image.open(io.BytesIO(e.encoded_image_string))) for e in found.Images(tag)]


def test_contact_sheets(learned):
    """Of the generator: every epoch of a short run, the same classes each time; eight images in rows of their classes."""
    shown = pictures(learned)
    assert [step for step, _ in shown] == STEPS
    sizes = {image.size for _, image in shown}
    assert len(sizes) == 1
    ((width, height),) = sizes
    assert width % 9 == 0 and height % 9 == 0 and height // 9 <= 4 and {i.mode for _, i in shown} == {"RGBA"}
    alpha = np.asarray(shown[0][1])[..., 3] == 255
    assert alpha.sum() == 8 * 8 * 8  # eight opaque images of 8 x 8
    first, last = (np.asarray(shown[i][1]) for i in (0, -1))
    assert np.any(first != last) and np.array_equal(first[..., 3], last[..., 3])


@pytest.mark.parametrize("recipe", ["hast", "qimera"])
def test_other_sources_of_images(capsys, tiny, tmp_path, recipe):
    """Optimised images are shown once; superposed ones, with soft labels, like all others."""
    more = HAST if recipe == "hast" else ["--set", "generator.superpose_probability=1.0"]
    code, _, err = call(capsys, *words(tiny, tmp_path / "run", "--tensorboard", *more, recipe=recipe))
    assert code == 0, err
    assert_scalars_are_the_metrics(tmp_path / "run")
    assert [step for step, _ in pictures(tmp_path / "run")] == (STEPS[:1] if recipe == "hast" else STEPS)


def kill_after_epoch(monkeypatch, capsys, epochs: int, command: list[object]) -> None:
    """Ends the run after an epoch is logged and before its checkpoint is saved."""
    with monkeypatch.context() as patch:
        save = Trainer.save

        def die(self):
            if len(self.state.history) == epochs:
                raise KeyboardInterrupt
            save(self)

        patch.setattr(Trainer, "save", die)
        code, _, _ = call(capsys, *command)
        assert code == 130


def test_a_resumed_run_goes_on_in_the_same_log(capsys, monkeypatch, tiny, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(capsys, *words(tiny, whole, *TRACK, "--tensorboard"))[0] == 0
    kill_after_epoch(monkeypatch, capsys, 3, words(tiny, run, *TRACK, "--tensorboard"))
    assert len(read_scalars(run)["lr/student"]) == 3, "an epoch that the checkpoint does not have"
    code, _, err = call(capsys, "resume", run, "--allow-import", "--quiet")
    assert code == 0, err
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert assert_scalars_are_the_metrics(run) == read_scalars(whole)
    ours, theirs = events(run), events(whole)
    for tag in theirs.Tags()["histograms"]:
        values = [[(e.step, e.histogram_value) for e in found.Histograms(tag)] for found in (ours, theirs)]
        assert values[0] == values[1] and [step for step, _ in values[0]] == STEPS
    assert [i.tobytes() for _, i in pictures(run)] == [i.tobytes() for _, i in pictures(whole)]
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_killed_in_the_first_epoch(capsys, monkeypatch, tiny, tmp_path):
    """The sheet of optimised images, which is written once, is written again behind what is hidden."""
    command = words(tiny, tmp_path / "run", "--tensorboard", *HAST, recipe="hast")
    step = Trainer._finish_epoch

    def save_first(self, epoch):
        if epoch == 0:
            self.state.step -= 1  # as a signal in the middle of the epoch would
            self.save()
            self.state.step += 1
        step(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_epoch", save_first)
        kill_after_epoch(monkeypatch, capsys, 1, command)
    assert [s for s, _ in pictures(tmp_path / "run")] == STEPS[:1]
    code, _, err = call(capsys, "resume", tmp_path / "run", "--allow-import", "--quiet")
    assert code == 0, err
    assert [s for s, _ in pictures(tmp_path / "run")] == STEPS[:1]
    assert [s for s, _ in read_scalars(tmp_path / "run")["lr/student"]] == STEPS


@pytest.mark.parametrize("switch", ["--tensorboard", "--no-tensorboard"])
def test_resume_can_begin_a_log_and_end_one(capsys, monkeypatch, tiny, tmp_path, switch):
    run, began = tmp_path / "run", switch == "--no-tensorboard"
    log = ["--tensorboard"] if began else []
    kill_after_epoch(monkeypatch, capsys, 3, words(tiny, run, *log, *HAST, recipe="hast"))
    assert (run / "tensorboard").exists() == began
    code, _, err = call(capsys, "resume", run, "--allow-import", "--quiet", switch)
    assert code == 0, err
    if began:
        assert [s for s, _ in read_scalars(run)["lr/student"]] == STEPS[:3]
    else:
        assert_scalars_are_the_metrics(run)  # those before it, too
        assert [step for step, _ in pictures(run)] == STEPS[2:3], "optimised images, once"


@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "PIL.Image"])
def test_a_missing_package_is_named_before_the_run(capsys, monkeypatch, tiny, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = call(capsys, *words(tiny, tmp_path / "run", "--tensorboard"))
    assert (code, out) == (2, "") and "zsq-fast[tensorboard]" in assert_one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_leaves_no_log(capsys, monkeypatch, tiny, tmp_path):
    kill = RuntimeError("disk on fire")

    def fail(self):
        assert (tmp_path / "run" / "tensorboard").is_dir()
        raise kill

    monkeypatch.setattr(Trainer, "save", fail)
    code, _, err = call(capsys, *words(tiny, tmp_path / "run", "--tensorboard"))
    assert code == 1 and "on fire" in err and not (tmp_path / "run").exists()


def recipe(name: str = "gdfq", **numbers: object):
    overrides = [f"schedule.{k}={v}" for k, v in {**NUMBERS, **numbers}.items()]
    return load_recipe(name, input_size=(3, 8, 8), overrides=[*overrides, "quant.ema=plain"])


def test_an_unwritable_folder_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    plain = Trainer(network(), recipe(), input_size=(3, 8, 8)).run()
    with (
        TensorBoard(tmp_path / "file" / "log") as log,
        pytest.warns(UserWarning, match="nothing more is written for TensorBoard"),
    ):
        result = Trainer(network(), recipe(), input_size=(3, 8, 8), on_epoch=log).run()
    assert result.history == plain.history


@pytest.mark.parametrize("method", ["_add_histograms", "_add_images", "__exit__"])
def test_what_goes_wrong_in_the_log_costs_no_run(capsys, monkeypatch, tiny, tmp_path, method):
    """Full disks in the first epoch, or when the log is closed behind the last."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if method == "__exit__":
        monkeypatch.setattr(tensorboard.writer_class(), "close", fail)
    else:
        monkeypatch.setattr(TensorBoard, method, fail)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = call(capsys, *words(tiny, tmp_path / "run", "--tensorboard"))
    assert code == 0 and "nothing more is written for TensorBoard" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_images_and_histograms_at_some_epochs_only(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorboard, "PICTURES", 2)
    with TensorBoard(tmp_path / "tensorboard") as log:
        Trainer(network(), recipe(epochs=7, iterations=1), input_size=(3, 8, 8), on_epoch=log).run()
    assert [step for step, _ in pictures(tmp_path)] == [1, 4, 7]
    assert len(read_scalars(tmp_path)["loss/generator_ce"]) == 7


def test_nothing_global_is_drawn_and_it_is_called_once_per_epoch(tmp_path):
    calls = []
    with TensorBoard(tmp_path / "tensorboard") as log:

        def on_epoch(trainer, record):
            before = torch.get_rng_state()
            log(trainer, record)
            calls.append((record["step"], torch.equal(before, torch.get_rng_state())))

        Trainer(network(), recipe(), input_size=(3, 8, 8), on_epoch=on_epoch).run()
    assert calls == [(step, True) for step in STEPS]


def test_a_network_of_one_layer_has_a_tag(tmp_path):
    found = dict(scalars({"lr_factor": 0.5, "update_ratio": [0.25]}, recipe(), [""]))
    assert found == {"lr/student": 0.5 * recipe().student.lr, "updates/mean": 0.25, "updates/weight": 0.25}
    assert "lr/student" not in dict(scalars({"lr_factor": 1.0}, recipe("rtn"), []))
