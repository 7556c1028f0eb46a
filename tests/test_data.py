"""Test images from .npz and folders, and the accuracy counted on them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zsq_fast.data import evaluate, load_eval_data
from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.models import load_model

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
NORM = {"mean": (0.0,), "std": (1 / 255,)}


class FromPixels(nn.Module):
    """The first `classes` pixel values of channel 0 are the logits: accuracy can be worked out by hand."""

    def __init__(self, classes=8):
        super().__init__()
        self.classes, self.norm, self.batches = classes, nn.BatchNorm2d(1), []

    def forward(self, x):
        assert not self.training and torch.is_inference_mode_enabled()
        self.batches.append(x)
        return x[:, 0].flatten(1)[:, : self.classes]


def write(path, count=7, **changes):
    """Image i has its pixels ranked so that class j has rank (j - label_i) mod 8 for j = 0..7."""
    images = np.zeros((count, 2, 4, 1), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 8
    for i in range(count):
        images[i].reshape(-1)[:] = [100 - 10 * ((j - int(labels[i])) % 8) for j in range(8)]
    arrays = {"images": images, "labels": labels, **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_top1_and_top5_are_counted_exactly(tmp_path):
    # Shifting the labels moves the true class to rank 0, 1, 4, 5: top-5 still holds ranks 0..4.
    for shift, top1, top5 in ((0, 100, 100), (1, 0, 100), (4, 0, 100), (5, 0, 0)):
        path = write(tmp_path / "d.npz", labels=(np.arange(7) + shift) % 8)
        result = evaluate(FromPixels(), load_eval_data(path), batch_size=3, **NORM)
        assert (result.top1, result.top5, result.count) == (top1, top5, 7) and result.seconds > 0
    labels = np.arange(7)
    labels[:2] += 1
    data = load_eval_data(write(tmp_path / "d.npz", labels=labels))
    assert evaluate(FromPixels(), data, **NORM).top1 == pytest.approx(500 / 7)


def test_limit_normalisation_memory_format_and_progress(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    path = write(tmp_path / "d.npz", count=5, images=images)
    model, seen = FromPixels(), []
    data = load_eval_data(path, limit=3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    evaluate(model, data, mean=mean, std=std, batch_size=2, channels_last=True, progress=lambda *p: seen.append(p))
    assert len(data) == 3 and seen == [(2, 3), (3, 3)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in model.batches)
    expected = (images[:3].astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    np.testing.assert_allclose(torch.cat(model.batches).permute(0, 2, 3, 1).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_grey_images_without_a_channel_axis(tmp_path):
    data = load_eval_data(write(tmp_path / "d.npz", images=np.zeros((7, 2, 4), np.uint8)))
    assert data.fetch(0, 7).shape == (7, 1, 2, 4)


def test_the_model_comes_back_in_the_mode_of_each_of_its_modules(tmp_path):
    data, model = load_eval_data(write(tmp_path / "d.npz")), FromPixels().train()
    model.norm.eval()
    evaluate(model, data, **NORM)
    assert model.training and not model.norm.training
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, data, **NORM)
    assert model.training and not model.norm.training


def test_images_without_finite_logits_count_as_wrong(tmp_path):
    model, data = FromPixels(), load_eval_data(write(tmp_path / "d.npz", labels=np.zeros(7, np.int64)))
    model.forward = lambda x: torch.full((len(x), 8), float("nan"))
    assert evaluate(model, data, **NORM)[:2] == (0, 0)


def test_a_label_without_a_logit_is_named(tmp_path):
    data = load_eval_data(write(tmp_path / "d.npz"))
    with pytest.raises(BadFileError, match=r"d\.npz: labels up to 6, the model has 6 outputs"):
        evaluate(FromPixels(6), data, **NORM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "no array 'labels'"),
        ({"images": None}, "no array 'images'"),
        ({"images": np.zeros((7, 2, 4, 1), np.float32)}, "'images' is float32"),
        ({"images": np.zeros((7, 2), np.uint8)}, r"'images' is uint8 \[7, 2\]"),
        ({"labels": np.zeros(6, np.int64)}, "7 images but 6 labels"),
        ({"labels": np.zeros(7, np.float32)}, "'labels' is float32"),
        ({"labels": np.full(7, -1)}, "class indices >= 0"),
        ({"labels": np.array([{}] * 7, dtype=object)}, "pickled"),
        ({"images": None, "jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 9])}, "one more entry than the 7"),
        ({"images": None, "jpeg": np.zeros(9, np.uint8), "offsets": np.arange(8) * 2}, "do not rise inside"),
    ],
)
def test_bad_archives_are_named(tmp_path, changes, message):
    with pytest.raises(BadFileError, match=rf"d\.npz.*{message}"):
        load_eval_data(write(tmp_path / "d.npz", **changes))


def test_bad_paths_and_options(tmp_path):
    good = write(tmp_path / "d.npz")
    for keep in (0, 1, 100, -1):
        (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:keep])
        with pytest.raises(BadFileError, match=r"cut\.npz: truncated"):
            load_eval_data(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for name in ("one.npz", "gone.npz", "gone"):
        with pytest.raises(BadFileError, match=name):
            load_eval_data(tmp_path / name)
    with pytest.raises(UsageError, match="limit 0"):
        load_eval_data(good, limit=0)
    data = load_eval_data(good)
    for options, message in [
        ({"mean": (0,), "std": (0,)}, "std above 0"),
        ({"mean": (0, 0), "std": (1, 1)}, "images have 1 channels"),
        ({**NORM, "batch_size": 0}, "batch size 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            evaluate(FromPixels(), data, **options)


def test_damage_anywhere_in_a_compressed_archive_is_a_bad_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 9, (7, 2, 4, 1), np.uint8)
    np.savez_compressed(tmp_path / "d.npz", images=images, labels=np.arange(7))
    good, refused = (tmp_path / "d.npz").read_bytes(), 0
    for place in range(len(good)):
        for flip in (1, 8, 255):
            bad = bytearray(good)
            bad[place] ^= flip
            (tmp_path / "d.npz").write_bytes(bad)
            try:
                load_eval_data(tmp_path / "d.npz")  # dates and the like may change
            except BadFileError:
                refused += 1
    assert refused > len(good)


def picture(path, size=(40, 30), seed=0):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path)
    return pixels


def test_a_folder_of_classes(tmp_path):
    picture(tmp_path / "zebra" / "1.png")
    pixels = picture(tmp_path / "ant" / "b" / "2.png", (32, 32), 1)
    picture(tmp_path / "ant" / "1.png", (20, 50))
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    data = load_eval_data(tmp_path, image_size=32)
    assert data.class_names == ("ant", "zebra") and data.labels.tolist() == [0, 0, 1]
    images = data.fetch(0, 3)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), pixels)  # already 32x32: taken as it is
    assert load_eval_data(tmp_path, limit=1).fetch(0, 1).shape == (1, 3, 224, 224)
    (tmp_path / "ant" / "1.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(BadFileError, match=r"1\.png: not a readable picture"):
        data.fetch(0, 1)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    with pytest.raises(BadFileError, match="no pictures in class folders"):
        load_eval_data(tmp_path / "empty")
    with pytest.raises(BadFileError, match=r"empty: no pictures in this class folder"):
        load_eval_data(tmp_path)


def test_hidden_folders_are_no_classes_and_a_limit_is_spread(tmp_path):
    for name in (".thumbnails/1", "a/.cache/0", "a/._1", *(f"{letter}/{i}" for letter in "abc" for i in range(4))):
        picture(tmp_path / f"{name}.png")
    assert load_eval_data(tmp_path).class_names == ("a", "b", "c")
    for limit, labels in {12: [0] * 4 + [1] * 4 + [2] * 4, 6: [0, 0, 1, 1, 2, 2], 3: [0, 1, 2], 99: None}.items():
        assert load_eval_data(tmp_path, limit=limit).labels.tolist() == (labels or [0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (100, 100), (301, 999)])
def test_resize_and_crop_agree_with_torchvision(tmp_path, size):
    transforms, image = pytest.importorskip("torchvision.transforms"), pytest.importorskip("PIL.Image")
    picture(tmp_path / "a" / "1.png", size)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    ours = load_eval_data(tmp_path).fetch(0, 1)[0]
    assert torch.equal(ours, expected(image.open(tmp_path / "a" / "1.png")))


@pytest.mark.skipif(not (SHARED / "imagenet_val_imagenette_500.npz").exists(), reason="no shared data: set ZSQ_SHARED")
def test_real_jpegs_in_an_archive():
    pytest.importorskip("PIL")
    data = load_eval_data(SHARED / "imagenet_val_imagenette_500.npz")
    assert len(data) == 500 and data.fetch(497, 500).shape == (3, 3, 224, 224)


@pytest.mark.skipif(not (SHARED / "cifar10_test.npz").exists(), reason="no shared test data: set ZSQ_SHARED")
def test_real_resnet20_has_its_published_accuracy_on_all_real_test_images():
    loaded = load_model("resnet20", SHARED / "cifar10_resnet20_akamaster.safetensors")
    data = load_eval_data(SHARED / "cifar10_test.npz")
    result = evaluate(loaded.model, data, mean=loaded.mean, std=loaded.std, channels_last=True)
    assert result.count == 10_000 and result.top1 == pytest.approx(91.73, abs=0.03)  # a few ties move with the CPU
