"""Networks, checkpoints, and what a bad checkpoint or model name is answered with."""

import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.models import ResNetCifar, load_model

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
RESNET20 = SHARED / "data" / "cifar10_resnet20_akamaster.safetensors"
needs_shared = pytest.mark.skipif(not RESNET20.exists(), reason="no shared test data: set ZSQ_SHARED")


def small(**options):
    torch.manual_seed(0)
    return ResNetCifar(**{"depth": 8, "widths": (4, 8, 16), "num_classes": 5, **options}).eval()


def save(model, path, **changes):
    tensors = {**model.state_dict(), **changes}
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
    return path


FACTORY = """
from zsq_fast.models import ResNetCifar
def net(num_classes=5):
    return ResNetCifar(8, num_classes, widths=(4, 8, 16))
def broken():
    return 3
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    return f"{tmp_path / 'nets.py'}:net"


def load(factory, path, **options):
    return load_model(factory, path, allow_import=True, **options)


def test_resnet20_counts_are_those_of_the_specification():
    model = load_model("resnet20").model
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(weights), sum(w.numel() for w in weights)) == (22, 270_896)
    assert (min(w.numel() for w in weights), max(w.numel() for w in weights)) == (432, 36_864)
    assert (len(norms), sum(m.num_features for m in norms)) == (21, 784)
    assert sum(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d)) == 0


@pytest.mark.parametrize("kind", ["A", "B"])
def test_every_relu_is_called_exactly_once_per_forward(kind):
    model, calls = ResNetCifar(20, shortcut=kind).eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert list(calls.values()) == [1] * 19


def test_shortcut_a_subsamples_and_pads_both_sides():
    shortcut = ResNetCifar(20, shortcut="A").layer2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and y.shape == (2, 32, 4, 4)
    assert not y[:, :8].any() and not y[:, 24:].any() and not list(shortcut.parameters())


@pytest.mark.parametrize(
    "bad", [{"depth": 21}, {"depth": 2}, {"shortcut": "C"}, {"widths": (8, 4, 16), "shortcut": "A"}]
)
def test_impossible_architectures_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        small(**bad)


@needs_shared
def test_real_checkpoint_brings_its_shortcut_kind_and_normalisation():
    loaded = load_model("resnet20", RESNET20)
    assert loaded.input_size == (3, 32, 32) and loaded.num_classes == 10 and not loaded.random_weights
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    assert loaded.sha256.startswith("8929e25a") and not loaded.model.training
    assert torch.equal(loaded.model.conv1.weight, safetensors.torch.load_file(RESNET20)["conv1.weight"])
    with pytest.raises(BadFileError, match=r"missing.*layer2\.0\.shortcut\.0\.weight"):
        load_model("resnet20_b", RESNET20)


def test_without_weights_the_model_says_so(factory):
    assert load_model("resnet20").random_weights and load_model("resnet20_a", num_classes=7).num_classes == 7
    assert not load(factory, None).random_weights


@pytest.mark.parametrize("form", ["plain", "wrapped", "prefixed", "no_counters"])
def test_accepted_forms_of_a_checkpoint_give_the_same_logits(tmp_path, factory, form):
    model = small()
    model.bn1.running_mean.normal_()
    state = model.state_dict()
    if form == "prefixed":
        state = {f"module.{k}": v for k, v in state.items()}
    if form == "no_counters":
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "epoch": 3} if form == "wrapped" else state, tmp_path / "w.pth")
    loaded = load(factory, tmp_path / "w.pth")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.model(x), model(x)) and loaded.num_classes == 5


def test_header_metadata_gives_size_and_normalisation(tmp_path, factory):
    meta = {"norm": "mean 0.5 std 0.25", "input_size": "3,16,24"}
    safetensors.torch.save_file(small().state_dict(), tmp_path / "w.safetensors", metadata=meta)
    loaded = load(factory, tmp_path / "w.safetensors")
    assert (loaded.mean, loaded.std, loaded.input_size) == ((0.5,) * 3, (0.25,) * 3, (3, 16, 24))
    for bad in ({"norm": "mean 0.5,0.5 std 1,1"}, {"norm": "caffe"}, {"norm": "mean 0 std 0"}, {"input_size": "16"}):
        safetensors.torch.save_file(small().state_dict(), tmp_path / "w.safetensors", metadata=bad)
        with pytest.raises(BadFileError, match=rf"w\.safetensors.*{next(iter(bad))}"):
            load(factory, tmp_path / "w.safetensors")


def test_missing_and_unknown_files(tmp_path, factory):
    with pytest.raises(BadFileError, match=r"gone\.safetensors: no such file"):
        load(factory, tmp_path / "gone.safetensors")
    with pytest.raises(BadFileError, match="not a known kind"):
        load(factory, tmp_path / "w.onnx")
    (tmp_path / "dir.pt").mkdir()
    with pytest.raises(BadFileError, match="cannot be read"):
        load(factory, tmp_path / "dir.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, 2000, -1])
def test_truncated_files_are_named(tmp_path, factory, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save(small(), path) if suffix == ".safetensors" else torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFileError, match=rf"w\{suffix}: truncated"):
        load(factory, path)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickled_code_is_never_run_and_the_conversion_is_offered(tmp_path, factory, writer):
    trap = Trap()
    trap.target = str(tmp_path / "ran")
    path = tmp_path / "it's.pt"
    torch.save({"w": trap}, path) if writer == "torch" else path.write_bytes(pickle.dumps({"w": trap}))
    with pytest.raises(BadFileError, match="would run code from the file"):
        load(factory, path)
    assert not (tmp_path / "ran").exists()


def test_the_offered_conversion_works(tmp_path, factory):
    path = tmp_path / "whole model.pt"
    torch.save(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(BadFileError) as caught:
        load(factory, path)
    command = shlex.split(str(caught.value).split("yourself: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert set(safetensors.torch.load_file(path.with_suffix(".safetensors"))) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1.weight": None}, r"missing.*'bn1\.weight'"),
        ({"bn1.weight": None, "bn1.gamma": torch.ones(4)}, r"'bn1\.weight'.*Did you mean 'bn1\.gamma'"),
        ({"extra": torch.ones(1)}, r"do not belong.*'extra'"),
        ({"conv1.weight": torch.ones(4, 3, 5, 5)}, r"'conv1\.weight' has shape \[4, 3, 5, 5\].*\[4, 3, 3, 3\]"),
        ({"conv1.weight": torch.full((4, 3, 3, 3), float("nan"))}, r"'conv1\.weight' contains NaN"),
        ({"bn1.running_var": torch.full((4,), float("inf"))}, r"'bn1\.running_var' contains NaN or inf"),
        ({"bn1.bias": torch.ones(4, dtype=torch.int8)}, r"'bn1\.bias' is torch\.int8"),
        ({"linear.weight": torch.ones(9, 16), "linear.bias": torch.ones(9)}, "made for 9 classes.*num_classes=9"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_copied(tmp_path, factory, changes, message):
    path = save(small(), tmp_path / "w.safetensors", **changes)
    with pytest.raises(BadFileError, match=message):
        load(factory, path)


def test_class_count_comes_from_the_checkpoint_and_a_contradiction_is_named(tmp_path):
    path = save(ResNetCifar(20, 100), tmp_path / "w.safetensors")
    assert load_model("resnet20", path).num_classes == 100
    with pytest.raises(BadFileError, match=r"made for 100 classes.*has 10"):
        load_model("resnet20", path, num_classes=10)


def test_entries_that_are_not_tensors_are_named(tmp_path, factory):
    torch.save({"lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(BadFileError, match="'lr' is a float"):
        load(factory, tmp_path / "w.pt")
    torch.save([torch.ones(1)], tmp_path / "w.pt")
    with pytest.raises(BadFileError, match="holds a list"):
        load(factory, tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnt20", "Did you mean 'resnet20'"),
        ("tochvision:resnet18", "Did you mean 'torchvision'"),
        ("os:getcwd", "would run code from 'os'.*--allow-import"),
    ],
)
def test_bad_specs_offer_the_nearest_name(spec, message):
    with pytest.raises(UsageError, match=message):
        load_model(spec)


def test_factories(tmp_path, factory, monkeypatch):
    with pytest.raises(UsageError, match="allow_import"):
        load_model(factory)
    assert load(factory, None, num_classes=3).model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    monkeypatch.syspath_prepend(tmp_path)
    assert load("nets:net", None).num_classes == 5
    file = factory.removesuffix(":net")
    for spec, error, message in [
        (f"{file}:broken", UsageError, "returned a int"),
        (f"{file}:absent", UsageError, "no callable 'absent'"),
        ("no_such_module:f", UsageError, "cannot be found"),
        ("no_such_file.py:f", BadFileError, "no such file"),
    ]:
        with pytest.raises(error, match=message):
            load(spec, None)


@pytest.mark.parametrize("library", ["torchvision", "timm", "pytorchcv"])
def test_a_missing_library_is_named_with_its_pip_command(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=f"pip install {library}"):
        load_model(f"{library}:resnet18")


@pytest.mark.parametrize(
    ("library", "name", "typo", "size"),
    [
        ("torchvision", "squeezenet1_1", "squeezenet1_9", (3, 224, 224)),
        ("timm", "mobilenetv2_035", "mobilnetv2_035", (3, 224, 224)),
        ("pytorchcv", "resnet20_cifar10", "resnet20_cifr10", (3, 32, 32)),
    ],
)
def test_library_models(library, name, typo, size, tmp_path):
    pytest.importorskip(library)
    loaded = load_model(f"{library}:{name}")
    assert loaded.random_weights and loaded.input_size == size and len(loaded.mean) == len(loaded.std) == 3
    with pytest.raises(UsageError, match=f"no model '{typo}'. Did you mean '"):
        load_model(f"{library}:{typo}")
    if library == "timm":
        with pytest.raises(UsageError, match=f"no model '{name}.nonsense'"):
            load_model(f"timm:{name}.nonsense")
    path = save(loaded.model, tmp_path / "w.safetensors")
    again = load_model(f"{library}:{name}", path)
    x = torch.randn(1, *size)
    assert not again.random_weights and torch.equal(again.model(x), loaded.model(x))
