"""`zsq-fast synthesize` and `--images DIR`: sets of optimised images are made once, in parts if wanted, and taken by all that fit."""

from __future__ import annotations

import json
import signal

import pytest
from cli_support import SHORT, assert_one_sentence, call, make_tiny

from zsq_fast.methods import images as module
from zsq_fast.runs import Progress

NUMBERS = ["--set", "images.count=20", "--set", "images.batch_size=8", "--set", "images.iterations=3", "--threads", 1]
TRAIN = [*SHORT, "--set", "schedule.held_out=8", "--set", "student.feature_points=['3']", "--set", "quant.ema=plain"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny, out, *more, recipe="hast"):
    return ["synthesize", *tiny.model, "--recipe", recipe, "--out", out, *NUMBERS, "--quiet", *more]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shelf(tiny, tmp_path_factory):
    from zsq_fast.cli import main

    out = tmp_path_factory.mktemp("shelf") / "images"
    assert main([str(word) for word in words(tiny, out)]) == 0
    return out


def none_is_made(monkeypatch):
    monkeypatch.setattr(module._Optimiser, "batch", lambda *_: pytest.fail("an image was made"))


def test_a_set_is_made_once(capsys, tiny, tmp_path, shelf, monkeypatch):
    out = tmp_path / "images"
    code, text, err = call(capsys, *words(tiny, out, "--json"))
    assert code == 0, err
    first = json.loads(text)
    assert (first["batches"], first["made"], first["missing"], first["shard"]) == (3, 3, 0, [0, 1])
    assert first["images"]["count"] == 20 and first["directory"] == str(next(out.iterdir()).resolve())
    assert contents(out) == contents(shelf), "the same twice"
    none_is_made(monkeypatch)
    code, text, err = call(capsys, *words(tiny, out, "--json"))
    assert code == 0 and json.loads(text) == {**first, "made": 0, "minutes": json.loads(text)["minutes"]}, err
    code, text, err = call(capsys, *words(tiny, out))
    assert code == 0 and "batches made: 0, there before: 3" in text and "missing" not in text, err
    assert contents(out) == contents(shelf)


def test_parts_make_the_whole(capsys, tiny, tmp_path, shelf):
    code, text, err = call(capsys, *words(tiny, tmp_path, "--shard", "1/2"))
    assert code == 0 and "part 1 of 2" in text and "of the whole set 2 batches are missing still" in text, err
    code, text, err = call(capsys, *words(tiny, tmp_path, "--shard", "0/2", "--json"))
    assert code == 0 and (json.loads(text)["made"], json.loads(text)["missing"]) == (2, 0), err
    assert contents(tmp_path) == contents(shelf)


def test_it_goes_on_after_an_interruption(capsys, tiny, tmp_path, shelf, monkeypatch):
    advance, told = Progress.advance, []

    def stop(self, *args, **more):
        told.append(more)
        if len(told) == 5:  # the second iteration of the second batch
            signal.raise_signal(signal.SIGINT)
        advance(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop)
        code, _, err = call(capsys, *words(tiny, tmp_path))
    assert code == 130 and "stopped in batch 2" in err and "run again to go on" in err
    assert len(contents(tmp_path)) == 1
    code, text, err = call(capsys, *words(tiny, tmp_path, "--json"))
    assert code == 0 and json.loads(text)["made"] == 2, err
    assert contents(tmp_path) == contents(shelf)


def quantize(tiny, out, images, *more, verb=("quantize",), recipe=("--recipe", "hast", "-w", 3, "-a", 4)):
    return [*verb, *tiny.model, *recipe, "--out", out, "--images", images, *NUMBERS, *TRAIN, "--quiet", *more]


def test_runs_take_what_is_there(capsys, tiny, tmp_path, shelf, monkeypatch):
    """Other bits and losses, the same images, bit for bit what a run makes for itself; the run can do without the directory then."""
    alone = [word for word in quantize(tiny, tmp_path / "alone", "") if word not in ("--images", "")]
    assert call(capsys, *alone)[0] == 0
    none_is_made(monkeypatch)
    code, _, err = call(capsys, *quantize(tiny, tmp_path / "a", shelf))
    assert code == 0, err
    code, _, err = call(capsys, *quantize(tiny, tmp_path / "b", shelf, "-w", 5, "--set", "student.promoted_weight=3"))
    assert code == 0, err
    student = "student.safetensors"
    assert (tmp_path / "a" / student).read_bytes() == (tmp_path / "alone" / student).read_bytes()
    for run in ("a", "b", "alone"):
        assert contents(tmp_path / run / "images") == contents(shelf)
    before = (tmp_path / "a" / student).read_bytes()
    (tmp_path / "a" / "result.json").unlink()
    code, _, err = call(capsys, "resume", tmp_path / "a", "--allow-import", "--quiet")
    assert code == 0 and (tmp_path / "a" / student).read_bytes() == before, err
    assert str(shelf) not in json.dumps(json.loads((tmp_path / "a" / "run.json").read_text())["job"])


def test_runs_make_what_is_missing(capsys, tiny, tmp_path, shelf, monkeypatch):
    images = tmp_path / "images"
    assert call(capsys, *words(tiny, images, "--shard", "0/2"))[0] == 0
    row = ["reproduce", "hast/direction/kl-cifar10-w3a3", "--model"]
    again = quantize(tiny, tmp_path / "row", images, "--seeds", 1, verb=row, recipe=())
    code, _, err = call(capsys, *again)
    assert code == 0, err
    assert contents(images) == contents(shelf) == contents(tmp_path / "row" / "seed-0" / "images")
    none_is_made(monkeypatch)
    assert call(capsys, *again)[0] == 0


def test_a_sweep_takes_and_fills_it(capsys, tiny, tmp_path, shelf):
    recipe = ("--recipe", "hast", "-w", 3, "-a", 4, "--vary", "student.epsilon=0.01,0.02", "--no-pictures")
    images = tmp_path / "images"
    more = ("--jobs", 2)
    code, _, err = call(capsys, *quantize(tiny, tmp_path / "s", images, *more, verb=("sweep",), recipe=recipe))
    assert code == 0, err
    assert contents(images) == contents(shelf)
    for value in ("0.01", "0.02"):
        assert contents(tmp_path / "s" / f"student.epsilon={value}" / "seed-0" / "images") == contents(shelf)


def test_dry_run_measures_and_writes_nothing(capsys, tiny, tmp_path):
    out = tmp_path / "images"
    code, text, err = call(capsys, *words(tiny, out, "--dry-run", "--shard", "0/2", "--json"))
    assert code == 0, err
    plan = json.loads(text)
    assert plan["batches"] == 2 and plan["seconds"] == 2 * 3 * plan["seconds_each"] > 0
    code, text, err = call(capsys, *words(tiny, out, "--dry-run"))
    assert code == 0 and "9 x " in text and not out.exists(), err


@pytest.mark.parametrize(
    "verb",
    [
        ("synthesize", "--recipe", "gdfq"),
        ("quantize", "--recipe", "gdfq", "--images", "DIR", "-w", "4", "-a", "4"),
        (
            "sweep",
            "--recipe",
            "gdfq",
            "--images",
            "DIR",
            "--vary",
            "student.lr=0.1,0.2",
            "--set",
            "schedule.held_out=8",
        ),
        ("reproduce", "gdfq/main/gdfq-cifar10-w4a4", "--images", "DIR", "--model"),
    ],
    ids=lambda words: words[0],
)
def test_a_recipe_without_images_is_refused(capsys, tiny, tmp_path, verb):
    images = str(tmp_path / "images")
    out = ["--out", images if verb[0] == "synthesize" else tmp_path / "run"]
    code, _, err = call(
        capsys, *(images if word == "DIR" else word for word in verb), *tiny.model, *out, "--threads", 1
    )
    assert code == 2 and "the recipe 'gdfq' has no optimised images" in assert_one_sentence(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["2/2", "1", "0/0", "-1/2", "a/b", "1/2/3"])
def test_wrong_parts(capsys, tiny, tmp_path, text):
    code, _, err = call(capsys, *words(tiny, tmp_path / "x", f"--shard={text}"))
    assert code == 2 and "is not I/N with I from 0 to N - 1" in assert_one_sentence(err)


def test_batches_that_follow_from_each_other_cannot_be_divided(capsys, tiny, tmp_path):
    code, _, err = call(capsys, *words(tiny, tmp_path / "x", "--shard", "0/2", recipe="intraq"))
    assert code == 2 and "images.distance_weight" in assert_one_sentence(err) and not (tmp_path / "x").exists()


def test_an_untrained_network_gives_no_images(capsys, tiny, tmp_path):
    spec = [f"{tiny.source}:tiny", "--allow-import", "--input-size", "3,8,8"]
    code, _, err = call(capsys, "synthesize", *spec, "--recipe", "hast", "--out", tmp_path / "x", *NUMBERS)
    assert code == 3 and "looks untrained" in assert_one_sentence(err) and not (tmp_path / "x").exists()
