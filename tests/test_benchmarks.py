"""The programs behind the committed records, where they decide something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import call, make_tiny
from networks import residual
from report_support import quantize

import zsq_fast as zsq

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as main_program
from benchmarks import analyses, cases, cifar10, imagenet, record, shapes, table, tracking
from benchmarks.__main__ import below_gate, measure, row
from benchmarks.cases import Case


@pytest.mark.parametrize("name", [*cifar10.TABLES, *cifar10.SWEEPS, "additions"])
def test_students_of_an_ablation_differ(name):
    students = cifar10.ablation(name)
    recipes = [
        zsq.load_recipe("hast", input_size=(3, 32, 32), schedule="short", overrides=overrides)
        for overrides, _ in students.values()
    ]
    assert len(set(recipes)) == len(recipes) >= 2
    assert all((published is not None) == (name in cifar10.TABLES) for _, published in students.values())


def test_rounds_go_on_until_a_second_has_passed():
    calls = {"kernel": 0, "reference": 0}

    def count(name):
        return lambda: calls.__setitem__(name, calls[name] + 1)

    case = Case("x", 1, 1, {name: count(name) for name in calls}, gates={"reference": 1e9})
    samples = measure(case, 2, "cpu", cold=False, fresh=False)
    assert {len(v) for v in samples.values()} == {400}  # the most
    assert calls == {
        "kernel": 2 * 403,
        "reference": 2 * 403,
    }  # three rounds to warm up, every timed call behind one that is not
    assert len(measure(case, 2, "cpu", cold=False, fresh=False, least=0)["kernel"]) == 2
    more = measure(case, 2, "cpu", cold=False, fresh=False, least=0, before=samples)
    assert {name: seconds[:400] for name, seconds in more.items()} == samples and len(more["kernel"]) == 402
    (message,) = below_gate(row(case, samples))
    assert message.startswith("x: ") and "the gate is 1e+09" in message


@pytest.mark.parametrize("quiet_from, status", [(3, 0), (99, 1)])
def test_a_gate_waits_for_a_quiet_machine(quiet_from, status, monkeypatch, capsys):
    """A kernel that was disturbed holds its gate with the rounds of a quiet moment; one that never holds it fails after its patience."""
    asked: list[int] = []

    def measured(case, *_):
        asked.append(len(asked) + 1)
        return {"kernel": [1.0 if len(asked) >= quiet_from else 5.0], "reference": [10.0]}

    monkeypatch.setattr(main_program, "CASES", [lambda device: Case("x", 1, 1, {}, gates={"reference": 5})])
    monkeypatch.setattr(main_program, "measure", measured)
    monkeypatch.setattr(main_program, "PAUSE", 0)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--gate"])
    assert main_program.main() == status
    assert len(asked) == (quiet_from if status == 0 else 1 + main_program.PATIENCE)
    assert ("1 gates hold" in capsys.readouterr().out) == (status == 0)


def test_a_gate_without_cases_does_not_hold(monkeypatch, capsys):
    monkeypatch.setattr(main_program, "CASES", [lambda device: Case("x", 1, 1, {}, gates={"reference": 5})])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--gate", "--only", "nosuch"])
    assert main_program.main() == 1 and "no case with a gate" in capsys.readouterr().out


def test_cases_of_a_gpu_and_of_layers_run(monkeypatch):
    """At small sizes and without torch.compile: every variant of every case, and what the gates of the streaming kernels mean."""
    monkeypatch.setattr(cases, "STAGE_1", (2, 16, 8, 8))
    monkeypatch.setattr(cases, "NARROW", (2, 16, 6, 6))
    monkeypatch.setattr(cases, "ACTIVATIONS", {"narrow": (2, 16, 8, 8)})
    monkeypatch.setattr(cases, "WEIGHTS", {"depthwise": (8, 1, 3, 3)})
    monkeypatch.setattr(cases, "NETWORKS", {"ResNet-50": [(8, 3, 3, 3), (10, 8)]})
    small = [[scale * torch.randn(8, 3, 3, 3) for _ in range(2)] for scale in (0.02, 1e-3, 1e-3)]
    monkeypatch.setattr(
        cases, "network_inundation_case", lambda device: cases._inundation("gradient inundation, small", *small)
    )
    large, layers = list(cases.gpu_cases("cpu")), [make("cpu") for make in cases.layer_cases()]
    for case in [*large, *layers]:
        case.variants.pop("compile", None)
        for run in case.variants.values():
            case.before()
            run()
    assert len(large) == 22 and all(case.gates for case in large) and not any(case.gates for case in layers)
    by_name = {case.name.rpartition(", ")[0]: case for case in large}
    assert by_name["BN + ReLU + fake quantization, forward"].gates == {"copy": 0.85, "aten": 2.8}
    backward = by_name["BN + ReLU + fake quantization, backward with affine gradients"]
    assert backward.gates == {"copy": pytest.approx(0.85 * 8 / 12.125, rel=1e-3), "aten": 3.0}


@pytest.mark.parametrize(
    "network, name", [("ResNet-18", "resnet18"), ("ResNet-50", "resnet50"), ("MobileNetV2", "mobilenet_v2")]
)
def test_weights_of_the_networks_are_theirs(network, name):
    with torch.device("meta"):
        built = getattr(pytest.importorskip("torchvision.models"), name)()
    assert sorted(shapes.NETWORKS[network]) == sorted(tuple(p.shape) for p in built.parameters() if p.dim() > 1)


def test_imagenet_goes_on_where_it_stopped_and_is_shown(tmp_path, monkeypatch):
    asked, broken = [], {"gdfq"}

    def run(command, **_):
        pair = command[-2:]
        asked.append(pair[1])
        row = {"minutes_per_1000": {"generator steps": 12.3, "student steps": 45.6}, "peak_bytes": 3 << 30}
        failed = pair[1] in broken
        return subprocess.CompletedProcess(command, int(failed), "" if failed else json.dumps(row), "a\nKilled")

    monkeypatch.setattr(imagenet.subprocess, "run", run)
    monkeypatch.setattr(imagenet.record, "environment", lambda: {"threads": 1, "cores": 2, "torch": "2.15"})
    out = tmp_path / "imagenet_minutes.json"
    monkeypatch.setattr(sys, "argv", ["imagenet", "--models", "m", "--recipes", "ait", "gdfq", "--json", str(out)])
    assert imagenet.main() == 1 and asked == ["ait", "gdfq"]
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert "| ait | - / 12 / 46; 3.0 GiB |" in table.imagenet() and "| gdfq | failed |" in table.imagenet()
    broken.clear()
    assert imagenet.main() == 0 and asked == ["ait", "gdfq", "gdfq"]
    assert "failed" not in table.imagenet()


@pytest.mark.parametrize("recipe", ["ait", "hast"])
def test_tracking_is_timed_against_the_same_student_without(recipe, monkeypatch):
    clocks: list[tracking.Clock] = []
    make, observed = tracking.Clock, []
    monkeypatch.setitem(tracking.TRACKING, "cosine", {"track_cosine": 1})
    monkeypatch.setattr("zsq_fast.methods.cosine.CosineTracker.observe", lambda self, batch: observed.append(batch))
    monkeypatch.setattr(tracking, "Clock", lambda: clocks.append(make()) or clocks[-1])
    rows = tracking.measure(residual(), recipe, 2)
    assert [row["tracking"] for row in rows] == ["none", "again", "cosine", "updates"]
    assert rows[0]["added_percent"] == 0 and all(row["seconds_per_step"] > 0 for row in rows)
    assert rows[3]["alone_percent"] > 0
    for clock in clocks:  # float, range calibration, the end
        assert len(clock.noted) == 3 and clock.noted[0] == 0 < clock.noted[1] < clock.trainer.state.seconds
    assert [clock.trainer.track_cosine for clock in clocks] == [0, 0, 1, 0] and len(observed) == 2
    assert [clock.trainer.updates is None for clock in clocks] == [True, True, True, False]


def test_analysed_runs_become_records_pictures_and_tables(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    tiny, results, pictures = make_tiny(tmp_path), tmp_path / "results", tmp_path / "pictures"
    tracked = ("--eval-data", tiny.images, "--track-cosine", "1", "--track-updates")
    runs = [quantize(tiny, tmp_path / recipe, recipe, *tracked) for recipe in ("kl_only", "ait")]
    for run in runs:
        code, _, err = call(capsys, "analyze", run, "--allow-import", "--images", 8, "--what", "hessian", "updates")
        assert code == 0, err
    arguments = [*map(str, runs), "--out", str(results), "--pictures", str(pictures)]
    monkeypatch.setattr(sys, "argv", ["analyses", *arguments])
    analyses.main()
    for path in results.glob("analyses_*"):
        assert str(tmp_path) not in path.read_text()  # folders of this machine
    rows = [
        {"recipe": "ait", "tracking": t, "seconds_per_step": 0.2, "added_percent": i}
        for i, t in enumerate(tracking.TRACKING)
    ]
    record.write(results / "tracking_x.json", {"cosine_every": 20, "updates_every": 200, "rows": rows})
    for path in results.glob("analyses_*"):  # the page shows these alone
        path.rename(results / re.sub(r"_.*tiny_(.*)_w3a4_", r"_resnet20_\1_w3a3_", path.name))
    monkeypatch.setattr(table, "RESULTS", results)
    text = table.analyses()
    _, held = analyses.read(runs[1])
    kl = held["hessian"]["losses"]["kl"]
    assert (
        f"| AIT | KL | {kl['trace']['mean']:.3g} | {kl['trace']['standard_error']:.3g} | {kl['top']['values'][0]:.3g} |"
        in text
    )
    cosines = [r["cosine"]["ce-kl"]["total"] for r in held["history"] if "cosine" in r]
    assert (
        f"| AIT | CE and KL | {cosines[0]:+.3f} | {cosines[-1]:+.3f} | {sum(c < 0 for c in cosines)} of {len(cosines)} |"
        in text
    )
    last = held["history"][-1]
    assert f"| AIT | {last['epoch'] + 1} | {100 * min(last['net_update_ratio']):.3g} |" in text
    assert "| ait | 200 ms | +1.0 % | +2.0 % | +3.0 % |" in text
    drawn = re.findall(r"\(pictures/(.*?)\)", text)
    assert len(drawn) == 6 == len(list(pictures.glob("*.png")))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.glob("*.png"))
    assert all((results / name).exists() for name in re.findall(r"results/(.*?)\)", text))


def test_a_record_is_its_json_with_lists_of_numbers_on_one_line(tmp_path):
    values = {"samples": [1e-05, 2.5, -3, 4], "text": "[1,\n 2]", "names": ["a", "b"], "nested": [[1, 2], [3]]}
    record.write(tmp_path / "r.json", values)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == values and "[ 1e-05, 2.5, -3, 4 ]" in text
