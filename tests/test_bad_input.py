"""Bad input: one sentence that names the thing, the exit code of its kind, nothing half-written, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from cli_support import SHORT, SIZE, assert_one_sentence, call, make_tiny, state_of
from safetensors.torch import save_file

from zsq_fast.runs import RunDir


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def refuse(capsys, tmp_path, words, code, *texts):
    """The command line ends with `code` and one sentence with all `texts`; no run directory appears."""
    before = {path.name for path in tmp_path.iterdir()}
    found, out, err = call(capsys, *words)
    line = assert_one_sentence(err)
    assert found == code, err
    assert out == ""
    for text in texts:
        assert str(text) in line
    assert {path.name for path in tmp_path.iterdir()} == before, "something was left behind"


@pytest.fixture
def quantize(capsys, tmp_path, tiny):
    """refuse() for `quantize`, with sound values for everything that the test does not give."""

    def run(code, *texts, model=None, recipe="ait", bits=("-w", 4, "-a", 4), extra=()):
        words = [
            "quantize",
            *(model or tiny.model),
            "--recipe",
            recipe,
            *bits,
            "--out",
            tmp_path / "run",
            *SHORT,
            *extra,
        ]
        refuse(capsys, tmp_path, words, code, *texts)

    return run


@pytest.mark.parametrize("value", ["1", "9", "x", "4.0", "-4", ""])
@pytest.mark.parametrize("option", ["-w", "--act-bits"])
def test_bits(quantize, option, value):
    quantize(2, f"'{value}'", "from 2 to 8", bits=("-w", 4, "-a", 4, option, value))


@pytest.mark.parametrize(
    ("extra", "texts"),
    [
        (["--recipes", "ait"], ["--recipes", "Did you mean '--recipe'?"]),
        (["--wieght-bits", "4"], ["Did you mean '--weight-bits'?"]),
        (["surplus"], ["'surplus'"]),
        (["--schedule", "shrt"], ["'shrt'", "Did you mean 'short'?"]),
        (["--seed", "one"], ["'one'"]),
        (["--seed", "-1"], ["'-1'"]),
        (["--seed", "99999999999999999999"], ["'99999999999999999999'", "seed"]),
        (["--device", "gpu"], ["'gpu'", "cuda"]),
        (["--device", "cuda:99"], ["cuda:99", "device"]),
        (["--threads", "0"], ["'0'"]),
        (["--input-size", "32"], ["'32'", "3,224,224"]),
        (["--input-size", "3,0,8"], ["'3,0,8'"]),
        (["--input-size", "3,-8,8"], ["'3,-8,8'"]),
        (["--mean", "a,b"], ["'a,b'"]),
        (["--mean", "nan"], ["'nan'"]),
        (["--num-classes", "0"], ["'0'"]),
        (["--set"], ["--set"]),
        (["--eval-limit", "0"], ["'0'"]),
    ],
)
def test_options(quantize, extra, texts):
    quantize(2, *texts, extra=extra)


@pytest.mark.parametrize("words", [["quantize"], ["quantize", "resnet20"], ["resume"], ["evaluate", "resnet20"]])
def test_missing_arguments(capsys, tmp_path, words):
    refuse(capsys, tmp_path, words, 2, "required")


def test_misspelt_required_option(capsys, tmp_path):
    refuse(capsys, tmp_path, ["evaluate", "resnet20", "--dta", "x.npz"], 2, "'--dta'", "Did you mean '--data'?")


def test_recipes(quantize, tmp_path):
    quantize(2, "'aitt'", "Did you mean 'ait'?", recipe="aitt")
    quantize(2, "absent.toml", recipe=tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[train\nsteps = = 1")
    quantize(2, "broken.toml", recipe=tmp_path / "broken.toml")
    (tmp_path / "strange.toml").write_text("[schedule]\nepoch = 3")
    quantize(2, "schedule.epoch", "Did you mean 'epochs'?", recipe=tmp_path / "strange.toml")


ODD_RECIPES = [
    b"\xff\xfe\x00",
    b"extends = 'RECIPE'",
    b"extends = 'a\\u0000b.toml'",
    b"extends.a.b = 1",
    b"schedule = 3",
    b"title = 3",
    b"title = " + b"[" * 3000 + b"]" * 3000,
    b"schedule.epochs = " + b"1" * 5000,
    b"student.lr." + b"a." * 3000 + b"a = 1",
]


@pytest.mark.parametrize("content", ODD_RECIPES, ids=range(len(ODD_RECIPES)))
def test_odd_recipe_files(quantize, tmp_path, content):
    path = tmp_path / "odd.toml"
    path.write_bytes(content.replace(b"RECIPE", str(path).encode()))
    quantize(2, recipe=path)


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("student.momentun=0.5", ["Did you mean 'momentum'?"]),
        ("studnet.lr=1", ["Did you mean 'student'?"]),
        ("novalue", ["'novalue'"]),
        ("=", ["'='"]),
        ("a.b.c=1", ["'a.b.c=1'"]),
        ("quant.weight_bits=9", ["quant.weight_bits", "2 to 8"]),
        ("student.lr=fast", ["student.lr", "number"]),
        ("student.lr=nan", ["student.lr", "finite"]),
        ("schedule.epochs=2.5", ["schedule.epochs"]),
        ("generator.kind=gan", ["generator.kind", "'plain'"]),
        ("name.x=1", ["name"]),
        ("title.x=1", ["title"]),
        (f"student.lr=1{'0' * 400}", ["student.lr", "finite", "000..."]),
        (f"student.lr=1{'0' * 5000}", ["student.lr", "finite"]),
        (f"student.lr=0x1{'0' * 5000}", ["student.lr", "finite"]),
        (f"schedule.epochs=1{'0' * 400}", ["schedule.epochs", "whole number"]),
        (f"student.lr={'[' * 3000}{']' * 3000}", ["student.lr", "finite"]),
        ("student.lr=1\nfoo=2", ["'student.lr=1\\nfoo=2'", "section.option=value"]),
        ("generator.bns_weight=-1", ["generator.bns_weight", "at least 0"]),
        ("generator.ce_weight=-1", ["generator.ce_weight", "at least 0"]),
        ("generator.genotype=cifar10_resnet21", ["Did you mean 'cifar10_resnet20'?"]),
        ("schedule.milestones=[1, -1]", ["schedule.milestones", "at least 0"]),
        ("schedule.held_out=1e30", ["schedule.held_out", "whole number"]),
        ("schedule.held_out=1e9", ["schedule.held_out", "10000000"]),
    ],
)
def test_recipe_overrides(quantize, override, texts):
    quantize(2, *texts, extra=["--set", override])


@pytest.mark.parametrize(
    ("model", "code", "texts"),
    [
        (["resnet21"], 2, ["'resnet21'", "Did you mean 'resnet20'?"]),
        (["resnet20"], 2, ["random weights", "--checkpoint"]),
        (["torchvison:resnet18"], 2, ["Did you mean 'torchvision'?"]),
        (["no_such_module_of_mine:build"], 2, ["--allow-import"]),
        (["no_such_module_of_mine:build", "--allow-import"], 2, ["no_such_module_of_mine"]),
        (["/nowhere/net.py:build", "--allow-import"], 4, ["/nowhere/net.py"]),
        ([f"{'n' * 300}.py:build", "--allow-import"], 4, ["nnn.py"]),
    ],
)
def test_models(quantize, model, code, texts):
    quantize(code, *texts, model=model)


@pytest.mark.parametrize(
    ("factory", "code", "texts"),
    [
        ("nothing", 3, ["nn.Conv2d", "Softmax"]),
        ("no_norm", 3, ["batch"]),
        ("untracked", 3, ["batch"]),
        ("nan_weight", 3, ["NaN", "3.weight"]),
        ("absent", 2, ["'absent'"]),
        ("not_a_model", 2, ["dict"]),
        ("leave", 2, ["sys.exit('goodbye')", ":leave'"]),
        ("leave_well", 2, ["sys.exit(0)"]),
        ("hungry", 1, ["not enough memory", "--set schedule.batch_size=N"]),
        ("crash", 1, ["RuntimeError", "a bug in the user's factory with two lines", "--debug"]),
    ],
)
def test_networks(quantize, tiny, factory, code, texts):
    quantize(code, *texts, model=tiny.spec(factory))


def test_untrained_network_needs_force(quantize, tiny):
    quantize(3, "untrained", "--force", model=tiny.spec("tiny"))


def test_input_size(quantize, tiny):
    quantize(2, "--input-size", model=[f"{tiny.source}:no_norm", "--allow-import"])
    quantize(2, "(1, 8, 8)", extra=["--input-size", "1,8,8"])


def with_checkpoint(tiny, path):
    return [*tiny.model[:-1], path]


def test_checkpoint_missing_or_of_another_network(quantize, tiny, tmp_path):
    good = state_of(tiny)
    quantize(4, "absent.safetensors", model=with_checkpoint(tiny, tmp_path / "absent.safetensors"))
    quantize(4, str(tmp_path), model=with_checkpoint(tiny, tmp_path))
    path = tmp_path / "changed.safetensors"
    changes = {
        "missing": {k: v for k, v in good.items() if k != "3.weight"},
        "3.weight": good | {"3.weight": torch.zeros(8, 8, 3, 3)},
        "surplus": good | {"surplus": torch.zeros(1)},
        "--num-classes": good | {"8.weight": torch.zeros(6, 8), "8.bias": torch.zeros(6)},
        "NaN": good | {"0.weight": torch.full_like(good["0.weight"], float("nan"))},
        "'1.running_var' contains negative variances": good | {"1.running_var": -good["1.running_var"]},
    }
    for text, tensors in changes.items():
        save_file(tensors, path)
        quantize(4, path.name, text, model=with_checkpoint(tiny, path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_corrupted_checkpoints(quantize, tiny, tmp_path, suffix):
    """Truncated at many places, and random bytes: refused every time."""
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state_of(tiny), path)
        data = path.read_bytes()
    else:
        data = tiny.checkpoint.read_bytes()
    rng = random.Random(0)
    for bad in [b"", b"\x80", rng.randbytes(300), *(data[: rng.randrange(len(data))] for _ in range(20))]:
        path.write_bytes(bad)
        quantize(4, path.name, model=with_checkpoint(tiny, path))


class Gadget:
    """Unpickling it creates a file: what a malicious checkpoint would do with less modest means."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["plain", "torch", "state_dict", "legacy", "zip", "renamed"])
def test_malicious_pickles_are_refused_and_not_executed(capsys, tiny, tmp_path, kind):
    place = tmp_path / "files"
    place.mkdir()
    trap, path = tmp_path / "executed", place / ("w.safetensors" if kind == "renamed" else "w.pt")
    content = {"state_dict": state_of(tiny), "x": Gadget(trap)} if kind == "state_dict" else Gadget(trap)
    if kind == "zip":
        torch.save(state_of(tiny), path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, pickle.dumps(Gadget(trap)) if name.endswith("data.pkl") else data)
    elif kind in ("plain", "renamed"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    words = [*SHORT, "--recipe", "ait", "-w", 4, "-a", 4, "--out", tmp_path / "run"]
    refuse(capsys, tmp_path, ["quantize", *with_checkpoint(tiny, path), *words], 4, path.name)
    assert not trap.exists(), "the pickle was executed"
    assert pickle.loads(pickle.dumps(Gadget(trap))) is None and trap.exists()  # noqa: S301  the trap does work


def test_test_images(capsys, quantize, tiny, tmp_path):
    quantize(4, "absent.npz", extra=["--eval-data", tmp_path / "absent.npz"])
    bad = tmp_path / "bad.npz"
    bad.write_bytes(tiny.images.read_bytes()[:500])
    quantize(4, "bad.npz", extra=["--eval-data", bad])
    refuse(capsys, tmp_path, ["evaluate", *tiny.model, "--data", bad], 4, "bad.npz")
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(bad, images=images, labels=np.array([0, 1, 2, 9]))
    refuse(capsys, tmp_path, ["evaluate", *tiny.model, "--data", bad], 4, "9")
    np.savez(bad, images=images[..., :1], labels=np.zeros(4, dtype=np.int64))
    refuse(capsys, tmp_path, ["evaluate", *tiny.model, "--data", bad], 2, "channels")
    np.savez(bad, images=images, labels=np.array([object()] * 4))
    refuse(capsys, tmp_path, ["evaluate", *tiny.model, "--data", bad], 4, "bad.npz")
    unknown = [*tiny.spec("tiny"), "--data", tiny.images]
    refuse(capsys, tmp_path, ["evaluate", *unknown], 2, "--mean")


def test_output_directory(quantize, tiny, tmp_path):
    occupied = tmp_path / "run"
    RunDir.create(occupied, {}, {}).close()
    quantize(2, f"zsq-fast resume {occupied}")
    for path in occupied.iterdir():
        path.unlink()
    (occupied / "thesis.tex").write_text("")
    quantize(2, "thesis.tex")
    quantize(2, "is a file", extra=["--out", tiny.source])
    for name in "\ud800", "a\0b":
        quantize(2, repr(name), "character", extra=["--out", name])


def test_names_too_long_for_the_file_system(capsys, quantize, tiny, tmp_path):
    long = tmp_path / ("n" * 300)
    quantize(2, "too long", "--out", extra=["--out", long])
    quantize(4, "nnn", extra=["--eval-data", long])
    for data in long, f"{long}.npz":
        refuse(capsys, tmp_path, ["evaluate", *tiny.model, "--data", data], 4, data)
    refuse(capsys, tmp_path, ["evaluate", long, "--data", tiny.images], 2, "nnn")
    refuse(capsys, tmp_path, ["resume", long], 4, "nnn")
    refuse(capsys, tmp_path, ["demo", "--out", long], 2, "too long")


def test_demo_output_and_seed(capsys, tiny, tmp_path):
    for out in tiny.source, tiny.source / "below":
        refuse(capsys, tmp_path, ["demo", "--out", out], 2, "is a file")
    refuse(capsys, tmp_path, ["demo", "--seed", 1 << 63], 2, str(1 << 63))


def test_failure_before_the_first_checkpoint_leaves_nothing(quantize):
    quantize(5, "epoch 1", extra=["--set", "generator.lr=1e38", "--quiet"])


def test_resume(capsys, tmp_path):
    refuse(capsys, tmp_path, ["resume", tmp_path], 4, "not a run directory")
    refuse(capsys, tmp_path, ["resume", tmp_path / "absent"], 4, "absent")
    RunDir.create(tmp_path / "foreign", {}, {}).close()
    refuse(capsys, tmp_path, ["resume", tmp_path / "foreign"], 4, "foreign")
    manifest = tmp_path / "foreign" / "MANIFEST.json"
    manifest.write_text(json.dumps({"files": {"../../x": {}}}))
    refuse(capsys, tmp_path, ["resume", tmp_path / "foreign"], 4, "foreign")
    manifest.write_text("[" * 100_000)
    refuse(capsys, tmp_path, ["resume", tmp_path / "foreign"], 4, "MANIFEST.json")


def test_no_space_left(quantize, tiny, monkeypatch):
    """Every write of the run fails: exit code 74 and no directory, whichever comes first."""
    real = os.write

    def full(fd, data):
        if fd > 2:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    quantize(74, "no space left", extra=["--input-size", SIZE])
