"""The page of a run: what it says, what it must not let through, and how it refuses."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_support import assert_one_sentence, call
from report_support import EVIL, change, make_hostile, make_runs, picture, put

from zsq_fast.cli import result as results
from zsq_fast.methods import load_recipe
from zsq_fast.report import images, page, reading
from zsq_fast.report.figures import bars
from zsq_fast.report.published import closest, differences, published_rows
from zsq_fast.runs import checkpoint

for library in ("jinja2", "matplotlib"):
    pytest.importorskip(library, reason=f"the page needs {library}: pip install 'zsq-fast[report]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def ait(runs, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(runs[0], tmp_path / "ait"))


@pytest.fixture
def hast(runs, tmp_path):
    return Path(shutil.copytree(runs[1], tmp_path / "hast"))


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if not self._inside:
            self.text += data
        elif self._inside == "script":
            self.scripts += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(capsys, out: Path, *runs: Path) -> tuple[Elements, Path]:
    code, text, err = call(capsys, "report", *runs, "-o", out, "--json")
    assert code == 0, err
    paths = json.loads(text)
    assert paths["page"] == str(out) and out.stat().st_size < page.LIMIT
    return Elements(out.read_text(encoding="utf-8")), Path(paths["files"])


def words(elements: Elements) -> str:
    return " ".join(elements.text.split())


def test_the_page_of_one_run(capsys, runs, tmp_path):
    elements, folder = write(capsys, tmp_path / "report.html", runs[0])
    text, result = words(elements), json.loads((runs[0] / "result.json").read_text())
    assert folder == tmp_path / "report_files" and "ait on tiny, W3A4" in text and "not in the papers’ tables" in text
    for stage in ("float", "rtn", "last", "chosen"):
        assert f"{result['top1'][stage]:.2f} %" in text
    drop = result["top1"]["float"] - result["top1"]["last"]
    assert f"{abs(drop):.2f} points {'below' if drop >= 0 else 'above'} the float network" in text
    assert f"epoch {result['chosen_epoch'] + 1}, chosen without data" in text
    assert f"{100 * result['held_out']['last']['agreement']:.2f} % on held-out synthetic images" in text
    assert page.size(result["packed_bytes"]) in text and page.size(result["float_bytes"]) in text
    assert page.minutes(result["minutes"]) in text and "1 CPU thread" in text
    assert "images.npz" in text and "No table of the papers has the recipe ait at W3A4" in text
    for title in (
        "Top-1 accuracy",
        "Agreement with the float network",
        "Loss of the student",
        "Losses of the generator",
    ):
        assert title in text
    assert "schedule.epochs 400 5" in text and "quant.ema reference plain" in text  # published, here
    assert shlex.join(json.loads((runs[0] / "run.json").read_text())["command"]) in text
    assert "No real image went into them" in text
    assert [len(elements.of(tag)) for tag in ("h1", "title", "main")] == [1, 1, 1]


def test_nothing_is_loaded_and_every_number_lies_beside(capsys, runs, tmp_path):
    elements, folder = write(capsys, tmp_path / "page.html", *runs)
    assert folder.name == "page_files"
    for attributes in elements.of("img"):
        assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
    assert {a.get("href") for a in elements.of("link")} == {"data:,"}
    assert not any("src" in a for a in elements.of("script")) and not elements.of("iframe")
    links = {a["href"] for a in elements.of("a") if not a["href"].startswith("#")}
    assert links and all(link.startswith("page_files/") and (tmp_path / link).is_file() for link in links)
    anchors = {a["href"][1:] for a in elements.of("a") if a["href"].startswith("#")}
    ids = Counter(attributes["id"] for _, attributes in elements.tags if "id" in attributes)
    assert anchors <= ids.keys() and ids.most_common(1)[0][1] == 1
    for name in ("top1", "agreement", "student-loss", "generator-loss"):
        alone = (folder / f"{name}.svg").read_text()
        assert alone.startswith("<?xml") and "var(" not in alone and "#0b7285" in alone
        assert (folder / f"{name}.png").read_bytes().startswith(reading.SIGNATURE)
        assert "curves" in json.loads((folder / f"{name}.json").read_text())
    curve = json.loads((folder / "student-loss.json").read_text())["curves"][0]
    records = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert curve["values"] == [r["student_loss"] for r in records if "student_loss" in r] and curve["epochs"] == [
        3,
        4,
        5,
    ]
    assert (folder / "run-1-forecast.json").read_bytes() == (runs[0] / "analysis" / "forecast.json").read_bytes()
    assert (folder / "run-1-layers.png").read_bytes() == (runs[0] / "analysis" / "layers.png").read_bytes()
    report = json.loads((folder / "report.json").read_text())
    assert [run["recipe"] for run in report["runs"]] == ["ait", "hast"]
    assert json.loads((folder / "run-2-layers.json").read_text())["layers"][0]["weights"] == 216


def test_two_runs_beside_each_other(capsys, runs, tmp_path):
    elements, _ = write(capsys, tmp_path / "report.html", *runs)
    text = words(elements)
    assert "2 runs of tiny" in text and "Least lost: ait" in text
    rows = re.search(r"Run Bits Last epoch.*?Accuracies", text)[0]
    assert "ait, tiny" in rows and "hast, tiny" in rows
    assert "as published" in text and "published 200" in text  # HAST keeps what AIT changes, and the other way round
    assert "Images of the generator, held out" in text and "Optimised images, which the student was trained on" in text
    assert (
        sum("data-tabs" in attributes for _, attributes in elements.tags) == 3
    )  # analyses by name, layers and images by run


def test_what_a_run_lacks_is_said(capsys, hast, tmp_path):
    shutil.rmtree(hast / "images")
    elements, _ = write(capsys, tmp_path / "report.html", hast)
    assert re.search(r"class \d Images of the generator, held out", words(elements))  # those are left
    for step in checkpoint.steps(hast / "checkpoints"):
        shutil.rmtree(hast / "checkpoints" / checkpoint.directory_name(step))
    (hast / "metrics.jsonl").unlink()
    change(hast, "result.json", held_out={}, chosen_epoch=None)
    text = words(write(capsys, tmp_path / "report.html", hast)[0])
    for sentence in (
        "No accuracy is known",
        "no images held out",
        "The run kept no images",
        "--what layers",
        "None was made yet",
    ):
        assert sentence in text
    assert "Curves" not in text


def test_layers_and_analyses(capsys, runs, tmp_path):
    elements, _ = write(capsys, tmp_path / "report.html", *runs)
    text = words(elements)
    assert "3 weight 8×4×3×3 3 288 14.5 −1 2 25 0.5 0.125" in text  # of the analysis, with shape and count of the run
    assert "3 weight 8×4×3×3 3 288" in text.split("Layers", 2)[2]  # without one
    assert "Forecast drop, points 1.234" in text and "CE-KL of all parameters −0.25" in text and "values" not in text
    assert text.index("Forecast The drop") < text.index("mine")
    path = next(a["d"] for a in elements.of("path") if a["d"].startswith("M0.0 24v-6.0"))
    assert path == bars([1, 2, 3, 4, 4, 3, 2, 1]) and path.count("v-") == 8


def test_numbers_of_an_analysis_are_named():
    long = "word " * 100
    found = reading._numbers(
        {"epochs": [5, 9], "losses": {"kl": {"top": {"values": [2.0, -1.0]}}}, "x": {"top": 1}, "t": long, "n": [None]}
    )
    assert found[:3] == [("epochs", "6, 10"), ("KL eigenvalues, largest first", "2, −1"), ("x histogram to", "1")]
    assert found[3][1] == "word " * 79 + "word …" and len(found) == 4


def test_forecasts_as_the_run_printed_them(capsys, ait, hast, tmp_path):
    texts = {
        "forecast_before": "forecast before training: 1 to 3 points",
        "forecast": "forecast without data: 2\n  from KL",
    }
    change(ait, "result.json", **{name: {"text": text} for name, text in texts.items()})
    text = words(write(capsys, tmp_path / "report.html", ait)[0])
    assert "Forecast before training: 1 to 3 points. Forecast without data: 2; from KL. Accuracies are" in text
    change(hast, "result.json", forecast_before=None, forecast=None)
    text = words(write(capsys, tmp_path / "report.html", ait, hast)[0])
    assert "ait: forecast before training: 1 to 3 points." in text and "hast: forecast" not in text


def test_markup_in_a_run_stays_text(capsys, ait, hast, tmp_path):
    make_hostile(ait)
    ait = ait.rename(tmp_path / EVIL.replace("/", "_"))
    for given in ([ait], [ait, hast]):
        elements, _ = write(capsys, tmp_path / "report.html", *given)
        (script,) = elements.of("script")
        sum_ = base64.b64encode(hashlib.sha256(elements.scripts.encode()).digest()).decode()
        policy = next(a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert script == {} and f"script-src 'sha256-{sum_}'" in policy and "default-src 'none'" in policy
        assert "window.hacked" not in elements.scripts and words(elements).count("window.hacked") > 20
        assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
        assert all(a["src"].startswith("data:") for a in elements.of("img")) and len(elements.of("style")) == 1
        assert words(elements).count("{{7*7}}") == words(elements).count("window.hacked=1'")  # no template either


def test_published_rows_of_a_run(runs):
    (run,) = page.read_runs([runs[0]])
    assert run.classes == 4 and run.input_size == (3, 8, 8) and published_rows(run) == []

    def like(recipe: str, bits: int, model: str, classes: int = 10, **more):
        size = (3, 224, 224) if classes == 1000 else (3, 32, 32)
        found = load_recipe(recipe, input_size=size, weight_bits=bits, act_bits=bits, **more)
        return dataclasses.replace(run, recipe=found, input_size=size, classes=classes, model=model)

    same = like("hast", 3, "pytorchcv:resnet20_cifar10")
    rows = published_rows(same)
    assert (
        closest(rows).row.id == "hast/main/hast-cifar10-w3a3"
        and closest(rows).row.top1 == 88.34
        and rows[0].same_network
    )
    assert differences(same, closest(rows).row) == []
    other = like("hast", 3, "resnet20")
    assert not closest(published_rows(other)).same_network
    assert "another network" not in page._sentence(same, closest(rows)) and "resnet20_cifar10" in page._sentence(
        other, closest(published_rows(other))
    )
    many = published_rows(like("ait", 4, "mine", 1000))
    assert len(many) > 1 and closest(many) is None  # several networks, none of them ours
    elsewhere = published_rows(like("ait", 3, "pytorchcv:resnet20_cifar10"))
    assert elsewhere and not any(p.same_bits for p in elsewhere) and closest(elsewhere) is None
    changed = like("hast", 3, "resnet20", overrides=["student.promoted_weight=0", "schedule.epochs=7"])
    assert "hast/weights/a1_b0-cifar10-w3a3" in {p.row.id for p in published_rows(changed)}
    assert {(d.option, d.here) for d in differences(changed, None)} == {
        ("student.promoted_weight", "0"),
        ("schedule.epochs", "7"),
    }
    assert differences(dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, name="mine")), None) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "result.json").unlink(), "is not finished; run `zsq-fast resume"),
        (lambda run: (run / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda run: (run / "recipe.json").write_text("{}"), "recipe.json is damaged"),
        (lambda run: change(run, "recipe.json", future={}), "of another version, or damaged: unknown recipe section 'future'"),
        (lambda run: change(run, "result.json", minutes="nan"), "'minutes' is not a finite number"),
        (lambda run: change(run, "result.json", float_bytes=None), "'float_bytes' is not a finite number"),
        (lambda run: change(run, "result.json", packed_bytes=1.5), "'packed_bytes' is not a whole number"),
        (lambda run: change(run, "result.json", model=["x"]), "'model' is not a text"),
        (lambda run: change(run, "result.json", top1=[1]), "top1. is no JSON object"),
        (lambda run: change(run, "result.json", forecast="x"), "forecast. is no JSON object"),
        (lambda run: change(run, "result.json", left_float="x"), "'left_float' is not a list"),
        (lambda run: change(run, "run.json", job=[1]), "job. is no JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": "x"}\n'), "'history.epoch' is not a finite number"),
        (lambda run: (run / "metrics.jsonl").write_text("[\n{}\n"), "line 1: not valid JSON"),
        (lambda run: (run / "analysis" / "layers.json").write_text("["), "layers.json is damaged: not valid JSON"),
        (lambda run: (run / "analysis" / "layers.json").write_text("[" * 100_000), "layers.json is damaged: not valid JSON"),
        (lambda run: put(run, "layers", {"layers": [1]}), "holds no list of layers"),
        (lambda run: put(run, "forecast", {"x": 1}, b"<svg onload=x>"), "forecast.png is not a PNG picture"),
        (lambda run: put(run, "mine", {"x": 1}, picture() + bytes(2 << 20)), "mine.png is too large for a report"),
        (lambda run: (run / "analysis" / "a b.json").write_text("{}"), "'a b.json' is not an acceptable file name"),
        (lambda run: (run / "analysis" / "secret.json").symlink_to(run / "run.json"), "secret.json is not a regular file"),
        (lambda run: (run / "student.safetensors").write_bytes(b"x"), "student.safetensors is damaged"),
        (lambda run: (_newest(run) / "held_out.safetensors").write_bytes(b"x"), "held_out.safetensors is damaged"),
    ],
)  # fmt: skip
def test_what_is_wrong_ends_in_one_sentence(capsys, ait, tmp_path, damage, message):
    damage(ait)
    code, _, err = call(capsys, "report", ait, "-o", tmp_path / "report.html")
    assert code == 4 and message in assert_one_sentence(err)
    assert not list(tmp_path.glob("report*"))


def _newest(run: Path) -> Path:
    return run / "checkpoints" / checkpoint.directory_name(checkpoint.steps(run / "checkpoints")[-1])


RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_committed_records(capsys, tmp_path):
    """As in docs: AIT and HAST on CIFAR-10, whose run directories are not kept."""
    names = ("ait_w4a4_1200+1000", "hast_w4a4_800+2000", "ait_w3a3_1200+1000")
    files = [RECORDS / f"cifar10_resnet20_{name}_seed0.json" for name in names]
    elements, folder = write(capsys, tmp_path / "report.html", *files)
    text, report = words(elements), json.loads((folder / "report.json").read_text())
    for run, file in zip(report["runs"], files, strict=True):
        record = json.loads(file.read_text())
        assert run["top1"] == record["results"] and run["minutes"] == record["minutes"]
        assert run["drop"] == pytest.approx(record["results"]["float"] - record["results"]["last"])
        assert f"{record['results']['last']:.2f} %" in text and record["environment"]["commit"] in text
    assert [run["run"] for run in report["runs"]] == ["ait W4A4", "hast W4A4", "ait W3A3"]
    assert [p["row"] for p in report["runs"][1]["published"]] == ["hast/main/hast-cifar10-w4a4"]
    assert "92.36 %" in text and "3 runs of ResNet-20" in text and "A record holds no layers" in text
    found = json.loads((folder / "run-3-update-ratios.json").read_text())
    history = json.loads(files[2].read_text())["history"]
    assert (
        found["update_ratio"] == [r["update_ratio"] for r in history if "update_ratio" in r]
        and found["first_epoch"] == 7
    )
    assert not (folder / "run-2-update-ratios.json").exists()


def test_a_file_that_is_no_record(capsys, tmp_path):
    file = tmp_path / "record.json"
    record = json.loads((RECORDS / "cifar10_resnet20_ait_w4a4_1200+1000_seed0.json").read_text())
    cases = (
        ("{", "not valid JSON"),
        ("{}", "neither a run directory nor a record of one student"),
        (json.dumps({**record, "history": [{"epoch": None}]}), "'history.epoch' is not a finite number"),
        (json.dumps({**record, "minutes": "long"}), "'minutes' is not a finite number"),
        (json.dumps({**record, "recipe": {"name": 1}}), "of another version, or damaged"),
    )
    for text, message in cases:
        file.write_text(text)
        code, _, err = call(capsys, "report", file, "-o", tmp_path / "report.html")
        assert code == 4 and message in assert_one_sentence(err)


def test_tracked_cosines_are_drawn(capsys, ait, tmp_path):
    lines = [
        {"epoch": e, "cosine": {"ce-kl": {"total": -0.1 * e, "batches": 3}, "fa-kl": {"total": None}}} for e in range(3)
    ]
    (ait / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elements, folder = write(capsys, tmp_path / "report.html", ait)
    (curve,) = json.loads((folder / "cosine.json").read_text())["curves"]
    assert (
        curve["curve"] == "ce-kl"
        and curve["values"] == pytest.approx([0, -0.1, -0.2])
        and "CE-KL -0.2" in words(elements)
    )


def test_heat_maps_of_a_comparison_have_one_scale(capsys, ait, hast, tmp_path):
    """Net ratios where a run has no step-summed ones, which the page says; a scale below a decade still has its numbers."""
    for run, key, ratios in ((ait, "update_ratio", [0.25, 0.5]), (hast, "net_update_ratio", [0.125, 0.0])):
        (run / "metrics.jsonl").write_text(
            json.dumps({"epoch": 3, "student_loss": 1.0, key: ratios, "net_update_ratio": ratios}) + "\n"
        )
    elements, folder = write(capsys, tmp_path / "report.html", ait, hast)
    texts = [re.findall(r">([\d.]+)</text>", (folder / f"run-{i}-update-ratios.svg").read_text()) for i in (1, 2)]
    assert texts[0][-3:] == texts[1][-3:] == ["12.5", "25", "50"]
    assert json.loads((folder / "run-2-update-ratios.json").read_text())["net_update_ratio"] == [[0.125, 0.0]]
    assert "summed over the steps" in words(elements) and "Net: integer weights" in words(elements)


def test_labels_of_a_wide_scale_are_decades(capsys, ait, tmp_path):
    lines = [{"epoch": e, "student_loss": loss} for e, loss in enumerate((250.0, 1.0, 0.0005))]
    (ait / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, folder = write(capsys, tmp_path / "report.html", ait)
    texts = re.findall(r">([\d.]+)</text>", (folder / "student-loss.svg").read_text())
    assert {"0.001", "0.1", "100"} & set(texts) and not {"0.002", "0.5", "20"} & set(texts)


def test_numbers_that_would_break_a_picture_are_left_out(capsys, ait, tmp_path):
    lines = ['{"epoch": 0, "student_loss": 1e999, "top1": 1e300}', '{"epoch": 1, "student_loss": -1, "top1": "nan"}']
    (ait / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 2, "student_loss": 0, "top1": 5}', ""]))
    put(ait, "forecast", {"huge": 10**4000, "none": None, "yes": True, "inf": float("inf")})
    elements, folder = write(capsys, tmp_path / "report.html", ait)
    assert json.loads((folder / "student-loss.json").read_text())["curves"][0]["values"] == [-1, 0]
    assert json.loads((folder / "top1.json").read_text())["curves"][0]["values"] == [5]
    assert "Yes yes" in words(elements)


def test_usage_errors(capsys, ait, tmp_path, monkeypatch):
    for words_, message in (
        ([ait, ait], "is given twice"),
        ([ait, tmp_path / "." / "ait"], "is given twice"),
        ([ait, "-o", tmp_path], "is a directory"),
        ([], "see zsq-fast report --help"),
    ):
        code, _, err = call(capsys, "report", *words_)
        assert code == 2 and message in assert_one_sentence(err)
    code, _, err = call(capsys, "report", tmp_path / "nowhere")
    assert code == 4 and "is not a run directory" in assert_one_sentence(err)
    monkeypatch.setattr(page, "LIMIT", 10_000)
    code, _, err = call(capsys, "report", ait, "-o", tmp_path / "report.html")
    assert code == 2 and "report fewer at once" in assert_one_sentence(err) and not list(tmp_path.glob("report*"))
    for library in ("jinja2", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            patch.delitem(sys.modules, "matplotlib.image", raising=False)
            code, _, err = call(capsys, "report", ait, "-o", tmp_path / "report.html")
            assert code == 2 and f"{library} is missing): pip install 'zsq-fast[report]'" in assert_one_sentence(err)


def test_a_page_is_the_same_every_time(capsys, runs, tmp_path):
    pages = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write(capsys, tmp_path / name / "report.html", *runs)
        pages.append(
            {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        )
    assert pages[0] == pages[1] and len(pages[0]) > 20


def test_labels_differ():
    assert reading.labels([Path("/a/x/seed-0"), Path("/a/y/seed-0")]) == ["x/seed-0", "y/seed-0"]
    assert reading.labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]


def test_sheets_of_many_classes_and_large_images(runs, monkeypatch):
    import torch

    x = torch.randn(60, 1, 100, 80)
    monkeypatch.setattr(images, "_optimised", lambda folder: ("source", "asked for", x, torch.arange(60) // 2))
    sheet = images.read_sheet(reading.RunDir.open(runs[0], read_only=True), [], [])
    assert [label for label, *_ in sheet.strips] == list(range(0, 30, 3)) and sheet.count == 60
    for _, count, pixels in sheet.strips:
        assert count == 2 and pixels.shape == (48 + 1, 2 * (38 + 1), 4) and pixels.dtype == torch.uint8
    scaled = images._pixels(x[:, :, :4, :4], *images._scale(x[:, :, :4, :4], [0.5], [0.25]))
    expected = ((x[:, :, :4, :4] * 0.25 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(scaled[..., 0], expected[:, 0]) and (scaled[..., 3] == 255).all()


def test_the_names_are_those_of_the_command_line():
    assert (reading.RESULT, reading.STUDENT) == (results.RESULT, results.STUDENT)


def test_sizes():
    known = {999: "999 B", 1000: "1 kB", 111_754: "112 kB", 1_078_888: "1.08 MB", 46_830_000: "46.8 MB"}
    assert {count: page.size(count) for count in known} == known
