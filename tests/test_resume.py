"""A run that was killed or stopped and then resumed ends in the very bits of one that never was (CPU)."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from cli_support import SHORT, Tiny, assert_one_sentence, call, make_tiny, schedule, start

from zsq_fast.runs import RunDir

EPOCHS, ITERATIONS = 7, 40
RUN = [*schedule(epochs=EPOCHS, warmup_epochs=2, calibration_epochs=1, iterations=ITERATIONS, batch_size=8)]
RUN += [*schedule(milestones="[3,5]"), "--threads", "1", "--seed", "3", "--quiet"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny: Tiny, recipe: str, out: Path, *extra: object) -> list[object]:
    data = ["--eval-data", tiny.images]
    return ["quantize", *tiny.model, "--recipe", recipe, "-w", 3, "-a", 4, "--out", out, *data, *RUN, *extra]


def stop(process, run: Path, number: signal.Signals, epochs: int) -> str:
    """Sends the signal once `epochs` more epochs are recorded; returns stderr of the ended process."""
    metrics = run / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    began, deadline = lines(), time.monotonic() + 300
    while lines() < began + epochs:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert not (run / "student.safetensors").exists(), "it had already finished: the test is too slow"
    return err


def contents(run: Path) -> dict[str, object]:
    """Everything of a finished run that must not depend on its history."""
    last = max((run / "checkpoints").iterdir())
    result = json.loads((run / "result.json").read_text())
    return {
        "student": (run / "student.safetensors").read_bytes(),
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "result": {key: value for key, value in result.items() if key not in ("minutes", "student")},
        **{path.name: path.read_bytes() for path in last.glob("*.safetensors")},
        "step": last.name,
    }


def assert_same_end(capsys, tiny, recipe, run, tmp_path):
    code, _, err = call(capsys, *words(tiny, recipe, tmp_path / "uninterrupted"))
    assert code == 0, err
    expected, found = contents(tmp_path / "uninterrupted"), contents(run)
    assert expected["step"] == f"step-{EPOCHS * ITERATIONS:08d}"
    assert expected["metrics"].count(b"\n") == EPOCHS
    assert len(expected) >= 8, "student, generator, meters, optimizers"
    assert found.keys() == expected.keys()
    different = [key for key in expected if found[key] != expected[key]]
    assert not different


def test_killed_twice_with_a_damaged_checkpoint(capsys, tiny, tmp_path):
    run = tmp_path / "run"
    process = start(*words(tiny, "ait", run))
    stop(process, run, signal.SIGKILL, 2)
    assert process.returncode == -signal.SIGKILL
    code, _, err = call(capsys, *words(tiny, "ait", run))
    assert code == 2 and f"zsq-fast resume {run}" in assert_one_sentence(err)

    process = start("resume", run, "--allow-import", "--quiet")
    stop(process, run, signal.SIGKILL, 2)
    newest = max((run / "checkpoints").glob("step-*"))
    damaged = bytearray((newest / "student.safetensors").read_bytes())
    damaged[-1] ^= 4
    (newest / "student.safetensors").write_bytes(damaged)

    process = start("resume", run, "--allow-import", "--quiet")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"step {int(newest.name[5:])}" in err and "skipped" in err
    assert "last epoch" in out
    assert_same_end(capsys, tiny, "ait", run, tmp_path)

    code, again, _ = call(capsys, "resume", run)
    assert (code, again) == (0, out)  # a finished run only prints its result
    result = json.loads((run / "result.json").read_text())
    code, accuracy, err = call(capsys, "evaluate", run, "--allow-import", "--data", tiny.images, "--json")
    assert code == 0, err
    accuracy = json.loads(accuracy)
    assert {name: accuracy[name]["top1"] for name in accuracy} == {
        "float": result["top1"]["float"],
        "quantized": result["top1"]["last"],
        "chosen": result["top1"]["chosen"],
    }


def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(capsys, tiny, tmp_path):
    run = tmp_path / "run"
    process = start(*words(tiny, "gdfq", run))
    err = stop(process, run, signal.SIGINT, 1)
    assert process.returncode == 130, err
    assert f"zsq-fast resume {run} --allow-import" in err.splitlines()[-1] and "Traceback" not in err
    saved = [int(path.name[5:]) for path in (run / "checkpoints").iterdir()]
    assert f"step {max(saved)} " in err.splitlines()[-1]

    code, _, err = call(capsys, "evaluate", run, "--allow-import", "--data", tiny.images)
    assert code == 4 and "not finished" in assert_one_sentence(err)

    process = start("resume", run, "--allow-import", "--quiet")
    err = stop(process, run, signal.SIGTERM, 2)
    assert process.returncode == 143 and f"zsq-fast resume {run}" in err

    code, _, err = call(capsys, "resume", run, "--allow-import", "--quiet")
    assert code == 0, err
    assert_same_end(capsys, tiny, "gdfq", run, tmp_path)


def unfinished(capsys, tiny: Tiny, run: Path, *extra: object) -> None:
    """A run that stopped with its result still to be written."""
    code, _, err = call(capsys, "quantize", *tiny.model, "--recipe", "ait", "--out", run, *SHORT, *extra)
    assert code == 0, err
    (run / "result.json").unlink()


def test_resume_refuses_other_weights(capsys, tmp_path):
    tiny, run = make_tiny(tmp_path), tmp_path / "run"
    unfinished(capsys, tiny, run)
    good = tiny.checkpoint.read_bytes()
    tiny.checkpoint.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 4 and "SHA-256" in assert_one_sentence(err)
    tiny.checkpoint.unlink()
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 4 and tiny.checkpoint.name in assert_one_sentence(err)
    tiny.checkpoint.write_bytes(good)
    tiny.source.write_text(
        tiny.source.read_text().replace("nn.Linear(8, num_classes)", "nn.Linear(8, num_classes, False)")
    )
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 4, err


@pytest.mark.parametrize("verb", ["resume", "evaluate"])
def test_a_run_directory_gives_no_consent_of_its_own(capsys, tmp_path, verb):
    """Whoever wrote the directory also wrote its manifest."""
    tiny, run = make_tiny(tmp_path), tmp_path / "run"
    unfinished(capsys, tiny, run)
    tiny.source.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + tiny.source.read_text())
    words = [verb, run, *(["--data", tiny.images] if verb == "evaluate" else [])]
    code, _, err = call(capsys, *words)
    assert code == 2 and "--allow-import" in assert_one_sentence(err) and not (tmp_path / "executed").exists()
    code, _, err = call(capsys, *words, "--allow-import")
    assert code == 0 and (tmp_path / "executed").exists(), err


def test_a_relative_factory_is_found_from_another_directory(capsys, monkeypatch, tmp_path):
    tiny, run = make_tiny(tmp_path), tmp_path / "runs" / "networks.py-tiny-ait-w4a4"
    monkeypatch.chdir(tmp_path)
    words = ["quantize", "networks.py:tiny", *tiny.model[1:], "--recipe", "ait", "-w", 4, "-a", 4, *SHORT]
    code, _, err = call(capsys, *words)
    assert code == 0, err
    (run / "result.json").unlink()
    monkeypatch.chdir(run)
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 0, err


@pytest.mark.filterwarnings("always")
def test_resume_with_another_torch_warns_once(capsys, monkeypatch, tiny, tmp_path):
    run = tmp_path / "run"
    unfinished(capsys, tiny, run)
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 0 and "bit-identical" not in err
    (run / "result.json").unlink()
    monkeypatch.setattr("torch.__version__", "9.8.7")
    code, _, err = call(capsys, "resume", run, "--allow-import")
    assert code == 0 and err.count("9.8.7: the result may not be bit-identical") == 1


@pytest.mark.parametrize("entered", [True, False])
def test_the_result_is_verified(capsys, tiny, tmp_path, entered):
    """A damaged one is refused; one that a kill kept out of the manifest is written again."""
    run = tmp_path / "run"
    unfinished(capsys, tiny, run)
    manifest = (run / "MANIFEST.json").read_text()
    (run / "result.json").write_text("{}")
    if not entered:
        files = {name: entry for name, entry in json.loads(manifest)["files"].items() if name != "result.json"}
        (run / "MANIFEST.json").write_text(json.dumps({"format": 1, "files": files}))
    code, _, err = call(capsys, "resume", run, "--allow-import")
    if entered:
        assert code == 4 and "result.json" in assert_one_sentence(err)
    else:
        assert code == 0 and json.loads((run / "result.json").read_text())["recipe"] == "ait", err


def test_resume_refuses_a_changed_recipe_and_a_second_writer(capsys, tiny, tmp_path):
    run = tmp_path / "run"
    unfinished(capsys, tiny, run)
    with RunDir.open(run):
        code, _, err = call(capsys, "resume", run)
        assert code == 74 and "in use" in assert_one_sentence(err)
    recipe = run / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"temperature": 20', '"temperature": 30'))
    code, _, err = call(capsys, "resume", run)
    assert code == 4 and "recipe.json" in assert_one_sentence(err)


def test_diverging_training_stops_and_writes_no_student(capsys, tiny, tmp_path):
    run = tmp_path / "run"
    extra = ["--set", "student.lr=1e30", *schedule(epochs=4), "--quiet"]
    code, out, err = call(capsys, "quantize", *tiny.model, "--recipe", "gdfq", "--out", run, *SHORT, *extra)
    line = assert_one_sentence(err)
    assert (code, out) == (5, "") and "epoch" in line and "learning rate" in line
    assert not (run / "student.safetensors").exists() and not (run / "result.json").exists()
