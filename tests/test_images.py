"""Optimised images: the losses of ZeroQ, IntraQ and HAST against plain formulas, crops against torchvision, files, resuming."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch
from networks import look_trained, tiny
from safetensors.torch import save_file
from torch import nn

from zsq_fast.errors import BadFileError, Interrupted, TrainingError, UnsupportedModelError, UsageError
from zsq_fast.methods import images as module
from zsq_fast.methods.images import (
    ImageSet,
    Plateau,
    cached_images,
    crop_boxes,
    find_classifier,
    image_statistics_loss,
    load_images,
    marginal_distance,
    provenance,
    random_crops,
    resized_crops,
    save_images,
    soft_inception,
    synthesize_images,
)
from zsq_fast.methods.recipe import Images, Recipe
from zsq_fast.runs.tensors import pack

SIZE = (3, 8, 8)
HAST = dict(hard_weight=10.0)
INTRAQ = dict(soft_weight=1.0, soft_floor=0.6, distance_weight=1.0, distance_low=0.2, distance_high=0.3,
              crop_probability=0.5)  # fmt: skip
ZEROQ = dict(statistics="image", init="zeroq", input_weight=1.0)


def spec(**options) -> Images:
    return Images(**{"count": 20, "batch_size": 8, "iterations": 5, **options})


def make(teacher=None, seed=0, *, how=synthesize_images, first=(), options=None, **fields) -> ImageSet:
    return how(*first, teacher or tiny(), spec(**fields), SIZE, 4, seed, **(options or {}))


def optimiser(teacher, **fields):
    return module._Optimiser(teacher, spec(**fields), SIZE, 4, 0, torch.contiguous_format)


def same(a: ImageSet, b: ImageSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# ---- recipe ------------------------------------------------------------------------------------------------------------


def test_images_are_off_unless_a_recipe_asks_for_them():
    assert not Recipe("x").images.enabled
    r = Recipe("x", images=Images(enabled=True, crop_scale=(0.4, 1.0)))
    assert Recipe.from_dict(r.to_dict()) == r


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"count": 0}, "images.count must be at least 1"),
        ({"batch_size": 0}, "images.batch_size"),
        ({"iterations": 0}, "images.iterations"),
        ({"lr": 0.0}, "images.lr must be positive"),
        ({"patience": -1}, "images.patience"),
        ({"plateau_factor": 1.0}, "images.plateau_factor"),
        ({"min_lr": 0.6}, "images.min_lr"),
        ({"init": "uniform"}, "images.init must be 'normal' or 'zeroq'"),
        ({"statistics": "layer"}, "images.statistics must be 'batch' or 'image'"),
        ({"hard_weight": -1.0}, "images.hard_weight must be at least 0"),
        ({"hard_gamma": -1.0}, "images.hard_gamma"),
        ({"bns_weight": 0.0}, "images.bns_weight must be positive when every other weight is 0"),
        ({"soft_floor": 1.1}, "images.soft_floor"),
        ({"crop_probability": 2.0}, "images.crop_probability"),
        ({"flip": -0.1}, "images.flip"),
        ({"distance_low": 0.9, "distance_high": 0.8}, "images.distance_low"),
        ({"crop_scale": (0.0, 1.0)}, "images.crop_scale"),
        ({"crop_scale": (0.5,)}, "images.crop_scale"),
    ],
)
def test_wrong_options(fields, words):
    with pytest.raises(UsageError, match=words):
        Images(**fields)


# ---- losses ------------------------------------------------------------------------------------------------------------


class TwoNorms(nn.Module):
    """Two batch norms that both see the image itself, so that the loss has a closed form in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 4)
        look_trained(self)

    def forward(self, x):
        return self.head((self.a(x) + self.b(x)).mean((2, 3)))


def test_batch_norm_gradient(device):
    """hast_family.md 11.3: the gradient of 5.1, to 1e-5 relative."""
    teacher = TwoNorms().to(device)
    o = optimiser(teacher)
    x, task, _ = o.start(0, 6)
    x = (2 * x + 0.5).requires_grad_()
    with o.tap:
        (grad,) = torch.autograd.grad(o._losses(x, task)[0], x)
    x64, expected = x.detach().double(), 0
    mu, v = x64.mean((0, 2, 3), keepdim=True), x64.var((0, 2, 3), correction=0, keepdim=True)
    for norm in (teacher.a, teacher.b):
        mean, var = (t.double().view(1, 3, 1, 1) for t in (norm.running_mean, norm.running_var))
        expected = expected + 2 / (2 * 3 * 6 * 64) * ((mu - mean) + 2 * (v - var) * (x64 - mu))
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_image_statistics(device):
    """hast_family.md section 2, image by image and channel by channel."""
    x = torch.randn(5, 3, 4, 6, device=device)
    mean, std = torch.randn(3, device=device), torch.rand(3, device=device)
    expected = 0.0
    for image in x.double():
        for channel, m, s in zip(image, mean, std):
            pixels = channel.flatten()
            var = (pixels - pixels.mean()).square().sum() / (len(pixels) - 1)
            expected += ((pixels.mean() - m) ** 2 + ((var + 1e-6).sqrt() - s) ** 2) / len(x)
    torch.testing.assert_close(image_statistics_loss(x, mean, std).double(), expected.double(), rtol=1e-5, atol=0)
    one = torch.randn(5, 3, 1, 1, device=device, requires_grad=True)  # deep layers of small inputs
    loss = image_statistics_loss(one, mean, std)
    assert loss.isfinite() and torch.autograd.grad(loss, one)[0].isfinite().all()


def test_zeroq_sums_layers_and_adds_the_input():
    teacher = tiny()
    o = optimiser(teacher, **ZEROQ)
    x, task, _ = o.start(0, 8)
    assert (x * 5418.75 + 127.5 - (x * 5418.75 + 127.5).round()).abs().max() < 1e-3 and x.abs().max() <= 0.0236
    with o.tap:
        loss, bns, _ = o._losses(x, task)
    first = teacher[0](x)
    second = teacher[3](teacher[2](teacher[1](first)))
    layers = [
        image_statistics_loss(y, norm.running_mean, (norm.running_var + 1e-6).sqrt())
        for y, norm in ((first, teacher[1]), (second, teacher[4]))
    ]
    torch.testing.assert_close(bns, sum(layers))
    torch.testing.assert_close(loss, bns + image_statistics_loss(x, torch.zeros(3), torch.ones(3)))


def test_marginal_distance_masks_classes_without_history(device):
    """hast_family.md 4.1."""
    f, c = torch.randn(2, 6, 5, device=device)
    f.requires_grad_()
    known = torch.tensor([1, 0, 1, 1, 0, 1], device=device).bool()
    expected = []
    for i in range(6):
        d = 1 - f[i] @ c[i] / (f[i].norm() * c[i].norm())
        if known[i]:
            expected.append(max(0.9 - d.item(), 0) + max(d.item() - 1.1, 0))
    loss = marginal_distance(f, c, known, 0.9, 1.1)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5) and loss > 0
    (grad,) = torch.autograd.grad(loss, f)
    assert not grad[~known].any() and grad[known].any()
    nobody = marginal_distance(f, torch.zeros_like(c), torch.zeros_like(known), 0.9, 1.1)
    assert nobody == 0 and not torch.autograd.grad(nobody, f)[0].any()


def test_class_centers_are_means_of_earlier_batches():
    """The first batch has no center; later ones have the mean feature of uncropped images of their class."""
    teacher, first = tiny(), {}
    with_history = make(teacher, **INTRAQ)
    without = make(teacher, **{**INTRAQ, "distance_weight": 0.0})
    assert torch.equal(with_history.images[:8], without.images[:8])
    assert not torch.equal(with_history.images[8:16], without.images[8:16])
    o = optimiser(teacher, **INTRAQ)
    assert not o.start(0, 8)[1].known.any()
    for part in (slice(0, 8), slice(8, 16)):
        o.remember(ImageSet(with_history.images[part], with_history.labels[part]))
    task = o.start(2, 4)[1]
    with torch.no_grad():
        features = teacher[:-1](with_history.images[:16])
    for label, center, known in zip(task.labels.tolist(), task.centers, task.known):
        members = features[with_history.labels[:16] == label]
        assert bool(known) == (len(members) > 0)
        if known:
            torch.testing.assert_close(center, members.mean(0), rtol=1e-5, atol=1e-6)
            first[label] = center
    assert first


@pytest.mark.parametrize("head", ["linear", "convolution"])
def test_classifier_is_found_by_structure(head):
    network = tiny()
    if head == "convolution":
        network = nn.Sequential(*network[:-2], nn.Conv2d(8, 4, 1), nn.Flatten())
    renamed = nn.Sequential()
    for i, layer in enumerate(network):
        renamed.add_module(f"anything{i}", layer)
    wanted = network[-1] if head == "linear" else network[-2]
    assert find_classifier(renamed, torch.zeros(1, *SIZE)) is wanted
    make(renamed, **INTRAQ)


@pytest.mark.parametrize("source, name, head", [
    ("torchvision.models", "resnet18", "fc"),
    ("torchvision.models", "mobilenet_v3_small", "classifier.3"),  # squeeze-and-excitation: 1x1 convolutions on pooled features
    ("pytorchcv.models.mobilenetv2", "mobilenetv2_w1", "output"),
])  # fmt: skip
def test_classifiers_of_known_networks(source, name, head):
    network = getattr(pytest.importorskip(source), name)().eval()
    assert find_classifier(network, torch.zeros(1, 3, 224, 224)) is network.get_submodule(head)


def test_network_without_pooled_features():
    network = nn.Sequential(*tiny()[:-3], nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"needs pooled features.*'6'"):
        make(network, **INTRAQ)
    make(network, **HAST)


def test_soft_inception(device):
    z = torch.randn(6, 4, device=device)
    y, t = torch.tensor([0, 1, 2, 3, 0, 1], device=device), torch.rand(6, device=device)
    expected = sum((z[i].softmax(0)[y[i]] - t[i]) ** 2 for i in range(6)) / 6
    torch.testing.assert_close(soft_inception(z, y, t), expected)


def test_soft_targets_are_fixed_per_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "soft_inception", lambda z, y, t: seen.append(t.clone()) or soft_inception(z, y, t))
    make(count=16, **INTRAQ)
    first, second = seen[:6], seen[6:]  # five iterations and the record
    assert len(second) == 6
    for batch in (first, second):
        assert all(torch.equal(t, batch[0]) for t in batch)
    assert not torch.equal(first[0], second[0])


def test_soft_targets_follow_their_law():
    t = optimiser(tiny(), soft_weight=1.0, soft_floor=0.6).start(0, 4000)[1].targets
    soft = t[t < 1]
    assert abs(len(soft) / 4000 - 0.5) < 0.04 and soft.min() >= 0.6
    assert abs(soft.mean().item() - 0.8) < 0.01
    assert (optimiser(tiny(), soft_weight=1.0).start(0, 100)[1].targets == 1).all()


def test_certain_teacher_gives_no_nan():
    """hast_family.md 11.5: gamma below 1 where p rounds to 1; the published form fails there, as the first lines show."""
    teacher = tiny()
    teacher[-1].weight.data *= 1e4
    noise = make(teacher, bns_weight=0.0, hard_weight=1.0, hard_gamma=0.5, iterations=1, lr=1e-9, min_lr=0.0)
    labels = teacher(noise.images).argmax(1)
    x = noise.images.clone().requires_grad_()
    p = teacher(x).softmax(1).gather(1, labels[:, None])[:, 0]
    assert (p == 1).any()
    assert not torch.autograd.grad(((1 - p) ** 0.5 * -p.log()).mean(), x)[0].isfinite().all()
    records = []
    made = make(teacher, hard_weight=1.0, hard_gamma=0.5, iterations=20, options={"log": lambda **r: records.append(r)})
    assert made.images.isfinite().all() and records[-1]["images_teacher_top1"] > 0


def test_diverged_images_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="batch 1 of the optimised images became NaN or infinite"):
        make(lr=3e38, options={"keep": tmp_path})
    assert not list(tmp_path.iterdir())


# ---- crops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 32), (9, 14)])
def test_crops_equal_torchvision(height, width, device):
    functional = pytest.importorskip("torchvision.transforms.functional")
    x = torch.randn(24, 3, height, width, device=device, requires_grad=True)
    boxes = crop_boxes(24, height, width, torch.Generator(device).manual_seed(1), (0.2, 1.0))
    flipped = torch.arange(24, device=device) % 2 == 0
    expected = []
    for image, flip, *box in zip(x, flipped.tolist(), *(b.int().tolist() for b in boxes)):
        crop = functional.resized_crop(image, *box, [height, width], antialias=False)
        expected.append(functional.hflip(crop) if flip else crop)
    wanted, found = torch.stack(expected), resized_crops(x, boxes, flipped)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)  # coordinates round in float32
    weight = torch.randn_like(wanted)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=5e-4)


def test_random_crops_draw_per_image():
    rng = torch.Generator().manual_seed(3)
    boxes = crop_boxes(4000, 32, 32, rng, (0.5, 1.0))
    area, ratio = boxes.height * boxes.width / 1024, boxes.width / boxes.height
    for name, values, low, high in (("area", area, 0.5, 1.0), ("ratio", ratio, 3 / 4, 4 / 3)):
        slack = 1.06  # sides are whole pixels
        assert values.min() > low / slack and values.max() < high * slack, name
    # Two of torchvision's own numbers, from RandomResizedCrop.get_params on 32 x 32: most attempts near full size fail.
    tv = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    theirs = torch.tensor(
        [tv.RandomResizedCrop.get_params(torch.empty(3, 32, 32), (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).double()
    for mine, their in zip(boxes, theirs.T):
        assert abs(mine.double().mean() - their.mean()) < 4 * their.std() / 4000**0.5 * 2**0.5
        assert abs(mine.double().std() / their.std() - 1) < 0.06
    assert ((boxes.top + boxes.height <= 32) & (boxes.left + boxes.width <= 32)).all()


def test_crop_of_a_long_image_is_central():
    """No attempt fits 20 x 4 with nearly the whole area: torchvision's fallback."""
    boxes = crop_boxes(3, 4, 20, torch.Generator().manual_seed(0), (0.99, 1.0))
    assert boxes.width.tolist() == [5, 5, 5] and boxes.height.tolist() == [4, 4, 4]
    assert boxes.left.tolist() == [7, 7, 7] and boxes.top.tolist() == [0, 0, 0]


def test_flips_alone():
    x = torch.randn(64, 3, 8, 8)

    def run(flip):
        return random_crops(x, torch.Generator().manual_seed(0), (1.0, 1.0), flip)

    whole = crop_boxes(64, 8, 8, torch.Generator().manual_seed(0), (1.0, 1.0)).width == 8
    assert whole.any()
    torch.testing.assert_close(run(0.0)[whole], x[whole], rtol=0, atol=1e-5)
    torch.testing.assert_close(run(1.0), run(0.0).flip(3), rtol=0, atol=1e-5)
    mirrored = (run(0.5) - run(1.0)).abs().amax((1, 2, 3)) < 1e-5
    assert 16 < mirrored.sum() < 48


def test_one_coin_per_iteration(monkeypatch):
    """For the whole batch, and other coins for the next batch."""
    cropped: list[int] = []
    iterations: list[bool] = []

    def losses(self, x, task, of=module._Optimiser._losses):
        iterations.append(bool(cropped))
        cropped.clear()
        return of(self, x, task)

    monkeypatch.setattr(module, "random_crops", lambda x, *a: cropped.append(len(x)) or random_crops(x, *a))
    monkeypatch.setattr(module._Optimiser, "_losses", losses)
    make(count=16, iterations=60, crop_probability=0.5)
    first, second = iterations[:61], iterations[61:]
    assert 15 < sum(first) < 45 and 15 < sum(second) < 45 and first != second
    assert not first[-1] and not second[-1]  # the record is about whole images
    for probability, count in ((0.0, 0), (1.0, 5)):
        iterations.clear()
        make(count=8, crop_probability=probability)
        assert sum(iterations) == count


# ---- optimisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience, factor, min_lr", [(0, 0.5, 0.0), (3, 0.1, 1e-4), (7, 0.3, 0.02)])
def test_plateau_is_torchs(patience, factor, min_lr, device):
    falling = [2 * (1 - fall) ** i for fall in (1.5e-4, 0.5e-4, 0.9e-4) for i in range(60)]  # about the threshold
    losses = torch.cat([torch.tensor(falling), torch.randn(220).abs() * torch.linspace(3, 0.01, 220)])
    losses[200] = float("nan")
    p = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.Adam([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, "min", factor, patience, min_lr=min_lr)
    mine = Plateau(0.5, factor, patience, min_lr, device)
    seen = set()
    for i, loss in enumerate(losses):
        scheduler.step(loss)
        mine.step(loss.to(device))
        seen.add(theirs.param_groups[0]["lr"])
        assert mine.lr.item() == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12), i
    assert len(seen) > 3


def test_adam_follows_the_plateau():
    """Against torch's own Adam and scheduler, written out."""
    teacher, fields = tiny(), dict(count=8, iterations=40, lr=8.0, patience=0, min_lr=1e-3, **HAST)
    o = optimiser(teacher, **fields)
    x, task, _ = o.start(0, 8)
    x.requires_grad_()
    adam = torch.optim.Adam([x], lr=8.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.1, patience=0, min_lr=1e-3)
    with o.tap:
        for _ in range(40):
            adam.zero_grad()
            loss = o._losses(x, task)[0]
            loss.backward()
            adam.step()
            scheduler.step(loss.item())
    assert adam.param_groups[0]["lr"] < 8.0
    torch.testing.assert_close(make(teacher, **fields).images, x.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [HAST, INTRAQ, ZEROQ], ids=["hast", "intraq", "zeroq"])
def test_optimising_lowers_the_loss(fields, device):
    records = []
    for iterations in (1, 60):
        options = {"log": lambda **r: records.append(r)}
        made = make(tiny().to(device), count=8, iterations=iterations, lr=0.05, options=options, **fields)
        assert made.images.shape == (8, *SIZE) and made.images.dtype == torch.float32 and made.labels.max() < 4
    assert records[1]["images_loss"] < 0.8 * records[0]["images_loss"]
    assert set(records[0]) == {"images_batch", *(f"images_{n}" for n in ("loss", "bns", "teacher_top1", "hard_share"))}
    assert 0 <= records[1]["images_teacher_top1"] <= 100 and 0 <= records[1]["images_hard_share"] <= 1


def test_every_switch_changes_the_images():
    base = dict(count=16, iterations=8, patience=0, hard_weight=1.0, soft_weight=1.0, soft_floor=0.5, distance_weight=1.0,
                distance_low=0.01, distance_high=0.02, input_weight=0.5, crop_probability=0.5)  # fmt: skip
    reference = make(**base)
    assert same(make(**base), reference)
    for change in (
        {"iterations": 9}, {"lr": 0.4}, {"patience": 50}, {"plateau_factor": 0.5}, {"min_lr": 0.2}, {"init": "zeroq"},
        {"statistics": "image"}, {"bns_weight": 2.0}, {"input_weight": 0.0}, {"hard_weight": 0.0}, {"hard_gamma": 0.5},
        {"soft_weight": 0.0}, {"soft_floor": 0.9}, {"distance_weight": 0.0}, {"distance_low": 0.0}, {"distance_high": 2.0},
        {"crop_probability": 0.0}, {"crop_scale": (0.2, 0.4)}, {"flip": 0.0}, {"batch_size": 16},
    ):  # fmt: skip
        assert not same(make(**{**base, **change}), reference), change
    assert not same(make(seed=1, **base), reference)


def test_batches_depend_on_seed_and_index_alone():
    """Neither the number of images nor what ran before changes a batch; shards together are the whole."""
    whole = make(crop_probability=0.5, **HAST)
    torch.rand(3)
    assert torch.equal(make(count=8, crop_probability=0.5, **HAST).images, whole.images[:8])
    even, odd = (make(crop_probability=0.5, options={"shard": (i, 2)}, **HAST) for i in (0, 1))
    assert torch.equal(torch.cat([even.images[:8], odd.images, even.images[8:]]), whole.images)
    assert len(make(count=8, options={"shard": (1, 2)}).images) == 0
    for shard, fields in (((0, 2), INTRAQ), ((2, 2), HAST)):
        with pytest.raises(UsageError, match="shard must be"):
            make(options={"shard": shard}, **fields)


def test_the_teacher_is_left_alone():
    teacher = tiny().train()
    before = copy.deepcopy(teacher.state_dict())
    make(teacher, **INTRAQ)
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in teacher.modules())


def test_memory_layout_changes_nothing_but_speed():
    plain, last = (make(iterations=2, options={"layout": f}, **HAST)
                   for f in (torch.contiguous_format, torch.channels_last))  # fmt: skip
    assert last.images.is_contiguous()
    torch.testing.assert_close(plain.images, last.images, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("classes, size", [(5, SIZE), (4, (8, 8)), (4, (3, 0, 8))])
def test_wrong_shapes(classes, size):
    with pytest.raises((UsageError, UnsupportedModelError), match=r"class logits \[N, 5\]|input_size must be"):
        synthesize_images(tiny(), spec(), size, classes, 0)


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "set.safetensors"
    made = make(count=4, iterations=1)
    wanted = provenance(tiny(), spec(), SIZE, 4, 0)
    save_images(path, made, wanted)
    return path, made, wanted


def test_files_come_back(file):
    path, made, wanted = file
    found, origin = load_images(path, wanted)
    assert same(found, made) and origin == wanted
    assert origin["images"]["batch_size"] == 8 and "enabled" not in origin["images"]
    first = path.read_bytes()
    save_images(path, made, wanted)
    assert path.read_bytes() == first


def test_other_provenance_is_refused(file):
    path, _, _ = file
    teacher = tiny()
    teacher[0].weight.data[0, 0, 0, 0] += 1e-6
    for key, other in {
        "teacher": provenance(teacher, spec(), SIZE, 4, 0),
        "images": provenance(tiny(), spec(**HAST), SIZE, 4, 0),
        "seed": provenance(tiny(), spec(), SIZE, 4, 1),
        "num_classes": provenance(tiny(), spec(), SIZE, 5, 0),
    }.items():
        with pytest.raises(BadFileError, match=f"images of another {key}"):
            load_images(path, other)


def test_any_corrupt_byte_is_found(file):
    """Header, metadata and tensors; padding of the header alone carries nothing."""
    path, made, wanted = file
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    end = len(data[:start].rstrip(b" "))
    places = [*range(0, 8), *range(8, end, 7), *range(start, len(data), 101), len(data) - 1]
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BadFileError):
            load_images(path, wanted)
    path.write_bytes(data[:-5])
    with pytest.raises(BadFileError):
        load_images(path)
    with pytest.raises(BadFileError, match="cannot be read"):
        load_images(path.with_name("nothing"))
    save_file({"images": made.images, "labels": made.labels}, path)
    with pytest.raises(BadFileError, match="no file of optimised images"):
        load_images(path)


def write_whole(path, labels, text):
    """A file whose SHA-256 is right, whatever else is wrong."""
    tensors = {"images": torch.zeros(4, *SIZE), "labels": torch.tensor(labels)}
    path.write_bytes(pack(tensors, {"provenance": text, "sha256": module._tensors_sha256(tensors, text)}))


STRANGE = [
    ([0, 1, 2, 3], "[]", "no file of optimised images"),
    ([0, 1, 2, 3], "5", "no file of optimised images"),
    ([0, 1, 2, 3], "null", "no file of optimised images"),
    ([0, 1, 2, 3], "[" * 100_000, "no file of optimised images"),
    ([0, 1, 2, 3], '{"num_classes": 4, "other": null}', "another"),
    ([[0], [1], [2], [3]], '{"num_classes": 4}', "int64 labels"),
    ([0, 1, 2, 99], '{"num_classes": 4}', "from 0 to 3, got 99"),
    ([0, 1, 2, -1], '{"num_classes": 4}', "from 0 to 3, got -1"),
    ([0, 1, 2, -1], "{}", "at least 0, got -1"),
]


@pytest.mark.parametrize("labels, text, words", STRANGE, ids=range(len(STRANGE)))
def test_strange_files_are_refused(tmp_path, labels, text, words):
    path = tmp_path / "set.safetensors"
    write_whole(path, labels, text)
    with pytest.raises(BadFileError, match=words):
        load_images(path, {"num_classes": 4})


@pytest.mark.parametrize("labels, changed", [([0, 1, 2, 99], {}), ([[0]] * 4, {}), ([0, 1, 2, 3], None)])
def test_strange_batches_are_made_anew(tmp_path, labels, changed):
    wanted = make(how=cached_images, first=[tmp_path], count=4, iterations=1)
    (kept,) = tmp_path.rglob("*.safetensors")
    _, origin = load_images(kept)
    write_whole(kept, labels, json.dumps(changed if changed is None else origin | changed))
    assert same(make(how=cached_images, first=[tmp_path], count=4, iterations=1), wanted)


def test_nan_enters_no_file_and_leaves_none(file, monkeypatch):
    path, made, wanted = file
    made.images[0, 0, 0, 0] = float("nan")
    before = path.read_bytes()
    with pytest.raises(BadFileError, match="NaN"):
        save_images(path, made, wanted)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(module, "_check", lambda *a: None)
        save_images(path, made, wanted)
    with pytest.raises(BadFileError, match="NaN"):
        load_images(path, wanted)


def test_cache_hit_makes_nothing(tmp_path, monkeypatch):
    made = make(how=cached_images, first=[tmp_path], **INTRAQ)
    with monkeypatch.context() as patch:
        patch.setattr(module._Optimiser, "batch", None)  # calling it would fail
        assert same(make(how=cached_images, first=[tmp_path], **INTRAQ), made)
        assert same(make(how=cached_images, first=[tmp_path], enabled=True, **INTRAQ), made)
    assert same(make(**INTRAQ), made)
    other = make(seed=1, how=cached_images, first=[tmp_path], **INTRAQ)
    assert not same(other, made) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fields", [HAST, INTRAQ], ids=["hast", "intraq"])
def test_killed_run_goes_on(tmp_path, fields):
    """Also with class centers, which come from the kept batches."""
    records = []

    def fall(**record):
        records.append(record["images_batch"])
        if len(records) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(how=cached_images, first=[tmp_path], options={"log": fall}, **fields)
    resumed = make(how=cached_images, first=[tmp_path], options={"log": fall}, **fields)
    assert records == [0, 1, 2] and same(resumed, make(**fields))


def test_damaged_batch_is_made_again(tmp_path):
    made = make(how=cached_images, first=[tmp_path], **INTRAQ)
    file = sorted(tmp_path.glob("*/*"))[1]
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    again = []
    options = {"log": lambda **r: again.append(r["images_batch"])}
    assert same(make(how=cached_images, first=[tmp_path], options=options, **INTRAQ), made)
    assert again == [1] and file.read_bytes() == sound


def test_kept_batch_of_another_recipe_is_not_taken(tmp_path):
    """One plain directory: what lies there under the same name is replaced."""
    make(options={"keep": tmp_path}, **HAST)
    assert same(make(options={"keep": tmp_path}, **INTRAQ), make(**INTRAQ))


def test_smaller_set_is_the_beginning_of_a_larger_one(tmp_path):
    """Down to its last batch, which is smaller and therefore another one."""
    whole = make(how=cached_images, first=[tmp_path], count=20, **INTRAQ)
    new = []
    options = {"log": lambda **r: new.append(r["images_batch"])}
    part = make(how=cached_images, first=[tmp_path], count=13, options=options, **INTRAQ)
    assert new == [1] and torch.equal(part.images[:8], whole.images[:8])
    assert same(part, make(count=13, **INTRAQ)) and len(list(tmp_path.iterdir())) == 1


def test_shards_fill_one_cache(tmp_path, monkeypatch):
    whole = make(**HAST)
    for i in (1, 0):
        make(how=cached_images, first=[tmp_path], options={"shard": (i, 2)}, **HAST)
    monkeypatch.setattr(module._Optimiser, "batch", None)
    assert same(make(how=cached_images, first=[tmp_path], **HAST), whole)


def test_stop_request_keeps_finished_batches(tmp_path):
    def stop(**record):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped in batch 2; what was finished is kept") as caught:
        make(options={"log": stop, "keep": tmp_path})
    assert caught.value.exit_code == 130 and [f.name for f in tmp_path.iterdir()] == ["batch-00000x8.safetensors"]
    with pytest.raises(Interrupted, match="was not kept"):
        make(options={"log": stop})


def test_provenance_sees_every_tensor():
    teacher = tiny()
    base = provenance(teacher, spec(), SIZE, 4, 0)["teacher"]
    teacher[1].running_var[0] += 1
    assert provenance(teacher, spec(), SIZE, 4, 0)["teacher"] != base
