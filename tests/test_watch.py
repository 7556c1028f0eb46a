"""`zsq-fast watch`: what is shown of a run at every moment of its life, how it ends, and that it only looks on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from cli_support import assert_one_sentence, call, make_tiny, schedule
from networks import tiny as network

import zsq_fast as zsq
from zsq_fast.errors import Interrupted
from zsq_fast.live import watch
from zsq_fast.live.reading import Reader, series
from zsq_fast.live.screen import clean, screen, sparkline
from zsq_fast.methods import Trainer, load_recipe
from zsq_fast.runs import RunDir, reporting, status
from zsq_fast.runs.progress import Progress
from zsq_fast.runs.status import StatusFile

ITERATIONS, EPOCHS = 3, 4
NUMBERS = dict(
    epochs=EPOCHS,
    warmup_epochs=2,
    calibration_epochs=1,
    iterations=ITERATIONS,
    batch_size=8,
    milestones="[3]",
    held_out=8,
)
EVIL = "\x1b[31mred\x1b]0;title\x07[bold]b[/bold]\u202e\ud800\r\nnext"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tmp_path):
    """A run that has begun and holds its lock, nothing trained yet."""
    recipe = load_recipe(
        "ait", input_size=(3, 8, 8), overrides=[f"schedule.{k}={v}" for k, v in NUMBERS.items()]
    ).to_dict()
    job = {"model": "resnet20", "allow_import": False}
    with RunDir.create(tmp_path / "run", recipe, {"job": job}) as directory:
        yield directory


def put_status(run: RunDir, **values: object) -> None:
    stage = {"stage": "ait", "activity": "", "first": 0, "step": 0, "steps": EPOCHS * ITERATIONS}
    (run.path / "status.json").write_text(
        json.dumps({"state": "running", **stage, "seconds": 60.0, "rate": 0.5, **values})
    )


def record(run: RunDir, epoch: int, **values: object) -> None:
    run.log(epoch=epoch, step=(epoch + 1) * ITERATIONS, lr_factor=1.0, **values)


def once(capsys, path: Path) -> str:
    code, out, err = call(capsys, "watch", path, "--once")
    assert (code, err) == (0, "")
    return out


def patched(monkeypatch, *actions):
    """Sleeping does the next action in place of waiting; more looks than actions are an error."""
    left = iter(actions)
    monkeypatch.setattr(time, "sleep", lambda seconds: next(left)())


# ---- the states of a run -------------------------------------------------------------------------------------------------


def test_just_begun(capsys, run):
    out = once(capsys, run.path)
    assert "0 of 12 (0.0 %)" in out and "resnet20" in out and "W4A4" in out and "no status is written" in out
    StatusFile(run.path / "status.json")
    out = once(capsys, run.path)
    assert "starting" in out and "no status" not in out and "steps/s" not in out


def test_while_it_trains(capsys, run):
    losses = [4.0, 2.0, 3.0]
    for epoch, loss in enumerate(losses):
        record(run, epoch, student_loss=loss, held_out_agreement=0.5 + epoch / 10, top1=None, update_ratio=[0.0, 0.02])
    put_status(run, step=10, first=4, rate=0.25)
    view = Reader(run.path).look()
    assert (view.state, view.stage, view.step, view.epoch, view.left) == ("running", "training, epoch 4 of 4", 10, 3, 8)
    shown = {s.title: (s.values, s.percent, s.spread) for s in view.series}
    assert shown == {
        "student loss": ((4.0, 2.0, 3.0), 0, None),
        "agreement, held out": ((0.5, 0.6, 0.7), 100, None),
        "codes changed, summed": ((0.01, 0.01, 0.01), 100, (0.0, 0.02)),
    }
    out = once(capsys, run.path)
    assert "10 of 12 (83.3 %)" in out and "1:00 passed since step 4, 0:08 left at this rate, 0.25 steps/s" in out
    assert "█▁▅" in out
    assert "70.00 %" in out and "1.00 % (0.00 % to 2.00 %)" in out and "0.0001" in out


@pytest.mark.parametrize(
    ("step", "stage"), [(0, "calibration, epoch 1"), (3, "warm-up, epoch 2"), (6, "training, epoch 3"), (12, "epoch 4")]
)
def test_phases(run, step, stage):
    put_status(run, step=step)
    assert stage in Reader(run.path).look().stage


def test_images_before_the_training(capsys, run):
    put_status(run, stage="images", step=40, steps=400)
    assert "images" in (out := once(capsys, run.path)) and "40 of 400" in out and "epoch 1" not in out


def test_half_written_last_line(run):
    record(run, 0, student_loss=1.0)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "step": 6, "stud')
    assert [s.values for s in Reader(run.path).look().series] == [(1.0,)]


def test_one_whose_process_was_killed(capsys, run):
    record(run, 0)
    run.save_checkpoint(3, {}, {})
    put_status(run, step=4)
    assert not Reader(run.path).look().missed
    for path in run.path.iterdir():
        os.utime(path, (time.time() - 500, time.time() - 500))
    view = Reader(run.path).look()
    assert view.missed and 490 < view.silent < 600
    out = " ".join(once(capsys, run.path).split())
    assert "nothing was written for 50" in out and f"go on with: zsq-fast resume {run.path}" in out
    put_status(run, step=4, rate=0.001)  # a step of 1000 seconds
    os.utime(run.path / "status.json", (time.time() - 500, time.time() - 500))
    assert not Reader(run.path).look().missed


@pytest.mark.parametrize(
    ("state", "code", "text"),
    [("done", 0, "done"), ("failed", 5, "failed: a NaN"), ("interrupted", 130, "interrupted at step 7")],
)
def test_it_ends_with_the_run(capsys, monkeypatch, run, state, code, text):
    put_status(run, step=5)
    run.save_checkpoint(6, {}, {})
    patched(monkeypatch, lambda: put_status(run, step=6), lambda: put_status(run, state=state, step=7, message="a NaN"))
    found, out, _ = call(capsys, "watch", run.path)
    assert found == code and text in out.splitlines()[-1], out
    assert ("zsq-fast resume" in out) == (state != "done")


def test_a_run_that_failed_before_its_first_checkpoint_is_gone(capsys, monkeypatch, run):
    patched(monkeypatch, run.discard)
    code, out, _ = call(capsys, "watch", run.path)
    assert code == 5 and "is gone" in out and not run.path.exists()


def test_ctrl_c_leaves_the_run_alone(capsys, monkeypatch, run):
    def interrupt():
        raise KeyboardInterrupt

    patched(monkeypatch, interrupt)
    code, _, err = call(capsys, "watch", run.path)
    assert code == 130 and "no longer watching" in err and len(err.splitlines()) == 1


def test_it_writes_nothing(capsys, run):
    record(run, 0, student_loss=1.0)
    put_status(run)

    def tree():
        return {str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in run.path.rglob("*")}

    before = tree()
    once(capsys, run.path)
    assert tree() == before


# ---- where it is shown -----------------------------------------------------------------------------------------------------


def shown(view, **options) -> str:
    stream = io.StringIO()
    console = watch.Screen(file=stream, width=100, **options)
    console.print(screen(view, "run", console))
    return stream.getvalue()


def test_terminal_and_no_color(monkeypatch, run):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    record(run, 0, student_loss=1.0)
    put_status(run, state="failed")
    view = Reader(run.path).look()
    assert "\x1b[31mfailed" in shown(view, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(view, force_terminal=True)
    assert "\x1b" not in shown(view)


def test_following_on_a_terminal(monkeypatch, run):
    monkeypatch.setenv("TERM", "xterm")
    put_status(run, step=5)
    patched(monkeypatch, lambda: put_status(run, step=8), lambda: put_status(run, state="done", step=12))
    stream = io.StringIO()
    console = watch.Screen(file=stream, force_terminal=True, width=100)
    assert watch.follow(run.path, console, 1.0) == 0
    out = stream.getvalue()
    assert out.index("5 of 12") < out.index("8 of 12") < out.index("12 of 12") and "\x1b[?25h" in out, "cursor is back"


def test_lines_without_a_terminal(monkeypatch, run):
    """One per epoch, stage and half minute, however often it looks."""
    put_status(run, step=5)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def later(seconds, **values):
        def act():
            clock[0] += seconds
            put_status(run, **values)

        return act

    patched(
        monkeypatch,
        later(1, step=5),
        later(31, step=5),
        later(1, step=6),
        later(1, step=7, activity="measuring on test images"),
        later(1, step=7, state="done"),
    )
    stream = io.StringIO()
    assert watch.follow(run.path, watch.Screen(file=stream, width=20), 1.0) == 0
    lines = stream.getvalue().splitlines()
    assert [line.split("; ")[0] for line in lines] == [
        "warm-up, epoch 2 of 4",
        "warm-up, epoch 2 of 4",
        "training, epoch 3 of 4",
        "training, epoch 3 of 4 (measuring on test images)",
        "done",
        "done",
    ]
    assert "\x1b" not in stream.getvalue()


def test_an_ascii_stream(run):
    record(run, 0, student_loss=1.0)
    run.write_json("recipe.json", {**run.recipe, "name": "äit"})
    put_status(run, stage="übung")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert watch.show_once(run.path, watch.Screen(file=stream, width=80)) == 0
    stream.flush()
    out = stream.buffer.getvalue().decode("ascii")
    assert "?it" in out and "?bung" in out and "student loss" in out


def test_a_closed_pipe(run):
    """`| head` has seen enough: the error that the command line knows, not rich's end of the process."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    put_status(run, state="done")
    for show in (lambda console: watch.show_once(run.path, console), lambda c: watch.follow(run.path, c, 1.0)):
        with pytest.raises(BrokenPipeError):
            show(watch.Screen(file=Closed()))


def test_without_rich(capsys, monkeypatch, run):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich" or name == "zsq_fast.live.watch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    code, _, err = call(capsys, "watch", run.path)
    assert code == 2 and "pip install rich" in assert_one_sentence(err)


def test_sparkline():
    assert sparkline((0.0, 7.0, 1.0)) == "▁█▂" and sparkline((5.0, 5.0)) == "▁▁" and sparkline((1.0,) * 99) == "▁" * 24
    assert sparkline((1e30, -1e30)) == "█▁"


# ---- files of a stranger -----------------------------------------------------------------------------------------------------


def test_hostile_texts(capsys, monkeypatch, run):
    info = run.info
    run.write_json("recipe.json", {**run.recipe, "name": EVIL})
    run.write_json("run.json", {**info, "job": {**info["job"], "model": EVIL}})
    record(run, 0, student_loss=1.0, **{EVIL: 2.0})
    put_status(run, state="failed", stage=EVIL, activity=EVIL, message=EVIL)
    out = once(capsys, run.path)
    code, lines, _ = call(capsys, "watch", run.path)
    assert code == 5
    for text in (out, lines):
        assert "[bold]b[/bold]" in text.replace("\n", "") and not set("\x1b\x07\r\u202e\ud800") & set(text)
    terminal = shown(Reader(run.path).look(), force_terminal=True)
    assert "\x1b[31mred" not in terminal and "\x1b]" not in terminal and "[bold]" in terminal


def test_clean():
    assert clean("a\n b\t\x00c", "utf-8") == "a b ?c" and clean("é\u2028x", "ascii") == "? x"
    assert len(clean("x" * 9999, "utf-8")) == 200
    assert clean("a  b\x1b" + "x" * 999, "utf-8", None) == "a  b?" + "x" * 999  # a command to be pasted


def test_a_resume_line_can_be_pasted(capsys, tmp_path, run):
    run.save_checkpoint(3, {}, {})
    put_status(run, state="interrupted")
    other = tmp_path / "a b; echo $HOME"
    shutil.copytree(run.path, other)
    assert f"zsq-fast resume '{other}'" in "".join(once(capsys, other).splitlines())


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("status.json", "{", "not valid JSON"),
        ("status.json", '{"step": "x"}', "'steps' is not a finite number"),
        ("status.json", '{"state": 3}', "'state' is not a text"),
        ("status.json", " " * (1 << 17), "too large"),
        ("metrics.jsonl", "x\n{}\n", "line 1: not valid JSON"),
        ("metrics.jsonl", "[]\n", "line 1: not valid JSON"),
        ("recipe.json", "{}", "damaged"),
        ("MANIFEST.json", "[]", "not a JSON object"),
    ],
)
def test_damaged_files_end_in_one_sentence(capsys, run, name, content, text):
    (run.path / name).write_text(content)
    for words in (["--once"], []):
        code, out, err = call(capsys, "watch", run.path, *words)
        assert (code, out) == (4, "") and text in assert_one_sentence(err)


def test_numbers_of_a_wrong_kind_are_left_out(run):
    record(run, 0, student_loss=[1.0], agreement="nan", update_ratio=[1, "x"], held_out_kl=True, top1=1e300)
    record(run, 1, student_loss=2.0, cosine={"ce-kl": {"total": 0.5}, "fa-kl": {"total": None}})
    found = Reader(run.path).look()
    assert {s.title: s.values for s in found.series} == {"student loss": (2.0,), "cosine CE-KL": (0.5,)}
    put_status(run, step=10**29, steps=10**29, seconds=1e29, rate=1e-29)
    assert "passed" in shown(Reader(run.path).look())
    assert series([]) == ()


def test_no_run(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        code, out, err = call(capsys, "watch", path)
        assert (code, out) == (4, "") and "not a run directory" in assert_one_sentence(err)


@pytest.mark.parametrize("interval", ["0", "nan", "-1", "x", "1e9"])
def test_wrong_interval(capsys, tmp_path, interval):
    code, _, err = call(capsys, "watch", tmp_path, f"--interval={interval}")
    assert code == 2 and "seconds" in assert_one_sentence(err)


# ---- what a run writes for it ---------------------------------------------------------------------------------------------------


def test_a_real_run_from_start_to_end(capsys, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(status, "PERIOD", 0.0)
    path, views, step = tmp_path / "run", [], Trainer._iterate
    monkeypatch.setattr(Trainer, "_iterate", lambda self, batch: (step(self, batch), views.append(Reader(path).look())))
    words = ["quantize", *tiny.model, "--recipe", "ait", "-w", 3, "-a", 4, "--out", path, "--eval-data", tiny.images]
    code, _, err = call(capsys, *words, *schedule(**NUMBERS), "--threads", 1, "--quiet")
    assert code == 0, err
    assert [view.step for view in views] == list(range(1, 13)) and {view.state for view in views} == {"running"}
    assert [view.epoch for view in views] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert all(view.steps == 12 and not view.missed and view.seconds >= 0 for view in views) and views[-1].rate > 0
    assert "test images" in views[5].activity and views[6].activity == ""  # the rtn accuracy
    view = Reader(path).look()
    assert view.state == "done" and view.top1 == json.loads((path / "result.json").read_text())["top1"]
    code, out, _ = call(capsys, "watch", path)
    assert code == 0 and out.splitlines()[-1].startswith("done: top-1 float ")
    (path / "status.json").unlink()  # a run of an older version
    assert Reader(path).look().state == "done"


def quantize(path: Path, *overrides: str, **options: object):
    numbers = [f"schedule.{k}={v}" for k, v in NUMBERS.items()]
    if not options.get("resume"):
        options["overrides"] = [*numbers, *overrides]
    return zsq.quantize(network(), "gdfq", input_size=(3, 8, 8), run_dir=path, progress=False, **options)


def test_interrupted_and_resumed(capsys, monkeypatch, tmp_path):
    path, step = tmp_path / "run", Trainer._iterate

    def stop(self, batch):
        step(self, batch)
        if self.state.step == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_iterate", stop)
        with pytest.raises(Interrupted):
            quantize(path)
    view = Reader(path).look()
    assert (view.state, view.step) == ("interrupted", 7) and "resume=True" in view.resume
    quantize(path, resume=True)
    view = Reader(path).look()
    assert (view.state, view.step, view.first) == ("done", 12, 7)


def test_failed(capsys, tiny, tmp_path):
    path = tmp_path / "run"
    words = ["quantize", *tiny.model, "--recipe", "gdfq", "--out", path, *schedule(**NUMBERS), "--threads", 1]
    code, _, _ = call(capsys, *words, "--set", "student.lr=1e30", "--quiet")
    assert code == 5
    view = Reader(path).look()
    assert view.state == "failed" and "epoch" in view.message and view.resume.endswith("--allow-import")


def test_a_run_that_never_began_leaves_nothing(capsys, monkeypatch, tiny, tmp_path):
    path = tmp_path / "run"

    def fail(self, epoch):
        assert (path / "status.json").exists()
        raise RuntimeError("early")

    monkeypatch.setattr(Trainer, "_finish_epoch", fail)
    words = ["quantize", *tiny.model, "--recipe", "gdfq", "--out", path, *schedule(**NUMBERS), "--threads", 1]
    code, _, err = call(capsys, *words, "--quiet")
    assert code == 1 and "early" in err and not path.exists()


def test_no_run_depends_on_the_status(tmp_path):
    progress = Progress(quiet=True)
    with reporting(tmp_path / "nothing", progress):  # nowhere to write to
        progress.start(10, "x")
        progress.advance()
        progress.doing("y")
    assert progress.status is None and list(tmp_path.iterdir()) == []


def test_the_status_is_written_now_and_then(monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    status_file = StatusFile(tmp_path / "status.json")

    def written(*names):
        values = json.loads((tmp_path / "status.json").read_text())
        return tuple(values[name] for name in names)

    status_file.begin("ait", 100, 20)
    for step in range(21, 26):  # four steps per second
        clock[0] += 0.25
        status_file.advance(step)
    assert written("step", "first", "seconds", "rate") == (20, 20, 0.0, 0.0)
    for step in range(26, 41):
        clock[0] += 0.25
        status_file.advance(step)
    assert written("step", "seconds", "rate") == (36, 4.0, 4.0)
    status_file.doing("measuring")
    assert written("step", "activity") == (40, "measuring")
    status_file.advance(41)
    assert written("step", "activity") == (41, "")
    status_file.end("failed", "why")
    assert written("state", "message", "step") == ("failed", "why", 41)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
