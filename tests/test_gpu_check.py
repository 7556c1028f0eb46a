"""`make gpu-check` rehearsed without a GPU: the plan, a step that runs, one that fails, one that is skipped, the report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def check(*words: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words, *(["--out", str(out)] if out else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_plan_names_programs_and_files_that_exist():
    done = check("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (
        list(lines)[:3] == ["build", "every operation", "tests"] and sum("compute-sanitizer" in k for k in lines) == 4
    )
    for command in lines.values():
        for word in command.split():
            if word.endswith((".py", ".toml", ".safetensors")) and not command.startswith("skipped"):
                assert Path(word).exists(), word


def test_steps_run_and_are_reported(tmp_path):
    done = check("--device", "cpu", "--only", "every", "compute-sanitizer mem", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    ran, skipped = report["steps"]
    assert (
        ran["outcome"] == "passed"
        and ran["seconds"] > 0
        and "operations ran on cpu" in (tmp_path / "every_operation.log").read_text()
    )
    assert skipped["outcome"] == "skipped" and "needs a GPU" in skipped["why"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (
        report["machine"]["torch"] == torch.__version__ and report["machine"]["commit"].removesuffix("-dirty") == head
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", found)
    spec.loader.exec_module(found)
    monkeypatch.setattr(found, "SITE", tmp_path / "site")
    return found


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("sleep 9", 124), (None, 127)])
def test_a_failing_step_is_told(tmp_path, monkeypatch, module, command, code, capsys):
    words = ["bash", "-c", command] if command else [str(tmp_path / "nothing")]
    monkeypatch.setattr(
        module, "steps", lambda *_: [module.Step("broken", words, 0.1), module.Step("next", ["true"], 9)]
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(tmp_path)])
    assert module.main() == 1
    outcomes = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert [o["outcome"] for o in outcomes] == ["failed", "passed"] and outcomes[0]["exit_code"] == code
    assert "failed" in capsys.readouterr().out


def test_a_gpu_sees_more_than_2_31_elements(tmp_path, module):
    (large,) = [step for step in module.steps("cuda", tmp_path) if "test_large" in " ".join(step.command)]
    assert large.command[-3:-1] == ["-k", "cuda"]


def test_what_comes_after_the_limit_fails(tmp_path, monkeypatch, module):
    wait = ["bash", "-c", "sleep 9"]
    monkeypatch.setattr(module, "steps", lambda *_: [module.Step("long", wait, 9), module.Step("next", ["true"], 9)])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(tmp_path), "--limit", "0.5"])
    assert module.main() == 1
    long, after = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert long["exit_code"] == 124 and long["seconds"] < 5
    assert (after["outcome"], after["why"]) == ("failed", "no time left")


def test_a_skipped_step_on_a_gpu_is_no_success(tmp_path, monkeypatch, module):
    steps = [module.Step("there", ["true"], 9), module.Step("not there", ["true"], 9, lacks="no sanitizer")]
    monkeypatch.setattr(module, "steps", lambda *_: steps)
    monkeypatch.setattr(module, "machine", lambda device: {"device": device})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert module.main() == 2
