"""`zsq-fast env`: a report that says what runs natively, and how to get what does not."""

from __future__ import annotations

import json

import pytest
import torch

from zsq_fast import _build, ops
from zsq_fast.cli import env, main
from zsq_fast.ops import library


def test_required_kernels_are_built() -> None:
    """CI names in ZSQ_REQUIRE_KERNELS what its machine can build: a kernel that is missing there is a failure."""
    if not (required := _build.required_kernels()):
        pytest.skip("ZSQ_REQUIRE_KERNELS is not set")
    status = _build.kernel_status()
    assert {d: status[d]["reason"] for d in required if not status[d]["built"]} == {}


def test_report_agrees_with_the_dispatcher() -> None:
    data = env.report()
    assert data["torch"] == torch.__version__
    for device, status in data["kernels"].items():
        assert status["built"] == (ops.backends()[device] == "native")
        assert status["built"] == (status["reason"] is None) == (status["fix"] is None)
    assert (data["cpu_isa"] is not None) == data["kernels"]["cpu"]["built"]


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for device, status in data["kernels"].items():
        if status["built"]:
            assert f"kernels {device}: yes" in text
        else:
            assert f"kernels {device}: no ({status['reason']})\n  to build them: {status['fix']}" in text


def test_missing_kernel_comes_with_the_preparing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "kernels": {"cpu": False, "cuda": False},
        "reasons": {"cpu": "no C++ compiler"},
        "steps": {"cpu": "install g++"},
    }
    monkeypatch.setattr(_build, "build_info", lambda: info)
    monkeypatch.setattr(_build, "_load", lambda: (None, "no C++ compiler"))
    status = _build.kernel_status()["cpu"]
    assert status["reason"] == "no C++ compiler"
    assert status["fix"].startswith("install g++, then: pip install")


def test_missing_kernels_raise_with_reason_and_remedy(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = library._missing("cuda", "fake_quant_weight", {"reason": "none built", "fix": "pip install it"})
    with pytest.raises(NotImplementedError, match=r"fake_quant_weight: no cuda kernels.*none built.*pip install it"):
        run(torch.randn(3, 5), 4)
    monkeypatch.setattr(env, "report", run)  # on the command line: one sentence and an exit code of its own
    assert main(["env"]) == 6
    assert "error: fake_quant_weight: no cuda kernels here" in capsys.readouterr().err
