"""Published tables as data, and the verb that trains their rows."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
from cli_support import assert_one_sentence, call, make_tiny, schedule

from zsq_fast import papers
from zsq_fast.errors import UsageError
from zsq_fast.methods import load_recipe

ROW = "hast/direction/kl-cifar10-w3a3"
NUMBERS = schedule(
    epochs=4, warmup_epochs=2, calibration_epochs=1, iterations=3, batch_size=8, milestones="[3]", held_out=16
)
NUMBERS += ["--set", "images.count=8", "--set", "images.batch_size=8", "--set", "images.iterations=2"]
NUMBERS += ["--set", "student.feature_points=['3']", "--set", "student.lr=0.02", "--set", "quant.ema=plain"]
NUMBERS += ["--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny, out, *more, row=ROW):
    return ["reproduce", row, "--model", *tiny.model, "--out", out, *NUMBERS, *more]


def test_every_row_is_a_recipe():
    """Names, overrides and bits resolve at the paper's input size, and no published number is out of place."""
    known = {"ait", "autorecon", "gdfq", "hast", "intraq", "plf", "qimera", "synq", "zeroq"}
    assert known <= papers.papers().keys()
    for paper in papers.papers():
        rows = papers.rows(paper)
        assert rows and all(papers.resolve(name) == row for name, row in rows.items())
        for row in rows.values():
            for length in ("paper", "short"):
                bits = dict(weight_bits=row.weight_bits, act_bits=row.act_bits)
                recipe = load_recipe(
                    row.recipe, input_size=row.input_size, schedule=length, overrides=row.overrides, **bits
                )
                assert recipe.quant.weight_bits == row.weight_bits
            assert 0 < row.top1 < row.float_top1 < 100 and row.source and row.title


def test_published_numbers():
    """ait_family.md 1.1, 10.1 to 10.3, 5.3; hast_family.md 2, 5.7, 5.8, 4.3, 10.1, 10.2."""
    expected = {
        "ait/main/gdfq_ait-cifar10-w4a4": (91.23, 93.89, "ait", ()),
        "ait/main/autorecon_ait-mobilenetv2-w5a5": (71.96, 73.03, "autorecon_ait", ("generator.genotype=mobilenetv2",)),
        "ait/losses/kl_only-resnet50-w4a4": (42.64, 77.73, "kl_only", ()),
        "gdfq/main/gdfq-cifar100-w4a4": (63.58, 70.33, "gdfq", ()),
        "gdfq/main/gdfq-cifar10-w4a4": (90.25, 94.03, "gdfq", ()),
        "gdfq/ait/gdfq-resnet50-w4a4": (52.12, 77.73, "gdfq", ()),
        "gdfq/ait/gdfq-mobilenetv2-w4a4": (59.43, 73.03, "gdfq", ()),
        "gdfq/mobilenetv1/gdfq-mobilenetv1-w4a4": (28.64, 73.39, "gdfq", ()),
        "gdfq/mobilenetv1/gdfq-mobilenetv1-w5a5": (59.76, 73.39, "gdfq", ()),
        "gdfq/w3a3/gdfq-resnet18-w3a3": (20.23, 71.47, "gdfq", ()),
        "gdfq/plf/gdfq-cifar100-w3a3": (43.87, 70.33, "gdfq", ()),
        "qimera/main/qimera-resnet50-w5a5": (75.32, 77.73, "qimera", ("generator.embedding=teacher",
            "generator.superpose_probability=0.7", "generator.superposed_classes=100")),
        "autorecon/main/autorecon-cifar10-w4a4": (88.55, 93.89, "autorecon", ()),
        "intraq/main/intraq-cifar100-w3a3": (48.25, 70.33, "intraq_cifar100", ()),
        "hast/main/hast-cifar10-w3a3": (88.34, 94.03, "hast", ()),
        "hast/main/hast-cifar100-w4a4": (66.68, 70.33, "hast_cifar100", ()),
        "hast/weights/a1_b3-resnet18-w3a3": (53.12, 71.47, "hast", ("student.clean_weight=1", "student.promoted_weight=3")),
        "hast/alignment/dfa-cifar10-w3a3": (83.92, 94.03, "hast", ("student.alignment=direct",)),
        "hast/images/hast_256-resnet18-w3a3": (49.17, 71.47, "hast", ("images.count=256",)),
        "synq/main/synq-cifar10-w4a4": (92.76, 93.89, "synq", ()),
        "synq/main/synq-cifar100-w3a3": (57.28, 70.33, "synq_cifar100", ()),
        "synq/main/synq-mobilenetv2-w3a3": (34.21, 73.03, "synq", ()),
        "plf/main/plf-cifar10-w3a3": (88.04, 93.89, "plf", ()),
        "plf/main/plf-mobilenetv1-w4a4": (59.51, 73.39, "plf", ()),
        "plf/main/plf-resnet50-w5a5": (76.08, 77.73, "plf", ()),
        "plf/ablation/kl-cifar100-w3a3": (50.87, 70.33, "plf", ("student.ce_weight=0", "student.pseudo_label=none",
            "student.feature_weight=0")),
        "plf/ablation/kl_mse_confident-cifar100-w3a3": (56.43, 70.33, "plf", ("student.pseudo_weight=0",)),
        "zeroq/main/zeroq-resnet50-w8a8": (77.67, 77.72, "zeroq_calibrated", ()),
        "zeroq/main/zeroq-inceptionv3-w8a8": (78.72, 78.88, "zeroq_calibrated", ()),
        "zeroq/ait/zeroq-cifar10-w4a4": (79.30, 93.89, "zeroq_calibrated", ()),
        "zeroq/ait/zeroq-mobilenetv2-w5a5": (59.88, 73.03, "zeroq_calibrated", ()),
        "zeroq/gdfq/zeroq-resnet18-w4a4": (26.04, 71.47, "zeroq_calibrated", ()),
    }  # fmt: skip
    for name, values in expected.items():
        row = papers.resolve(name)
        assert (row.top1, row.float_top1, row.recipe, row.overrides) == values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hats/main/hast-cifar10-w3a3", "no paper 'hats'. Did you mean 'hast'"),
        ("hast/man/hast-cifar10-w3a3", "no table 'man'. Did you mean 'main'"),
        ("hast/main/hast-cifar10-w3a33", "no row 'hast-cifar10-w3a33'. Did you mean 'hast-cifar10-w3a3'"),
        ("hast/main/zzz", "--list hast/main"),
        ("hast", "write PAPER/TABLE/ROW"),
    ],
)
def test_unknown_names(capsys, name, message):
    with pytest.raises(UsageError, match=message):
        papers.resolve(name)
    code, _, err = call(capsys, "reproduce", name)
    assert code == 2 and message in assert_one_sentence(err)


def test_lists(capsys):
    code, out, _ = call(capsys, "reproduce", "--list")
    assert code == 0 and "hast" in out and "Hard Sample" in out
    code, out, _ = call(capsys, "reproduce", "--list", "hast/weights")
    assert code == 0 and "hast/weights/a1_b3-resnet18-w3a3" in out and "53.12" in out and "hast/main" not in out
    code, out, _ = call(capsys, "reproduce", "hast", "--list", "--json")
    assert code == 0 and json.loads(out)[ROW]["top1"] == 88.29
    code, _, err = call(capsys, "reproduce", "--list", "hats")
    assert code == 2 and "Did you mean 'hast'" in assert_one_sentence(err)


def test_seeds_are_trained_gone_on_with_and_skipped(capsys, tiny, tmp_path):
    out, data = tmp_path / "runs", ("--data", tiny.images, "--json")
    code, text, err = call(capsys, *words(tiny, out, *data, "--seeds", 2))
    assert code == 0, err
    first = json.loads(text)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    code, text, err = call(capsys, *words(tiny, out, *data, "--seeds", 2))
    assert code == 0 and json.loads(text) == first, err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == stamps
    (out / "seed-1" / "result.json").unlink()  # a kill before the end: trained on from the checkpoint
    code, text, err = call(capsys, *words(tiny, out, *data, "--seeds", 3))
    assert code == 0, err
    report = json.loads(text)
    assert [seed["seed"] for seed in report["seeds"]] == [0, 1, 2]
    for before, after in zip(first["seeds"], report["seeds"], strict=False):
        assert {**before, "minutes": 0} == {**after, "minutes": 0}
    assert (out / "seed-2" / "chosen.safetensors").exists()
    assert (report["paper"]["top1"], report["paper"]["float"]) == (88.29, 94.03)

    for key, value in report["ours"].items():
        tops = [seed[key] for seed in report["seeds"]]
        assert value["top1"] == pytest.approx({"mean": statistics.fmean(tops), "deviation": statistics.stdev(tops)})
        assert value["drop"]["mean"] == pytest.approx(statistics.fmean(s["float"] - s[key] for s in report["seeds"]))
    assert set(report["ours"]) == {"last", "chosen", "best_on_test"}
    for seed in report["seeds"]:
        records = [
            json.loads(line) for line in (out / f"seed-{seed['seed']}" / "metrics.jsonl").read_text().splitlines()
        ]
        assert seed["best_on_test"] == max(r["top1"] for r in records[2:]) >= max(seed["last"], seed["chosen"])
        assert seed["chosen"] == records[seed["chosen_epoch"]]["top1"]
        assert seed["held_out"]["last"]["kl"] == records[-1]["held_out_kl"]

    code, text, err = call(capsys, *words(tiny, out, "--data", tiny.images))
    assert code == 0 and "best on test, not a fair choice" in text and "88.29" in text and "±" in text, err

    code, _, err = call(capsys, *words(tiny, out, *data, "--set", "student.lr=0.01"))
    assert code == 2 and "another recipe" in assert_one_sentence(err)
    code, text, err = call(capsys, *words(tiny, out, "--json"))  # what was measured stays
    assert code == 0 and json.loads(text)["ours"] == report["ours"], err


def test_changes_of_the_user_are_told_apart_from_the_row(capsys, tiny, tmp_path):
    row = "hast/weights/a1_b3-cifar10-w3a3"
    changes = ["quant.weight_bits=8", "student.promoted_weight=0"]
    given = words(tiny, tmp_path, "--seeds", 1, *(w for text in changes for w in ("--set", text)), row=row)
    code, text, err = call(capsys, *given, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert (report["weight_bits"], report["act_bits"]) == (8, 3)
    own = [w for before, w in itertools.pairwise(NUMBERS) if before == "--set"]
    assert report["changed_from_row"] == [*own, *changes]
    assert report["overrides"] == ["student.clean_weight=1"], "the row's other one does not hold"
    code, text, err = call(capsys, *given)
    assert code == 0, err
    assert "; W8A3, recipe hast student.clean_weight=1, schedule paper, 1 seeds" in text and "W3A3" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("changed from the row: "))
    assert line.endswith("quant.weight_bits=8, student.promoted_weight=0")


def test_without_data_there_is_agreement_alone(capsys, tiny, tmp_path):
    row = "ait/main/gdfq_ait-cifar10-w4a4"
    more = ["--set", "student.feature_points=[]", "--seeds", 1]  # those of NUMBERS belong to HAST
    code, text, err = call(capsys, *words(tiny, tmp_path / "runs", *more, row=row))
    assert code == 0, err
    assert "accuracies need real test images" in text and "agreement with the teacher, chosen" in text
    assert "ours, last epoch" not in text and "91.23" in text
    code, text, err = call(capsys, *words(tiny, tmp_path / "runs", *more, "--data", tiny.images, "--json", row=row))
    assert code == 0, err  # the finished students are measured
    report, run = json.loads(text), str(tmp_path / "runs" / "seed-0")
    assert set(report["ours"]) == {"last", "chosen"} and report["eval_data"] == str(tiny.images)
    code, text, err = call(capsys, "evaluate", run, "--data", tiny.images, "--allow-import", "--json")
    found = json.loads(text)
    assert code == 0 and {k: found[k]["top1"] for k in ("float", "quantized", "chosen")} == {
        k: report["seeds"][0][s] for k, s in (("float", "float"), ("quantized", "last"), ("chosen", "chosen"))}  # fmt: skip


def test_what_a_run_finds_is_no_other_recipe(capsys, tiny, tmp_path):
    more = ["--seeds", 1, "--set", "quant.average_weight_bits=4", "--json"]
    first, again = (call(capsys, *words(tiny, tmp_path, *more)) for _ in "ab")
    assert first[0] == again[0] == 0 and json.loads(first[1]) == json.loads(again[1]), again[2]
    code, _, err = call(capsys, *words(tiny, tmp_path, *more, "--set", "quant.average_weight_bits=5"))
    assert code == 2 and "another recipe" in assert_one_sentence(err)


def test_a_directory_that_cannot_be_used_is_told_before_any_training(capsys, tiny, tmp_path):
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "notes.txt").touch()
    code, _, err = call(capsys, *words(tiny, tmp_path, "--seeds", 2))
    assert code == 2 and "seed-1 is not empty" in assert_one_sentence(err) and not (tmp_path / "seed-0").exists()
    (tmp_path / "file").touch()
    code, _, err = call(capsys, *words(tiny, tmp_path / "file"))
    assert code == 2 and "is a file" in assert_one_sentence(err)


def test_dry_run_writes_nothing(capsys, tiny, tmp_path):
    code, text, err = call(capsys, *words(tiny, tmp_path / "runs", "--dry-run", "--json"))
    assert code == 0, err
    plan = json.loads(text)
    recipe = plan["recipe"]
    assert plan["estimate"]["runs"] == 3 and plan["estimate"]["seconds"] > 0
    assert recipe["student"]["promote_by"] == "kl" and recipe["quant"]["weight_bits"] == 3
    assert not (tmp_path / "runs").exists()
