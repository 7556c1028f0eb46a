"""`zsq-fast sweep`: its runs are those of `quantize`, it goes on after a kill, a failed run stops no other, the numbers are right."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import assert_one_sentence, call, make_tiny, one_thread, schedule, start

from zsq_fast.cli import main
from zsq_fast.cli.job import Job
from zsq_fast.cli.sweep import cost, workers
from zsq_fast.cli.sweep.options import option
from zsq_fast.cli.sweep.plan import Plan, Run
from zsq_fast.cli.sweep.results import _spread, collect, table
from zsq_fast.errors import BadFileError, StorageError
from zsq_fast.runs import RunDir

NUMBERS = schedule(
    epochs=4, warmup_epochs=2, calibration_epochs=1, iterations=3, batch_size=8, milestones="[3]", held_out=16
)
NUMBERS += ["--set", "quant.ema=plain", "--threads", "1"]
HAST = [*NUMBERS, "--set", "images.count=8", "--set", "images.batch_size=8", "--set", "images.iterations=2"]
HAST += ["--set", "student.feature_points=['3']", "--set", "student.batch_size=8", "--set", "student.lr=0.02"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny, out, *more, recipe="hast", numbers=HAST):
    return ["sweep", *tiny.model, "--recipe", recipe, "-w", 3, "-a", 4, "--out", out, *numbers, *more]


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """Two values, two seeds, with test images."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    more = ["--vary", "student.epsilon=0.010,0.05", "--seeds", 0, 1, "--jobs", 2, "--eval-data", tiny.images, "--quiet"]
    with one_thread():
        assert main([str(word) for word in words(tiny, out, *more)]) == 0
    return out


def contents(run):
    result = json.loads((run / "result.json").read_text())
    names = ("student.safetensors", "chosen.safetensors", "metrics.jsonl", "recipe.json")
    job = RunDir.open(run, read_only=True).info["job"]
    kept = {key: value for key, value in result.items() if key not in ("minutes", "student")}
    return {**{name: (run / name).read_bytes() for name in names}, "result": kept, "job": job}


def test_a_run_is_the_one_that_quantize_makes(capsys, tiny, swept, tmp_path):
    own = [*tiny.model, "--recipe", "hast", "-w", 3, "-a", 4, "--eval-data", tiny.images, *HAST, "--quiet"]
    own += ["--set", "student.epsilon=0.05", "--seed", 1, "--out", tmp_path / "by-hand"]
    code, _, err = call(capsys, "quantize", *own)
    assert code == 0, err
    assert contents(swept / "student.epsilon=0.05" / "seed-1") == contents(tmp_path / "by-hand")
    assert contents(swept / "student.epsilon=0.01" / "seed-1") != contents(tmp_path / "by-hand")


def test_images_are_made_once_and_lie_in_every_run(swept):
    files = {}
    for run in swept.glob("*/seed-*/"):
        (file,) = (run / "images").glob("*/*")
        files.setdefault(run.name, []).append(file.stat().st_ino)
    assert {seed: len(set(inodes)) for seed, inodes in files.items()} == {"seed-0": 1, "seed-1": 1}
    assert all(len(inodes) == 2 for inodes in files.values()) and files["seed-0"] != files["seed-1"]


def test_numbers_table_and_plot(capsys, swept):
    code, text, err = call(capsys, "sweep", swept, "--json", "--quiet")
    assert code == 0, err  # everything is there: nothing is trained
    sweep = json.loads(text)
    assert sweep == json.loads((swept / "sweep.json").read_text())
    assert [point["values"] for point in sweep["points"]] == [{"student.epsilon": 0.01}, {"student.epsilon": 0.05}]
    assert [point["own"] for point in sweep["points"]] == [True, False] and sweep["measure"] == "last"
    for point in sweep["points"]:
        results = [json.loads((swept / point["name"] / f"seed-{i}" / "result.json").read_text()) for i in (0, 1)]
        for key, values in {
            **{key: [r["top1"][key] for r in results] for key in ("float", "last", "chosen")},
            "held_out_agreement": [100 * r["held_out"]["last"]["agreement"] for r in results],
            "held_out_agreement_chosen": [100 * r["held_out"]["chosen"]["agreement"] for r in results],
        }.items():
            assert [run[key] for run in point["runs"]] == values
            spread = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "seeds": 2}
            assert point[key] == pytest.approx(spread)
        assert [run["state"] for run in point["runs"]] == ["done", "done"]
    code, text, err = call(capsys, "sweep", swept, "--table-only", "--no-pictures")
    assert code == 0, err
    lines = text.splitlines()
    own, other = (next(line for line in lines if line.split()[0] == value) for value in ("0.01", "0.05"))
    last = sweep["points"][1]["last"]
    assert f"{last['mean']:.2f} ± {last['deviation']:.2f}" in other and other.endswith("2/2") and own.endswith("2/2 *")
    assert (swept / "sweep.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (swept / "sweep.svg").read_text()


def test_every_run_is_an_ordinary_one(capsys, tiny, swept, tmp_path):
    run = swept / "student.epsilon=0.01" / "seed-0"
    code, text, err = call(capsys, "evaluate", run, "--data", tiny.images, "--allow-import", "--json")
    assert code == 0, err
    result = json.loads((run / "result.json").read_text())
    assert json.loads(text)["quantized"]["top1"] == result["top1"]["last"]
    code, text, err = call(capsys, "analyze", run, "--what", "samples", "--allow-import", "--no-pictures", "--json")
    assert code == 0, err
    for library in ("jinja2", "matplotlib"):
        pytest.importorskip(library)
    code, text, err = call(capsys, "report", run, "-o", tmp_path / "page.html")
    assert code == 0, err
    assert "Optimised images, which the student was trained on" in (tmp_path / "page.html").read_text()


def test_a_sweep_of_other_options_is_refused_and_a_larger_one_is_not(capsys, tiny, swept, tmp_path):
    def refused(*more, vary="student.epsilon=0.01,0.05", seeds=(0, 1)):
        data = ["--eval-data", tiny.images]
        given = words(tiny, swept, "--vary", vary, "--seeds", *seeds, *data, "--quiet", *more)
        code, _, err = call(capsys, *given)
        assert code == 2
        return assert_one_sentence(err)

    before = (swept / "plan.json").read_bytes()
    assert "another value of 'overrides'" in refused("--set", "student.momentum=0.5")
    assert "another value of 'threads'" in refused("--threads", 2)
    assert "another value of 'eval_limit'" in refused("--eval-limit", 5)
    assert "another value of 'one_at_a_time'" in refused("--one-at-a-time")
    assert "student.epsilon=0.01, which is missing" in refused(vary="student.epsilon=0.02,0.05")
    assert "seed 0, which is missing" in refused(seeds=(1,))
    assert (swept / "plan.json").read_bytes() == before
    code, _, err = call(capsys, "sweep", swept, "--vary", "student.epsilon=0.02")
    assert code == 2 and "zsq-fast sweep DIR has no option '--vary'" in assert_one_sentence(err)
    plan = Plan.load(swept)
    larger = dataclasses.replace(plan, vary=(option("student.epsilon=0.02,0.05,0.01"),), seeds=(2, 1, 0))
    larger.check_continues(plan, swept)
    assert sum(run.result() is not None for run in larger.runs(swept)) == 4
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    code, _, err = call(capsys, *words(tiny, tmp_path / "taken", "--vary", "student.epsilon=0.02"))
    assert code == 2 and "is not empty ('notes.txt' is in it)" in assert_one_sentence(err)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--vary", "student.epsilonn=1,2"], "'student.epsilonn'. Did you mean 'epsilon'"),
        (["--vary", "students.epsilon=1,2"], "'students'. Did you mean 'student'"),
        (["--vary", "student.epsilon=0.01,-1"], "student.epsilon must be at least 0"),
        (["--vary", "student.epsilon=0.01,big"], "student.epsilon must be a finite number, got 'big'"),
        (["--vary", "student.epsilon=0.01,0.010"], "the point student.epsilon=0.01 twice"),
        (["--vary", "student.epsilon=0.01", "--vary", "student.epsilon=0.02"], "more than one --vary"),
        (["--vary", "student.epsilon"], "is not section.option=value,value"),
        (["--vary", "student.epsilon=0.1,,0.2"], "is not section.option=value,value"),
        (["--vary", "student.clean_weight:student.promoted_weight=1:0:3"], "3 values for the 2 options"),
        (["--vary", "student.epsilon=0.1", "--set", "schedule.held_out=0"], "--eval-data"),
        (["--vary", "student.epsilon=0.1", "--eval-data", "nowhere.npz"], "nowhere.npz"),
        (["--vary", "student.epsilon=0.1", "--jobs", "0"], "'0' is not a number"),
        (["--vary", "student.epsilon=0.1", "--table-only"], "there is no sweep in"),
        ([], "--vary"),
    ],
)
def test_what_is_wrong_is_told_before_there_is_a_directory(capsys, tiny, tmp_path, more, text):
    code, out, err = call(capsys, *words(tiny, tmp_path / "out", *more))
    assert code in (2, 4) and text in assert_one_sentence(err) and out == ""
    assert not (tmp_path / "out").exists()


def test_a_failed_run_is_shown_and_the_others_go_on(capsys, tiny, tmp_path):
    out = tmp_path / "out"
    blocked = out / "student.lr=0.01" / "seed-0"
    given = words(tiny, out, "--vary", "student.lr=0.01,1e38,0.02", recipe="kl_only", numbers=NUMBERS)
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").touch()
    with pytest.MonkeyPatch.context() as patched:  # as if the directory had been taken while the first run trained
        patched.setattr("zsq_fast.runs.directory.check_free", lambda path: None)
        code, text, err = call(capsys, *given, "--jobs", 2)
    assert code == 5 and "2 of 3 runs failed" in assert_one_sentence(err)
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert [point["runs"][0]["state"] for point in points] == ["failed", "failed", "done"]
    assert "is not empty ('notes.txt'" in points[0]["runs"][0]["error"]
    assert "became NaN or infinite" in points[1]["runs"][0]["error"]
    assert points[0]["held_out_agreement"] is None and points[2]["held_out_agreement"]["seeds"] == 1
    assert "failed: student.lr=1e+38, seed 0: " in text and "1 failed" in text and "--eval-data PATH" in text
    (blocked / "notes.txt").unlink()
    code, text, err = call(capsys, "sweep", out, "--allow-import", "--quiet", "--no-pictures")
    assert code == 5 and "1 of 3 runs failed" in assert_one_sentence(err)
    assert "failed: student.lr=1e+38" in text and "failed: student.lr=0.01" not in text
    code, shown, err = call(capsys, "sweep", out, "--table-only", "--no-pictures")
    assert code == 5 and shown == text


def wait(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def test_stopped_killed_and_gone_on_with(capsys, tiny, tmp_path):
    """By Ctrl-C, then by a SIGKILL of the sweep alone: no process is left behind, and the end is that of a run by hand."""
    out, numbers = tmp_path / "out", [*NUMBERS, *schedule(epochs=7, iterations=40, milestones="[5]")]
    given = words(tiny, out, "--vary", "student.lr=0.01,0.02", recipe="kl_only", numbers=numbers)
    runs = [out / f"student.lr={value}" / "seed-0" for value in (0.01, 0.02)]

    def lines(name, text=b"\n"):
        return sum(path.read_bytes().count(text) for path in out.glob(name))

    def free(run):
        try:
            RunDir.open(run).close()
        except BadFileError:  # not begun
            return True
        except StorageError:
            return False
        return True

    def stop(command, number):
        """Once an epoch more is recorded; returns the exit code and the last line, when the state has been saved."""
        epochs, saved = lines("*/*/metrics.jsonl"), lines("*/*.log", b"and saved; go on with")
        process = start(*command)
        wait(lambda: lines("*/*/metrics.jsonl") > epochs, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        wait(lambda: lines("*/*.log", b"and saved; go on with") > saved and all(map(free, runs)))
        assert not any((run / "result.json").exists() for run in runs), "it had already finished: the test is too slow"
        return process.returncode, err.splitlines()[-1]

    code, line = stop([*given, "--jobs", 2], signal.SIGINT)
    assert code == 130 and f"0 of 2 runs are finished; `zsq-fast sweep {out} --allow-import` goes on" in line
    states = {point["runs"][0]["state"] for point in json.loads((out / "sweep.json").read_text())["points"]}
    assert "unfinished" in states <= {"unfinished", "not begun"}
    again = ["sweep", out, "--allow-import", "--jobs", 2]
    if sys.platform == "linux":
        assert stop(again, signal.SIGKILL)[0] == -signal.SIGKILL
    code, _, err = call(capsys, *again, "--quiet", "--no-pictures")
    assert code == 0, err  # no other process was at the runs
    by_hand = [*tiny.model, "--recipe", "kl_only", "-w", 3, "-a", 4, *numbers, "--set", "student.lr=0.02", "--quiet"]
    code, _, err = call(capsys, "quantize", *by_hand, "--out", tmp_path / "by-hand")
    assert code == 0, err
    assert contents(runs[1]) == contents(tmp_path / "by-hand") and contents(runs[0]) != contents(runs[1])


def test_a_sweep_in_use_is_left_alone(capsys, swept):
    import filelock

    with filelock.FileLock(swept / ".lock"):
        code, _, err = call(capsys, "sweep", swept, "--allow-import", "--quiet")
    assert code == 74 and "in use by another zsq-fast process" in assert_one_sentence(err)


# ---- parts, without processes ------------------------------------------------------------------------------------------


def plan(*vary, one_at_a_time=False, seeds=(0,), overrides=(), **job):
    options = tuple(option(text) for text in vary)
    made = Job("resnet20", input_size=(3, 32, 32), threads=1, **job)
    return Plan(made, "hast", 3, 3, "paper", tuple(overrides), options, one_at_a_time, tuple(seeds))


def test_options():
    assert option("a.b=1, 2 ,x").values == (("1",), ("2",), ("x",))
    assert option("a.b=[1,2],[3,4]").values == (("[1,2]",), ("[3,4]",))
    assert option("a.b='x,y',\"z:w\"").values == (("'x,y'",), ('"z:w"',))
    both = option("a.b:c.d=1:[2,3],4:'5:6'")
    assert both.keys == ("a.b", "c.d") and both.values == (("1", "[2,3]"), ("4", "'5:6'"))


def test_points_of_a_grid_and_one_at_a_time():
    vary = ("student.epsilon=0.005,0.01", "student.clean_weight:student.promoted_weight=1:1,1:3")
    grid = plan(*vary).points()
    assert [(p.values["student.epsilon"], p.values["student.promoted_weight"], p.own) for p in grid] == [
        (0.005, 1.0, False), (0.005, 3.0, False), (0.01, 1.0, True), (0.01, 3.0, False)]  # fmt: skip
    assert grid[1].name == "student.epsilon=0.005,student.clean_weight=1.0,student.promoted_weight=3.0"
    assert all(p.recipe.student.epsilon == p.values["student.epsilon"] for p in grid)
    alone = plan(*vary, one_at_a_time=True).points()  # the recipe's own values, in both lists, are one point
    assert [p.name for p in alone] == [
        "student.epsilon=0.005", "own", "student.clean_weight=1.0,student.promoted_weight=3.0"]  # fmt: skip
    assert [p.own for p in alone] == [False, True, False]
    other = plan("student.epsilon=0.01,0.02", overrides=["student.epsilon=0.02"]).points()
    assert [p.own for p in other] == [False, True], "--set decides what the recipe's own value is"


def test_names_are_safe_and_differ():
    points = plan("student.crop_scale=[0.4,1.0],[0.5,1.0]").points()
    names = [point.name for point in points]
    assert len(set(names)) == 2 and all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_.=-0123456789") for name in names)
    long = plan("student.feature_points=[" + ",".join(f"'layer{i}'" for i in range(40)) + "],[]").points()
    assert all(len(point.name) <= 120 for point in long)


def test_the_command_line_says_everything():
    job = dict(checkpoint="/w.pt", num_classes=10, mean=(-0.5, 0.1, 0.2), std=(1.0, 1.0, 1.0), channels_last=False)
    made = plan("student.epsilon=0.02", seeds=[7], overrides=["student.lr=1.0"], force=True, device="cuda:1", **job)
    (run,) = made.runs(Path("out"))
    command = made.command(run, allow_import=True)
    from zsq_fast.cli.quantize import make_parser

    arguments = make_parser().parse(command[command.index("quantize") + 1 :])
    again = Job.from_arguments(arguments, model=arguments.model, seed=arguments.seed)
    assert again == dataclasses.replace(made.job, allow_import=True, seed=7)
    assert arguments.overrides == ["student.lr=1.0", "student.epsilon=0.02"]
    assert (arguments.recipe, arguments.weight_bits, arguments.act_bits, arguments.schedule) == ("hast", 3, 3, "paper")
    assert Path(arguments.out) == run.path == Path("out/student.epsilon=0.02/seed-7")
    assert "--allow-import" not in made.command(run, allow_import=False)


def test_a_plan_survives_its_file(tmp_path):
    made = plan("student.epsilon=0.02,0.03", "images.count=256,512", seeds=[3, 4], mean=(0.5,), allow_import=True)
    (tmp_path / "plan.json").write_text(json.dumps(made.to_dict()))
    found = Plan.load(tmp_path)
    assert found == dataclasses.replace(made, job=dataclasses.replace(made.job, allow_import=False))
    changed = {**made.to_dict(), "resolved": plan("student.lr=1", overrides=["student.lr=0.5"]).to_dict()["resolved"]}
    (tmp_path / "plan.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="has changed since"):
        Plan.load(tmp_path)


def touch_images(run: Run, count: int) -> None:
    for name in workers.batch_files(run.point.recipe.images)[:count]:
        (run.path / "images" / "set").mkdir(parents=True, exist_ok=True)
        (run.path / "images" / "set" / name).write_bytes(name.encode())


HOSTILE = [
    {"seeds": ["x/../../../../pwned"]}, {"seeds": [[1]]}, {"seeds": [True]}, {"seeds": [-1]},
    {"overrides": [1]}, {"schedule": 3}, {"recipe": ["hast"]}, {"vary": [3]},
]  # fmt: skip


@pytest.mark.parametrize("values", HOSTILE, ids=str)
def test_a_plan_of_others_is_read_strictly(tmp_path, values):
    path = tmp_path / "plan.json"
    made = plan("student.epsilon=0.02,0.03", seeds=[3])
    path.write_text(json.dumps(made.to_dict()))
    assert Plan.load(tmp_path).seeds == (3,)
    path.write_text(json.dumps({**made.to_dict(), **values}))
    with pytest.raises(BadFileError, match="damaged"):
        Plan.load(tmp_path)


def test_processes_import_what_this_one_did(monkeypatch, tmp_path):
    """Not a source tree without kernels that came onto the path since."""
    (tmp_path / "zsq_fast").mkdir()
    (tmp_path / "zsq_fast" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.syspath_prepend(tmp_path)
    command = [sys.executable, "-c", "import zsq_fast; print(zsq_fast.__file__)"]
    done = subprocess.run(command, env=workers._environment(), capture_output=True, text=True, cwd=tmp_path)
    assert Path(done.stdout.strip()) == Path(workers.zsq_fast.__file__), done.stderr


def test_links_are_not_followed(capsys, tiny, swept, tmp_path):
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "plan.json").write_bytes((swept / "plan.json").read_bytes())
    victim = tmp_path / "victim"
    victim.write_text("mine")
    point = out / "student.epsilon=0.01"
    point.mkdir()
    (point / "seed-0.log").symlink_to(victim)
    code, _, err = call(capsys, "sweep", out, "--allow-import", "--quiet", "--no-pictures")
    assert code == 74 and "seed-0.log" in assert_one_sentence(err) and victim.read_text() == "mine"
    (point / "seed-0.log").unlink()
    (point / "seed-0").symlink_to(tmp_path / "elsewhere")
    code, _, err = call(capsys, "sweep", out, "--allow-import", "--quiet", "--no-pictures")
    assert code == 4 and "is a link" in assert_one_sentence(err) and not (tmp_path / "elsewhere").exists()


def test_many_values_are_no_file(capsys, tiny, tmp_path):
    rates = ",".join(f"0.{i:09}" for i in range(1, 60))
    code, _, err = call(capsys, *words(tiny, tmp_path / "out", "--vary", f"student.lrr={rates}"))
    assert code == 2 and "student.lr" in assert_one_sentence(err)


def test_runs_wait_only_for_images_that_are_being_made(tmp_path):
    small = ["images.batch_size=8"]
    first, second, fewer, other = plan(
        "images.hard_gamma:student.epsilon:images.count=2:0.01:20,2:0.02:20,2:0.01:8,1:0.01:20", overrides=small
    ).runs(tmp_path)
    runs = [first, second, fewer, other]
    assert len(workers.batch_files(first.point.recipe.images)) == 3  # 8, 8 and 4
    maker = type("Worker", (), {"run": first})
    pick = lambda *pending: workers._next(pending, [maker], runs)  # noqa: E731
    assert pick(second, fewer) is None and pick(second, fewer, other) is other
    touch_images(first, 1)
    assert pick(second, fewer) is fewer, "its only batch is there"
    touch_images(first, 3)
    assert pick(second, fewer) is second
    for run in (second, fewer, other):
        workers._share_images(run, runs)
    names = [sorted(file.name for file in run.path.glob("images/*/*")) for run in runs]
    assert names[1] == names[0] and names[2] == names[0][:1] and names[3] == []
    assert os.path.samefile(next(second.path.glob("images/*/*0x8*")), next(first.path.glob("images/*/*0x8*")))


def test_at_most_so_many_at_a_time_and_none_twice(tmp_path):
    runs = plan("student.epsilon=0.01,0.02,0.03,0.04,0.05", overrides=["images.count=8", "images.batch_size=8"]).runs(
        tmp_path
    )
    script = "import sys,time; time.sleep(0.3); sys.exit('zsq-fast: error: no luck' if '0.03' in sys.argv[1] else 0)"
    for run in runs:
        touch_images(run, 1)
    spans, failed = {}, {}

    def ended(run, failure):
        spans[run.label] = (spans[run.label], time.monotonic())
        failed[run.label] = failure

    command = lambda run: [sys.executable, "-S", "-c", script, run.label]  # noqa: E731
    began = lambda run: spans.update({run.label: time.monotonic()})  # noqa: E731
    assert workers.work(runs, runs, 2, command, began, ended) is None
    assert {label: text for label, text in failed.items() if text} == {"student.epsilon=0.03, seed 0": "no luck"}
    moments = [begin for begin, _ in spans.values()]
    together = [sum(begin <= moment < end for begin, end in spans.values()) for moment in moments]
    assert len(spans) == 5 and max(together) == 2


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_ends_every_process_and_fails_no_run(tmp_path, signals):
    runs = plan("student.epsilon=0.01,0.02,0.03", overrides=["images.count=8", "images.batch_size=8"]).runs(tmp_path)
    ended, commands = [], []

    def command(run):
        touch_images(run, 1)
        commands.append(run)
        return [sys.executable, "-S", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]

    def began(run):
        if len(commands) == 2:
            wait(lambda: all(run.log.read_text() for run in commands))
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)

    def work():
        return workers.work(runs, runs, 2, command, began, lambda *run: ended.append(run))

    if signals == 1:
        assert work() == signal.SIGINT
    else:
        with pytest.raises(KeyboardInterrupt):
            work()
    assert len(commands) == 2 and not ended
    for run in commands:
        with pytest.raises(ProcessLookupError):
            os.kill(int(run.log.read_text()), 0)


def test_a_killed_process_is_a_failure(tmp_path):
    (run,) = plan("student.epsilon=0.01").runs(tmp_path)
    failed = []
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    command = lambda run: [sys.executable, "-S", "-c", script]  # noqa: E731
    workers.work([run], [run], 1, command, lambda run: None, lambda run, failure: failed.append(failure))
    assert failed == ["the process was killed by signal 9, perhaps for want of memory."]


def results(made: Plan, out: Path, accuracy) -> dict:
    """What sweep.json would hold; `accuracy(values, seed)` None: failed."""
    found = collect(made, made.runs(out), {})
    assert all(run["state"] == "not begun" for point in found["points"] for run in point["runs"])
    for point in found["points"]:
        for run in point["runs"]:
            value = accuracy(point["values"], run["seed"])
            run |= {
                "state": "done" if value is not None else "failed",
                "last": value,
                "error": "it broke" if value is None else None,
            }
        point["last"] = _spread([run["last"] for run in point["runs"]])
    return found


def drawn(sweep):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from zsq_fast.cli.sweep.plot import draw

    draw(sweep, figure)
    return figure


def test_a_line_per_option_with_error_bars(tmp_path):
    made = plan(
        "student.feature_weight=4000,100,1000", "student.promote_by=kl,kl+fa",
        one_at_a_time=True, seeds=[0, 1], eval_data="x",
    )  # fmt: skip
    sweep = results(
        made,
        tmp_path,
        lambda values, seed: (
            None if values["student.promote_by"] == "kl" and seed else values["student.feature_weight"] / 100 + seed
        ),
    )
    weight, promote = drawn(sweep).axes
    (line, *_), own = weight.containers[0], weight.lines[-1]
    assert line.get_xdata().tolist() == [100, 1000, 4000] and line.get_ydata().tolist() == [1.5, 10.5, 40.5]
    assert weight.get_xscale() == "log" and list(own.get_ydata()) == [10.5]
    bars = weight.containers[0][2][0].get_segments()
    assert [(high - low) / 2 for (_, low), (_, high) in bars] == pytest.approx([statistics.stdev([0, 1])] * 3)
    assert [text.get_text() for text in promote.get_xticklabels()] == ["kl+fa", "kl"]
    assert promote.containers[0][0].get_ydata().tolist() == [10.5, 10.0], "of the seed that did not fail"
    assert "a run failed" in {text.get_text() for text in promote.get_legend().get_texts()}
    assert "failed: student.promote_by=kl, seed 1: it broke" in table(sweep) and "1/2, 1 failed" in table(sweep)


def test_a_heat_map_of_two_options(tmp_path):
    made = plan("student.epsilon=0.005,0.01", "images.hard_gamma=0,1,2", eval_data="x")
    sweep = results(
        made,
        tmp_path,
        lambda v, _: None if v["images.hard_gamma"] == 1 else 80 + v["images.hard_gamma"] + 100 * v["student.epsilon"],
    )
    axes, _ = drawn(sweep).axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[80.5, -1, 82.5], [81.0, -1, 83.0]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.005", "0.01"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["80.50", "failed", "82.50", "81.00", "failed", "83.00"]
    (frame,) = axes.patches
    assert (frame.get_x(), frame.get_y()) == (1.54, 0.54), "the recipe's own values: gamma 2, epsilon 0.01"


def test_a_line_through_a_grid_of_three_options(tmp_path):
    made = plan("student.epsilon=0.005,0.01", "images.hard_gamma=1,3", "student.feature_weight=100,1000", eval_data="x")
    sweep = results(made, tmp_path, lambda v, _: v["images.hard_gamma"] + v["student.feature_weight"] / 1000)
    axes = drawn(
        sweep
    ).axes  # gamma 2, the recipe's own, is not in the grid: the others' lines are those of the first point
    lines = [panel.containers[0][0].get_ydata().tolist() for panel in axes]
    assert lines == [[1.1, 1.1], [2.0, 4.0], [1.1, 2.0]]
    titles = [panel.get_title() for panel in axes]
    assert titles == [
        "at images.hard_gamma 1, student.feature_weight 100",
        "",
        "at student.epsilon 0.005, images.hard_gamma 1",
    ]


def test_without_test_images_the_agreement_is_shown(tmp_path):
    sweep = collect(made := plan("student.epsilon=0.01"), made.runs(tmp_path), {})
    assert sweep["measure"] == "held_out_agreement" and "accuracies need real test images" in table(sweep)
    assert "agreement" in drawn(sweep).axes[0].get_ylabel()


def test_costs_differ_by_counts_and_switches_alone():
    made = plan("student.epsilon=0.01,0.02", "images.count=256,512", "student.feature_weight=0,1,2")
    kinds = [cost._kind(point.recipe) for point in made.points()]
    assert len(set(kinds)) == 4 and len(kinds) == 12


def test_dry_run_counts_what_is_left(capsys, tiny, swept, tmp_path):
    given = words(tiny, tmp_path / "out", "--vary", "student.epsilon=0.01,0.02", "--seeds", 0, 1, 2, "--dry-run")
    code, text, err = call(capsys, *given, "--jobs", 2, "--json")
    assert code == 0, err
    found = json.loads(text)["estimate"]
    assert found["runs"] == 6 and found["image_sets"] == 3 and found["seconds"] > found["image_seconds"] > 0
    assert not (tmp_path / "out").exists()
    code, text, err = call(capsys, "sweep", swept, "--dry-run", "--allow-import")
    assert code == 0 and "4 runs, 0 of them to do" in text, err
