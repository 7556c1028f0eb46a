"""The forecast: laws it must find, intervals that must hold, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_support import overlapping

from zsq_fast.analysis import forecast as module
from zsq_fast.analysis.forecast import (
    Calibration,
    Network,
    Outlook,
    Point,
    calibrated_on,
    draw,
    outlook,
    read_points,
)
from zsq_fast.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import forecast as program
from benchmarks import record

CIFAR = Network(269_722, (3, 32, 32), 10)


def made(count: int = 12, noise: float = 0.0, seed: int = 0, by: str = "kl", recipes: int = 6) -> list[Point]:
    """Students whose asinh(drop) is a straight line over the logarithm of KL or of disagreement, which are independent."""
    rng, points = random.Random(seed), []
    for i in range(count):
        bits = 3 + i % 2
        kl, agreement = math.exp(rng.uniform(-4, 0)), 1 - math.exp(rng.uniform(-4, -1))
        x = math.log(kl) if by == "kl" else math.log(1 - agreement + 1e-3)
        drop = math.sinh(3 + 0.6 * x + noise * rng.gauss(0, 1))
        points.append(Point(f"r{i}", f"recipe{i % recipes}", bits, bits, agreement, kl, drop))
    return points


@pytest.mark.parametrize("by", ["kl", "agreement"])
def test_an_exact_law_is_found(by):
    found = Calibration(made(by=by))
    assert by in found.inputs and max(map(abs, found.errors)) < 1e-6
    new = made(20, by=by, seed=9)[-1]
    f = found.forecast(new.agreement, new.kl, (new.weight_bits, new.act_bits))
    assert f.drop == pytest.approx(new.drop) == pytest.approx(f.low) == pytest.approx(f.high)


def test_intervals_hold_what_they_promise():
    """Nine of ten new students, on average over calibrations of as few points as are accepted."""
    inside = total = 0
    widths = []
    for seed in range(40):
        points = made(10 + 12, noise=0.3, seed=seed)
        found = Calibration(points[:10])
        for new in points[10:]:
            f = found.forecast(new.agreement, new.kl, (new.weight_bits, new.act_bits))
            assert f.low < f.drop < f.high
            inside, total = inside + (f.low <= new.drop <= f.high), total + 1
        widths.append(found.margin)
    assert 0.87 < inside / total <= 1
    more = Calibration(made(80, noise=0.3, recipes=20))
    assert more.margin < sum(widths) / len(widths)  # few points: a wide interval
    assert more.margin == pytest.approx(1.645 * 0.3, rel=0.35)  # of normal noise, 90 %


def test_a_recipe_is_left_out_whole():
    """Students of one recipe that all lie off the line by as much: each is forecast from the others only."""
    points = [replace(p, drop=p.drop + 5) if p.recipe == "recipe0" else p for p in made(30)]
    found = Calibration(points)
    residuals = {p.record: math.asinh(p.drop) - y for p, y in found.left_out}
    assert len(residuals) == 30
    off = [residuals[p.record] for p in points if p.recipe == "recipe0"]
    expected = [math.asinh(p.drop) - math.asinh(p.drop - 5) for p in points if p.recipe == "recipe0"]
    assert off == pytest.approx(expected, abs=1e-9)


def test_the_margin_is_a_quantile_of_the_left_out_errors():
    for count, rank in ((10, 10), (19, 18), (29, 27)):  # ceil(0.9 (n + 1))
        found = Calibration(made(count, noise=0.3))
        residuals = sorted(abs(math.asinh(p.drop) - y) for p, y in found.left_out)
        assert found.margin == residuals[rank - 1]


def test_what_lies_beyond_is_named():
    found = Calibration(made())
    inside = found.points[0]
    assert found.forecast(inside.agreement, inside.kl, (3, 3)).beyond == ()
    assert found.forecast(0.1, 9.0, (5, 4)).beyond == ("agreement", "kl", "bits")
    assert found.forecast(1.0, 0.0, (4, 4)).beyond == ("agreement", "kl")  # the logarithms stay finite
    best = replace(inside, agreement=max(p.agreement for p in found.points), kl=min(p.kl for p in found.points))
    assert found.forecast(1.0, 0.0, (4, 4)).drop == found.forecast(best.agreement, best.kl, (4, 4)).drop > 0


def test_another_network_is_beyond_the_calibration(monkeypatch):
    monkeypatch.setattr(module, "calibration", lambda _: Calibration(made(20)))
    p = made(20)[3]
    known = p.agreement, p.kl, (p.weight_bits, p.act_bits), "optimised"
    assert outlook(*known, CIFAR).forecast.beyond == () and "beyond" not in str(
        module.prior((3, 3), "optimised", CIFAR)
    )
    for change, names in (
        ({"parameters": 11_689_512}, ("network",)),
        ({"classes": 100}, ("classes",)),
        ({"input_size": (3, 64, 64), "classes": 200}, ("input size", "classes")),
    ):
        other = replace(CIFAR, **change)
        before, after = module.prior((3, 3), "optimised", other, 1.0), outlook(*known, other)
        assert before.beyond == after.forecast.beyond == names
        text = f"beyond the calibration ({', '.join(names)}): the interval promises nothing here"
        assert text in str(before) and text in str(after) and str(before).count("\n") == 0
    assert module.forecast(0.1, p.kl, (8, 8), "optimised", other).beyond == ("agreement", "bits", *names)


@pytest.mark.parametrize("points", [made(9), made(30, recipes=4), []])
def test_too_few_points(points):
    with pytest.raises(UsageError, match=r"not calibrated for such images: .*`python -m benchmarks\.forecast --write"):
        Calibration(points)


def test_the_outlook_is_checked_against_what_was_measured(monkeypatch):
    monkeypatch.setattr(module, "calibration", lambda _: Calibration(made(20, noise=0.3)))
    p = made(20, noise=0.3)[3]
    found = outlook(p.agreement, p.kl, (p.weight_bits, p.act_bits), "optimised", CIFAR)
    assert isinstance(found, Outlook) and found.measured is None and "measured" not in str(found)
    assert found.forecast == module.forecast(p.agreement, p.kl, (p.weight_bits, p.act_bits), "optimised", CIFAR)
    for measured, word in ((found.forecast.drop, "inside"), (found.forecast.high + 1, "outside")):
        checked = outlook(p.agreement, p.kl, (p.weight_bits, p.act_bits), "optimised", CIFAR, measured)
        assert f"{measured:.2f} points, {word} the interval" in str(checked)
    assert "20 runs of 6 recipes" in str(found) and "error on a recipe left out: mean" in str(found)
    assert "beyond the calibration (bits)" in str(outlook(p.agreement, p.kl, (8, 8), "optimised", CIFAR))
    figure = pytest.importorskip("matplotlib.figure").Figure()
    draw(checked, figure)
    assert overlapping(figure) == []
    assert {"forecast", "measured", "W3A3, calibration"} <= set(figure.axes[0].get_legend_handles_labels()[1])
    assert checked.to_dict()["forecast"]["drop"] == checked.forecast.drop


def test_before_a_run_the_drops_of_the_committed_ones_are_known(monkeypatch):
    points = made(20)
    ablation = replace(points[0], record="x_ablation_y.json a", drop=99.0)
    monkeypatch.setattr(module, "calibration", lambda _: Calibration([*points, ablation]))
    drops = sorted(p.drop for p in points if p.weight_bits == 3)
    found = module.prior((3.0, 3.0), "optimised", CIFAR)
    assert (found.low, found.high, found.runs, found.level) == (drops[0], drops[-1], 10, 9 / 11)
    assert found.drop == pytest.approx((drops[4] + drops[5]) / 2) and "(82% interval; 10 runs at these bits of " in str(
        found
    )
    for measured, word in ((drops[0], "inside"), (drops[-1] + 0.1, "outside")):
        assert str(module.prior((3.0, 3.0), "optimised", CIFAR, measured)).endswith(
            f"; measured {measured:.2f}, {word}"
        )
    with pytest.raises(UsageError, match="0 committed runs at W8A8"):
        module.prior((8, 8), "optimised", CIFAR)


def test_the_interval_before_a_run_holds_what_it_promises(monkeypatch):
    """(n - 1) / (n + 1) of new runs like the n known ones, from their order alone."""
    inside = total = 0
    for seed in range(300):
        points = [replace(p, weight_bits=3, act_bits=3) for p in made(11, noise=0.3, seed=seed)]
        monkeypatch.setattr(module, "calibration", lambda _, known=points[:10]: Calibration(known))
        found = module.prior((3, 3), "optimised", CIFAR)
        inside, total = inside + (found.low <= points[10].drop <= found.high), total + 1
    assert inside / total == pytest.approx(9 / 11, abs=0.07)


def student(name: str, bits: int, **more) -> dict:
    history = [{"epoch": 0}, {"epoch": 1, "held_out_agreement": 0.9, "held_out_kl": 0.1}]
    quant = {"weight_bits": bits, "act_bits": bits, "average_weight_bits": 0.0}
    held = {
        "results": {"float": 91.73, "last": 90.0},
        "history": history,
        "summary": {"float_bytes": 400},
        "recipe": {"name": name, "quant": quant, "images": {"enabled": True}},
    }
    return {**held, **more}


def test_points_of_records(tmp_path):
    def write(name, held, images=10_000):
        record.write(tmp_path / f"cifar10_resnet20_{name}.json", {"test_images": images, **held})

    write("a", student("ait", 3))
    write(
        "b",
        {
            "students": {
                "x": student("hast", 3),
                "again": student("hast", 3),  # the same recipe, as another ablation holds it
                "y": student("hast", 3, results={}),
                "z": {"error": "NaN", "history": []},
            }
        },
    )
    write("c", student("old", 4, history=[{"epoch": 0, "top1": 90.0}]))
    write("d", student("rehearsal", 4), images=100)
    mixed = {"weight_bits": 4, "act_bits": 4, "average_weight_bits": 3.5}
    write("e", student("zeroq_mixed", 4, recipe={"name": "zeroq_mixed", "quant": mixed, "images": {"enabled": False}}))
    found = list(program.points(tmp_path))
    assert [(p.record.split("_")[-1], p.recipe, p.weight_bits) for p in found] == [
        ("a.json", "ait", 3), ("b.json x", "hast", 3), ("e.json", "zeroq_mixed", 3.5)]  # fmt: skip
    assert (found[0].agreement, found[0].kl, found[0].drop) == (0.9, 0.1, 1.73)
    assert [p.images for p in found] == ["optimised", "optimised", "generated"]


def test_the_program_writes_what_the_package_reads(tmp_path, monkeypatch, capsys):
    for i, p in enumerate(made(12)):
        last = {"held_out_agreement": p.agreement, "held_out_kl": p.kl}
        held = student(p.recipe, int(p.weight_bits), history=[last], results={"float": 90.0, "last": 90.0 - p.drop})
        record.write(tmp_path / f"cifar10_resnet20_{i}.json", {"test_images": 10_000, "seed": i, **held})
    out = tmp_path / "forecast.json"
    monkeypatch.setattr(sys, "argv", ["forecast", "--write", "--records", str(tmp_path), "--out", str(out)])
    program.main()
    assert "12 runs of 6 recipes" in capsys.readouterr().out
    held = json.loads(out.read_text())
    assert [Point(**p) for p in held["points"]] == list(program.points(tmp_path)) and held["commit"]
    assert held["calibrated_on"] == {"parameters": 100, "input_size": [3, 32, 32], "classes": 10}
    assert "12 runs of 6 recipes" in held["calibration"]["optimised"]
    assert "not calibrated for such images: there are 0" in held["calibration"]["generated"]


def test_committed_points_stand_in_committed_records():
    held, points = read_points()
    known = {p.record: p for p in program.points(record.RESULTS)}
    assert all(known.get(p.record) == p for p in points)
    assert {"what", "network", "commit", "date", "calibration"} <= held.keys()
    assert program.parameters(record.RESULTS, [p.record.split()[0] for p in points]) == calibrated_on().parameters
