"""The demo from end to end in its quick form, and the cache of its float network."""

import json
import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
image = pytest.importorskip("matplotlib.image", reason="the demo draws with matplotlib")

from zsq_fast.data import evaluate  # noqa: E402
from zsq_fast.demo import digits as toy  # noqa: E402
from zsq_fast.demo import main  # noqa: E402
from zsq_fast.demo.table import Row, markdown  # noqa: E402
from zsq_fast.errors import Interrupted, StorageError, UsageError  # noqa: E402

QUICK = toy.Settings(epochs=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield toy.cache_folder()


@pytest.fixture(scope="module")
def out(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    assert main(["--quick", "--quiet", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "result.json").read_text())


def test_every_network_has_its_row(result):
    found = [(row["method"], row["bits"]) for row in result["rows"]]
    expected = [(method, bits) for bits in (4, 3) for method in ("rtn", "gdfq", "kl_only", "ait")]
    assert found == [("float", None), *expected]
    for row in result["rows"]:
        assert row["count"] == 600 and row["accuracy"] == pytest.approx(100 * row["correct"] / 600)
        assert row["seconds"] >= 0 and row["minutes"] == pytest.approx(row["seconds"] / 60)


def test_accuracies_are_those_of_the_last_epoch_and_round_to_nearest_is_every_run_s_start(result):
    rows = {(row["method"], row["bits"]): row for row in result["rows"]}
    for curve in result["curves"]:
        row = rows[curve["method"], curve["bits"]]
        assert curve["accuracies"][-1][1] == pytest.approx(row["accuracy"])
        # A run of its own up to the end of the warm-up must stand where the others stood there.
        assert curve["accuracies"][0] == [0, pytest.approx(rows["rtn", curve["bits"]]["accuracy"])]
        assert len(curve["losses"]) == (0 if curve["method"] == "rtn" else 2)


def test_float_row_can_be_measured_again_from_the_cache(result):
    data = toy.load_digits()
    model, cached = toy.trained_network(data, QUICK)
    top1 = evaluate(model, data.test, mean=data.mean, std=data.std).top1
    assert cached and top1 == pytest.approx(result["rows"][0]["accuracy"], abs=0.4) and top1 > 60
    assert result["rows"][0]["size_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_sizes_fall_with_the_bits(result):
    size = {row["bits"]: row["size_bytes"] for row in result["rows"]}
    weights = 8 * (size[4] - size[3])  # one bit less of each quantized weight, up to rounding per tensor
    model = toy._network(QUICK)
    quantized = [m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert sum(quantized) - 8 * len(quantized) <= weights <= sum(quantized) + 8 * len(quantized)
    assert size[3] < size[4] < size[None] / 3


def test_table_and_pictures(out, result):
    rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in result["rows"]]
    table = (out / "table.md").read_text()
    assert markdown(rows) in table and "toy" in table
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + 9
    for name, least in (("synthetic_images.png", (600, 1000)), ("curves.png", (800, 1200))):
        pixels = image.imread(out / name)
        assert pixels.shape[0] >= least[0] and pixels.shape[1] >= least[1] and pixels[..., :3].std() > 0.05
    names = {path.name for path in out.iterdir()}
    assert names == {"curves.png", "result.json", "synthetic_images.png", "table.md"}


def test_split_is_fixed_and_disjoint():
    data, again = toy.load_digits(), toy.load_digits()
    assert len(data.train_images) == 1197 and len(data.test) == 600 and set(data.test.labels.tolist()) == set(range(10))
    assert torch.equal(data.test.fetch(0, 600), again.test.fetch(0, 600))
    train = {tuple(picture.flatten().tolist()) for picture in data.train_images}
    assert not any(tuple(picture.flatten().tolist()) in train for picture in data.test.fetch(0, 600))


def test_cache_is_keyed_by_settings_and_a_damaged_file_is_replaced(cache):
    settings, data = toy.Settings(epochs=1, depth=8, widths=(4, 4, 4)), toy.load_digits()
    first, cached = toy.trained_network(data, settings)
    assert not cached and toy.trained_network(data, settings)[1]
    assert settings.cache_name() != toy.Settings(epochs=1, depth=8, widths=(4, 4, 4), seed=1).cache_name()
    path = cache / settings.cache_name()
    path.write_bytes(path.read_bytes()[:-9])
    second, cached = toy.trained_network(data, settings)
    assert not cached and toy.trained_network(data, settings)[1]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_cache_that_cannot_be_written_is_only_noted(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    toy.trained_network(toy.load_digits(), toy.Settings(epochs=1, depth=8, widths=(4, 4, 4)))
    assert "not cached" in capsys.readouterr().err


def test_bad_options_cost_no_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("zsq_fast.demo.load_digits", lambda: pytest.fail("work before the checks"))
    with pytest.raises(UsageError, match="file"):
        main(["--out", str(tmp_path / "file")])
    with pytest.raises(UsageError, match="--quick"):
        main(["--qiuck"])
    for missing in "sklearn", "matplotlib":
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"pip install '\.\[demo\]'"):
            patch.setitem(sys.modules, missing, None)
            main(["--out", str(tmp_path / "out")])
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageError, match="not writable"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_numbers_are_kept_when_the_pictures_fail(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("zsq_fast.demo.contact_sheet", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--quick", "--quiet", "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "table.md"}


def test_a_stopped_demo_says_that_it_keeps_nothing(cache, tmp_path, monkeypatch):
    def stop(trainers):
        raise Interrupted("stopped; see --out", 15)

    monkeypatch.setattr("zsq_fast.demo.run_together", stop)
    with pytest.raises(Interrupted, match="started again") as caught:
        main(["--quick", "--quiet", "--out", str(tmp_path / "out")])
    assert caught.value.exit_code == 143 and not (tmp_path / "out").exists()
