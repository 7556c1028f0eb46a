"""The command line: help, results on stdout, exit codes, one line for whatever goes wrong."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import types

import pytest
from cli_support import ENVIRONMENT, SIZE, assert_one_sentence, call, make_tiny

from zsq_fast import errors
from zsq_fast.cli import VERBS
from zsq_fast.runs import RunDir


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_help_names_every_verb(capsys):
    code, out, err = call(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)
    assert call(capsys)[0] == 2


@pytest.mark.parametrize(
    "verb", ["quantize", "synthesize", "resume", "evaluate", "analyze", "watch", "reproduce", "sweep", "recipes", "env"]
)
def test_help_of_each_verb(capsys, verb):
    code, out, err = call(capsys, verb, "--help")
    assert (code, err) == (0, "") and f"usage: zsq-fast {verb}" in out


def test_as_a_module():
    command = [sys.executable, "-m", "zsq_fast.cli", "quantise"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "Did you mean 'quantize'?" in assert_one_sentence(result.stderr)


def test_help_and_typing_errors_do_not_wait_for_torch():
    script = "import sys; from zsq_fast.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for words, code in (
        (["--version"], 0),
        (["quantize", "--help"], 0),
        (["reproduce", "--list", "hast"], 0),
        (["reproduce", "x/y/z"], 2),
        (["evaluate", "x", "--dta", "y"], 2),
        (["analyze", "x", "--what", "leyers"], 2),
        (["watch", "x", "--interval", "0"], 2),
        (["sweep", "x", "--recipe", "hast", "--vary", "student.epsilon"], 2),
    ):
        command = [sys.executable, "-c", script, *words]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == f"{code} False", result.stderr


def test_recipes_and_env_print_json(capsys):
    code, out, _ = call(capsys, "recipes", "--json")
    assert code == 0 and {"gdfq", "ait"} <= json.loads(out).keys()
    code, out, _ = call(capsys, "recipes")
    assert code == 0 and "gdfq" in out
    code, out, _ = call(capsys, "env", "--json")
    assert code == 0 and "torch" in json.loads(out)


def test_evaluate_a_model(capsys, tiny):
    words = ("evaluate", *tiny.model, "--data", tiny.images, "--batch-size", 7)
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    result = json.loads(out)["float"]
    assert result["count"] == 40 and 0 <= result["top1"] <= result["top5"] <= 100
    code, out, _ = call(capsys, *words, "--limit", 10)
    assert code == 0 and "10 images" in out


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, tiny, tmp_path):
    out_dir = tmp_path / "run"
    words = ("quantize", *tiny.model, "--recipe", "ait", "-w", 3, "-a", 5, "--dry-run", "--out", out_dir)
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "79200 x " in out and "in all" in out and "peak resident memory" in out
    assert "2 conv at 3 bits" in out and "2 act at 5 bits" in out
    code, out, _ = call(capsys, *words, "--json")
    plan = json.loads(out)
    assert plan["network"]["weight_tensors"] == 3 and plan["job"]["input_size"] == [3, 8, 8]
    assert plan["recipe"]["quant"]["weight_bits"] == 3
    assert plan["images"] == 400 * 200 * 200 and plan["student_steps"] == 396 * 200
    cost = plan["estimate"]
    assert {s["name"]: s["count"] for s in cost["stages"]}["student steps"] == 396 * 200 and cost["runs"] == 1
    assert cost["seconds"] == pytest.approx(sum(s["count"] * s["seconds_each"] for s in cost["stages"]))
    assert not out_dir.exists()


def test_dry_run_looks_for_no_bits(capsys, tiny, monkeypatch):
    monkeypatch.setattr("zsq_fast.methods.mixed.sensitivity", lambda *_, **__: pytest.fail("it ran"))
    words = ("quantize", *tiny.model, "--recipe", "zeroq_mixed", "-w", 4, "-a", 4, "--dry-run", "--threads", 1)
    words += ("--set", "images.batch_size=8", "--set", "images.count=8")
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "iterations of images to find bits" in out and "forward passes to find bits" in out
    assert "bits: found for every layer by a search when a run begins, 4 on average; shown as if all had 4" in out
    code, out, _ = call(capsys, *words, "--json")
    plan = json.loads(out)
    assert plan["bits_by_search"] and plan["recipe"]["quant"]["layer_bits"] == []
    assert "forward passes to find bits" in {stage["name"] for stage in plan["estimate"]["stages"]}
    code, out, _ = call(capsys, *words, "--json", "--set", "quant.layer_bits=['0=4','3=4','8=4']")
    plan = json.loads(out)
    assert not plan["bits_by_search"] and "to find bits" not in json.dumps(plan["estimate"])


def test_what_stays_float_is_listed(capsys, tiny):
    words = ("quantize", *tiny.spec("with_silu"), "--recipe", "gdfq", "-w", 4, "-a", 4, "--dry-run")
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "SiLU" in out and "only nn.ReLU" in out


def fail_with(monkeypatch, error):
    def run(words):
        raise error

    module = types.ModuleType("failing_verb")
    module.run = run
    monkeypatch.setitem(sys.modules, "failing_verb", module)
    monkeypatch.setitem(VERBS, "fail", ("failing_verb", ""))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.UsageError("a\nb"), 2, "error: a b"),
        (errors.UnsupportedModelError("x"), 3, "x"),
        (errors.BadFileError("x"), 4, "x"),
        (errors.TrainingError("x"), 5, "x"),
        (errors.LimitError("x"), 7, "x"),
        (errors.StorageError("x"), 74, "x"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), 74, "no space left on the disk of /some/file"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 1, "--set schedule.batch_size=N"),
        (SystemExit("from the user's code"), 1, "unexpected SystemExit: from the user's code"),
        (KeyError("boom"), 1, "unexpected KeyError: 'boom' (--debug shows the traceback)"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(capsys, monkeypatch, error, code, text):
    fail_with(monkeypatch, error)
    found, out, err = call(capsys, "fail")
    assert (found, out) == (code, "") and text in assert_one_sentence(err)
    found, _, err = call(capsys, "fail", "--debug")
    assert found == code and "Traceback" in err and "in run" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (errors.Interrupted("saved"), 130), (errors.Interrupted("saved", 15), 143)],
)
def test_interruptions_are_no_errors(capsys, monkeypatch, error, code):
    fail_with(monkeypatch, error)
    found, _, err = call(capsys, "fail")
    assert found == code and len(err.splitlines()) == 1 and "error" not in err


def test_closed_pipe_is_silent(tiny):
    command = f"'{sys.executable}' -m zsq_fast.cli --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stderr == "" and int(result.stdout) in (0, 141)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_errors(closed):
    command = f"'{sys.executable}' -m zsq_fast.cli recipes {closed}"
    result = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_evaluate_takes_no_checkpoint_for_a_run(capsys, tiny, tmp_path):
    RunDir.create(tmp_path / "run", {}, {}).close()
    words = ("evaluate", tmp_path / "run", "--data", tiny.images, "--checkpoint", tiny.checkpoint)
    code, _, err = call(capsys, *words)
    assert code == 2 and "--checkpoint" in assert_one_sentence(err)


def test_size_is_also_read_from_the_command_line(capsys, tiny):
    words = ("quantize", *tiny.model, "--recipe", "ait", "-w", 4, "-a", 4, "--dry-run", "--json")
    code, out, _ = call(capsys, *words, "--input-size", SIZE.replace("8", "16"))
    assert code == 0 and json.loads(out)["job"]["input_size"] == [3, 16, 16]
