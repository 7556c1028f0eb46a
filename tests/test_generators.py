"""Generators of Qimera and AutoReCon: structure, quirks, soft labels, search, and whole runs; ait_family.md sections 5, 6 and 13."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import tiny
from torch import nn

import zsq_fast as zsq
from zsq_fast.errors import TrainingError, UnsupportedModelError, UsageError
from zsq_fast.methods import Recipe, Trainer, load_recipe, search_generator
from zsq_fast.methods import recipe as recipes
from zsq_fast.methods.autorecon import OPERATIONS, PUBLISHED, AutoRecon, Branch, Edge, SuperNet, read_genotype
from zsq_fast.methods.blocks import ConditionalBatchNorm2d
from zsq_fast.methods.generators import Generator, Qimera, build_generator, classifier_rows
from zsq_fast.methods.synthesis import Draw, Synthesis, label_ce
from zsq_fast.runs import Progress

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=2", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=1", "schedule.calibration_epochs=1",
        "schedule.milestones=[]", "quant.ema=plain"]  # fmt: skip


def recipe(name, *more, **options) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *(f"generator.{m}" for m in more)], **options)


def synthesis(name, *more, teacher=None, seed=0, device="cpu") -> Synthesis:
    teacher = (teacher or tiny()).to(device)
    return Synthesis(teacher, recipe(name, *more), SIZE, seed, torch.contiguous_format)


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


# ---- recipes -----------------------------------------------------------------------------------------------------------


def test_published_numbers():
    """ait_family.md sections 5.3, 6.2, 9.2 and 9.3."""
    for name, lr, decay, ce, inundated, k, start in (
        ("qimera", (1e-4, 1e-6), 1e-4, 1.0, False, (2, 500), ("random", "random")),
        ("qimera_ait", (1e-4, 1e-4), 0.0, 0.0, True, (2, 250), ("teacher", "random")),
        ("autorecon", (1e-4, 1e-6), 1e-4, 1.0, False, None, None),
        ("autorecon_ait", (1e-4, 1e-4), 0.0, 0.0, True, None, None),
    ):
        for i, size in enumerate((32, 224)):
            r = load_recipe(name, input_size=(3, size, size))
            g, s = r.generator, r.student
            assert (s.lr, s.weight_decay, s.ce_weight, r.inundation.enabled) == (lr[i], decay, ce, inundated)
            assert (r.schedule.batch_size, r.schedule.warmup_epochs) == ((200, 4), (16, 50))[i]
            assert (g.lr, g.betas, g.bns_weight, g.norm_eps) == (1e-3, (0.5, 0.999), 0.1, "faithful")
            if k:
                assert (g.kind, g.superposed_classes, g.embedding) == ("qimera", k[i], start[i])
                assert (g.latent, g.superpose_probability, g.noise_scale) == (0, 0.4, 1.0)
                assert (g.disentangle, g.conditional_norms) == (False, bool(i))
                assert (g.embedding_norm, g.affine_scaling) == ("faithful", "faithful")
            else:
                assert (g.kind, g.genotype) == ("autorecon", ("cifar10_resnet20", "resnet18")[i])
            if inundated:
                assert r.inundation.threshold == (1e-3, 1e-4 if k else 1e-3)[i]


@pytest.mark.parametrize(
    "option, words",
    [
        ("norm_eps=0.8", "generator.norm_eps must be a text"),
        ("norm_eps=fixed", "'faithful' or 'corrected'"),
        ("affine_scaling=sum", "'faithful' or 'corrected'"),
        ("embedding_norm=layer", "'faithful' or 'corrected'"),
        ("embedding=classifier", "'random' or 'teacher'"),
        ("superpose_probability=1.5", r"in \[0, 1\]"),
        ("superposed_classes=0", "at least 1"),
        ("noise_scale=-1", "at least 0"),
        ("search_steps=0", "at least 1"),
        ("search_lr=0", "positive"),
        ("search_temperature=0", "positive"),
        ("kind=plain", "generator.latent must be at least 1 for kind 'plain'"),
        ("superpose_prob=0", "Did you mean 'superpose_probability'"),
    ],
)
def test_wrong_options(option, words):
    with pytest.raises(UsageError, match=words):
        recipe("qimera", option)


# ---- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, millions_in_fc", [(512, 206), (1280, 514), (2048, 822)])
@pytest.mark.parametrize("disentangle", [False, True])
def test_qimera_sizes(width, millions_in_fc, disentangle):
    """ait_family.md 5.2: R18 Linear 512 -> 401,408; about 42 to 44 million in all with the mapping."""
    spec = recipes.Generator(kind="qimera", latent=width, conditional_norms=True, disentangle=disentangle)
    with torch.device("meta"):
        g = build_generator(spec, 1000, (3, 224, 224))
    read = 100 if disentangle else width
    assert g.fc.weight.shape == (401_408, read)
    convolutions = 128 * (128 * 9 + 1) + 64 * (128 * 9 + 1) + 3 * (64 * 9 + 1)
    norms, mapping = 2 * 1000 * (128 + 128 + 64), disentangle * 100 * (width + 1)
    want = (read + 1) * 401_408 + 1000 * width + mapping + norms + convolutions
    assert sum(p.numel() for p in g.parameters()) == want
    assert (
        41.9 < want / 1e6 < 44
        if disentangle
        else round(401_408 * width / 1e6) == pytest.approx(millions_in_fc, abs=0.5)
    )


@pytest.mark.parametrize("classes, total", [(10, 1.05), (100, 1.06)])
def test_qimera_is_gdfqs_decoder_for_small_images(classes, total):
    with torch.device("meta"):
        gdfq = Generator("plain", classes, (3, 32, 32))
        same = build_generator(recipes.Generator(kind="qimera", latent=100), classes, (3, 32, 32))
    assert {k: v.shape for k, v in gdfq.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}
    assert round(millions(gdfq), 2) == total


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size, base, linears", [(32, 4, 0.75), (224, 28, 36.6)])
def test_autorecon_sizes(name, size, base, linears):
    """ait_family.md 6.1, 6.2: widths, inputs split 33/33/34, and a formula for every operation."""
    with torch.device("meta"):
        g = build_generator(recipes.Generator(kind="autorecon", genotype=name), 10, (3, size, size))
    assert [(f.in_features, f.out_features) for f in g.fc] == [
        (part, 64 * (base * 2**i) ** 2) for i, part in enumerate((33, 33, 34))
    ]
    assert millions(g.fc) == pytest.approx(linears, abs=0.05)
    genotype = read_genotype(name)
    kernels = [1 for ups in genotype["ups"] for _ in ups] + [
        1 for cross in genotype["cross"] for c in cross if c != "Z"
    ]
    kernels += [int(op[1]) for ops in genotype["ops"] for op in ops.split() if op != "-"]
    norm = 2 * 10 * 64
    want = sum(64 * 64 * k * k + 64 + norm for k in kernels) + norm + 3 * (64 * 9 + 1)
    assert sum(p.numel() for p in g.parameters()) - sum(p.numel() for p in g.fc.parameters()) == want
    assert {m.eps for m in g.cells.modules() if isinstance(m, nn.BatchNorm2d)} == {0.8} and g.norm.norm.eps == 0.8


# ---- Qimera: embeddings, norms, labels ---------------------------------------------------------------------------------


def test_normalisation_axes():
    """ait_family.md 13.6 and 5.1: Norm1 per sample over features, NormK per slot over batch and features; corrected: per embedding."""
    torch.manual_seed(0)
    spec = recipes.Generator(kind="qimera", latent=6, noise_scale=0.5)
    g = Qimera(spec, 4, SIZE, 6)
    noise, labels = torch.randn(5, 6), torch.randint(4, (5,))
    e = g.embedding.weight[labels] + 0.5 * noise
    one = (e - e.mean(1, keepdim=True)) / (e.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(g.embed(noise, labels), one)

    noise, labels, mix = torch.randn(5, 3, 6) + 2, torch.randint(4, (5, 3)), torch.randn(5, 3).softmax(1)
    e = g.embedding.weight[labels] + 0.5 * noise

    def standardised(dims):
        return (e - e.mean(dims, keepdim=True)) / (e.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()

    for quirk, dims in (("faithful", (0, 2)), ("corrected", (2,))):
        g.spec = replace(spec, embedding_norm=quirk)
        torch.testing.assert_close(g.embed(noise, labels, mix), (mix[:, :, None] * standardised(dims)).sum(1))


def test_conditional_norm_mixes_classes():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm2d(4, 2)
    norm.gamma.weight.data.normal_()
    norm.beta.weight.data.normal_()
    x, labels, mix = torch.randn(5, 2, 3, 3), torch.randint(4, (5, 3)), torch.randn(5, 3).softmax(1)
    gamma, beta = (sum(mix[:, k, None] * t.weight[labels[:, k]] for k in range(3)) for t in (norm.gamma, norm.beta))
    want = nn.BatchNorm2d(2, affine=False)(x) * gamma[:, :, None, None] + beta[:, :, None, None]
    torch.testing.assert_close(norm(x, labels, mix), want)


def test_affine_terms_are_1_over_k_of_the_mixture():
    """ait_family.md 13.6 and 5.2: the published code averages the K weighted terms; corrected, they are summed."""
    g = Qimera(recipes.Generator(kind="qimera", latent=6, conditional_norms=True), 4, SIZE, 6)
    seen = []
    for i in range(3):
        getattr(g, f"norm{i}").register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    mix = torch.randn(5, 3).softmax(1)
    for quirk, want in (("faithful", mix / 3), ("corrected", mix)):
        g.spec = replace(g.spec, affine_scaling=quirk)
        g(torch.randn(5, 3, 6), torch.randint(4, (5, 3)), mix)
        assert len(seen) == 3 and all(torch.equal(s, want) for s in seen)
        seen.clear()
    g(torch.randn(5, 6), torch.randint(4, (5,)))  # not superposed: nothing to scale
    assert seen == [None] * 3


def test_soft_labels_add_up_where_a_class_occurs_twice(device):
    """ait_family.md 13.6 and 5.1."""
    labels = torch.tensor([[1, 1, 3], [0, 2, 0]], device=device)
    mix = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]], device=device)
    soft = Draw(torch.empty(0), labels, mix).targets(4)
    torch.testing.assert_close(soft, torch.tensor([[0, 0.5, 0, 0.5], [0.4, 0, 0.6, 0]], device=device))
    assert Draw(torch.empty(0), labels[:, 0]).targets(4) is not soft and torch.equal(
        Draw(torch.empty(0), labels[:, 0]).targets(4), labels[:, 0]
    )
    logits = torch.randn(2, 4, device=device)
    torch.testing.assert_close(label_ce(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean())
    hard = torch.tensor([1, 0], device=device)
    torch.testing.assert_close(label_ce(logits, F.one_hot(hard, 4).float()), label_ce(logits, hard))


def test_superposition_is_drawn_per_batch():
    """ait_family.md 5.1: whole batches, with the given probability, a function of (seed, step); K classes with replacement."""
    source, k = synthesis("qimera", "superposed_classes=3", seed=1), 3
    draws = [source.sample(step) for step in range(300)]
    superposed = [d for d in draws if d.mix is not None]
    assert 0.3 < len(superposed) / len(draws) < 0.5
    for d in draws:
        shape = (8,) if d.mix is None else (8, k)
        assert d.labels.shape == shape and d.noise.shape == (*shape, 8) and d.labels.dtype == torch.int64
    labels = torch.stack([d.labels for d in superposed]).view(-1, k)
    assert set(labels.unique().tolist()) == {0, 1, 2, 3} and (labels[:, 0] == labels[:, 1]).any()
    soft = torch.cat([d.targets(4) for d in superposed])
    assert soft.shape == (8 * len(superposed), 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))
    again = synthesis("qimera", "superposed_classes=3", seed=1).sample(7)
    assert all(a is b or torch.equal(a, b) for a, b in zip(again, draws[7]))
    for p, expected in ((0, False), (1, True)):
        always = synthesis("qimera", f"superpose_probability={p}")
        assert all((always.sample(step).mix is not None) == expected for step in range(20))


def test_embedding_starts_as_the_classifier():
    rows = tiny()[8].weight
    assert torch.equal(synthesis("qimera", "embedding=teacher").generator.embedding.weight, rows)
    random = synthesis("qimera", "embedding=random").generator
    assert random.latent == rows.shape[1] and not torch.equal(random.embedding.weight, rows)
    assert synthesis("qimera", "embedding=random", "latent=5").generator.embedding.weight.shape == (4, 5)
    with pytest.raises(UsageError, match=r"must be 0 or the width of the classifier \(8\), got 5"):
        synthesis("qimera", "embedding=teacher", "latent=5")
    with pytest.raises(UsageError, match="give the teacher"):
        build_generator(recipe("qimera").generator, 4, SIZE)


def test_classifier_is_found_by_structure():
    conv = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert torch.equal(classifier_rows(conv, 4), conv[1].weight.flatten(1))
    conv.append(nn.Linear(4, 4))
    assert torch.equal(classifier_rows(conv, 4), conv[4].weight)
    assert torch.equal(classifier_rows(conv, 6), conv[0].weight.flatten(1))  # the number of classes decides
    with pytest.raises(UnsupportedModelError, match=r"no 1x1 nn\.Conv2d with 7 outputs"):
        classifier_rows(conv, 7)


# ---- AutoReCon: template, genotypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*PUBLISHED, "resnet18.json", "resnet18.toml", "text"])
def test_genotypes_can_be_read(source, tmp_path):
    if source == "text":
        assert read_genotype(json.dumps(PUBLISHED["resnet50"])) == PUBLISHED["resnet50"]
    elif "." in source:
        file = tmp_path / source
        genotype = PUBLISHED["resnet18"]
        lines = [f"{key} = {json.dumps(value)}" for key, value in genotype.items()]
        file.write_text(json.dumps(genotype) if source.endswith("json") else "\n".join(lines))
        assert read_genotype(str(file)) == genotype
    else:
        assert read_genotype(source) == PUBLISHED[source]


@pytest.mark.parametrize(
    "change, words",
    [
        ("resnet19", "unknown genotype 'resnet19'. Did you mean 'resnet18'"),
        ("none.json", "cannot be read"),
        ("{", "neither valid JSON nor TOML"),
        ('{"ups": []}', "a table of ups, ops and cross"),
        ({"ups": ["NN", "NN", "ZN"]}, r"genotype.ups must be 3 texts of 2 of N, B"),
        ({"ops": ["d5 - d5 d3 c5"] * 2}, r"genotype.ops must be 3 texts of 5"),
        ({"ops": ["d5 - d5 d3 c7"] * 3}, r"genotype.ops must be"),
        ({"cross": ["ZZBZZN", "NNNBB"]}, r"genotype.cross must be 2 texts of 6 of Z, N, B"),
        ({"cross": [1, 2]}, r"genotype.cross must be"),
        ({"ops": ["d5 d5 - - -"] * 3}, "no path leads"),
        ({"ops": ["- - - - c1"] * 3}, "no path leads"),
    ],
)
def test_wrong_genotypes(change, words):
    with pytest.raises(UsageError, match=words):
        read_genotype(change if isinstance(change, str) else PUBLISHED["resnet18"] | change)


@pytest.mark.parametrize("name", ["N", "B", *OPERATIONS[2:]])
def test_operations(name):
    """ait_family.md 6.1: pre-activation, kernels, dilations, paddings; up-sampling comes first in the published code."""
    torch.manual_seed(0)
    branch = Branch(name, 4, 0.8).double()
    branch.norm.gamma.weight.data.normal_()
    branch.norm.beta.weight.data.normal_()
    x, y = torch.randn(3, 64, 4, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    h = x
    if name in "NB":
        h = (
            F.interpolate(x, scale_factor=2, mode="nearest")
            if name == "N"
            else F.interpolate(x, scale_factor=2, mode="bilinear")
        )
    h = F.batch_norm(h, None, None, training=True, eps=0.8)
    h = h * branch.norm.gamma(y)[:, :, None, None] + branch.norm.beta(y)[:, :, None, None]
    kernel, dilation, padding = {
        "c1": (1, 1, 0), "c3": (3, 1, 1), "c5": (5, 1, 2), "d3": (3, 2, 2), "d5": (5, 2, 4),
    }.get(name, (1, 1, 0))  # fmt: skip
    assert branch.conv.kernel_size == (kernel, kernel)
    h = F.conv2d(F.leaky_relu(h, 0.2), branch.conv.weight, branch.conv.bias, padding=padding, dilation=dilation)
    torch.testing.assert_close(branch(x, y), h)


def test_cell_wiring():
    """ait_family.md 6.1, by giving every edge a factor of its own."""
    g = AutoRecon(PUBLISHED["mobilenetv2"], 4, SIZE, 100, 0.8)
    cell = g.cells[1]
    factors = [float(p) for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)]
    for edge, factor in zip(cell.edges, factors):
        edge.forward = lambda x, labels, f=factor: f * x
    one = torch.ones(1, dtype=torch.float64)
    n = cell(one, [v * one for v in (100.0, 1e4, 1e6)], one)
    n0, n1 = 2.0, 3.0
    n2 = 5 * n0 + 7 * n1 + 19 * 100 + 23 * 1e4 + 29 * 1e6
    n3 = 11 * n0 + 13 * n1 + 17 * n2 + 31 * 100 + 37 * 1e4 + 41 * 1e6
    assert [float(v) for v in n] == [n0, n1, n2, n3]


def test_nothing_and_identity():
    x, y = torch.randn(2, 64, 4, 4), torch.tensor([0, 1])
    assert (
        Edge(("-",), 4, 0.8)(x, y) is None
        and Edge(("Z",), 4, 0.8)(x, y) is None
        and not list(Edge(("-",), 4, 0.8).parameters())
    )
    assert Edge(("skip",), 4, 0.8)(x, y) is x
    # A node without input is zero, and what reads it still gives its bias and its labels' shifts.
    lonely = PUBLISHED["resnet18"] | {"ops": ["- - skip - c1"] * 3, "cross": ["ZZZZZZ"] * 2}
    g = AutoRecon(read_genotype(lonely), 4, SIZE, 6, 0.8)
    images = g(torch.randn(4, 6), torch.arange(4))
    assert images.shape == (4, *SIZE) and images.isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_genotypes_give_normalised_images(name, device):
    g = build_generator(recipes.Generator(kind="autorecon", genotype=name), 4, (3, 16, 24)).to(device)
    images = g(torch.randn(8, 100, device=device), torch.randint(4, (8,), device=device))
    assert images.shape == (8, 3, 16, 24)
    assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-2
    images.square().mean().backward()
    assert all(p.grad is not None for p in g.fc.parameters())
    with pytest.raises(UsageError, match="multiples of 8"):
        build_generator(recipes.Generator(kind="autorecon"), 4, (3, 12, 16))


# ---- search ------------------------------------------------------------------------------------------------------------


def test_search_lowers_its_loss_and_finds_a_generator():
    teacher = tiny()
    teacher[8].weight.data *= 20  # decided enough for a cross entropy that can fall
    options = ["schedule.batch_size=32", "generator.search_steps=40", "generator.search_lr=0.1", "generator.lr=3e-3"]
    r = load_recipe("autorecon", input_size=SIZE, overrides=[*TINY, *options])
    losses: list[torch.Tensor] = []
    found = search_generator(teacher, r, SIZE, 3, losses=losses)
    loss = torch.stack(losses)
    assert loss.isfinite().all() and loss[-10:].mean() < 0.8 * loss[:10].mean(), loss
    assert read_genotype(json.dumps(found)) == found
    g = build_generator(replace(r.generator, genotype=json.dumps(found)), 4, SIZE)
    assert g(torch.randn(4, 100), torch.arange(4)).shape == (4, *SIZE)


def test_logits_find_the_cheapest_candidates():
    """The estimator alone: every candidate has a price, "nothing" none, as it has no gradient in the super-net either."""
    torch.manual_seed(0)
    net, steps = SuperNet(4, SIZE, 6, 0.8), 200
    prices = [torch.randn(len(edge.candidates)) for edge in net.edges]
    for edge, price in zip(net.edges, prices):
        price[0] *= edge.candidates[0] not in ("-", "Z")
    optimizer = torch.optim.Adam(net.logits, lr=0.1)
    for step in range(steps):
        net.choose(step, 5 * (1 - 0.9 * step / steps))
        optimizer.zero_grad()
        sum(edge.gate * price[edge.chosen] for edge, price in zip(net.edges, prices)).backward()
        optimizer.step()
    regrets = torch.stack([price[logits.argmax()] - price.min() for logits, price in zip(net.logits, prices)])
    assert (regrets == 0).sum() >= 24 and regrets.mean() < 0.15  # of 33; drawn blindly: 7 and 1.1


def test_search_shows_its_steps(capsys, monkeypatch):
    monkeypatch.setattr("zsq_fast.runs.progress._LINE_SECONDS", 0.0)
    r = recipe("autorecon", "search_steps=2", "genotype=search")
    Trainer(tiny(), r, input_size=SIZE, progress=Progress(interactive=False))
    assert "search for a generator: 2/2" in capsys.readouterr().err


def test_search_follows_its_seed():
    r = recipe("autorecon", "search_steps=4", "genotype=search")
    one, two, other = (search_generator(tiny(), r, SIZE, seed) for seed in (3, 3, 4))
    assert one == two != other


def test_a_search_that_diverges_says_so():
    with pytest.raises(TrainingError, match="the search for a generator diverged"):
        search_generator(tiny(), recipe("autorecon", "search_steps=3", "lr=1e30"), SIZE, 0)


def test_any_recipe_can_be_searched_for():
    """A Qimera recipe (latent 0: the classifier's width) gives batch, rates and losses; the template then reads 100 numbers."""
    assert read_genotype(search_generator(tiny(), recipe("qimera", "search_steps=1"), SIZE, 0))


def test_logits_get_the_gradient_of_their_share():
    torch.manual_seed(0)
    net = SuperNet(4, SIZE, 6, 0.8)
    assert len(net.edges) == 33 and not {id(v) for v in net.logits} & {id(p) for p in net.parameters()}
    net.choose(1, 2.0)
    noise, labels = torch.randn(4, 6), torch.arange(4)
    gated = net(noise, labels)
    (gated * torch.randn_like(gated)).sum().backward()
    for edge, logits in zip(net.edges, net.logits):
        assert float(edge.gate) == 1.0 and logits.grad.isfinite().all() and logits.grad.sum().abs() < 1e-3
        if edge.candidates[edge.chosen] in ("-", "Z"):
            assert not logits.grad.any()
    assert sum(bool(v.grad.any()) for v in net.logits) > 10
    for edge in net.edges:
        edge.gate = None
    torch.testing.assert_close(net(noise, labels), gated)  # a gate changes no value
    choices = torch.tensor([[edge.chosen for edge in net.edges] for s in range(60) if net.choose(s, 1.0) is None])
    assert all(
        len(c.unique()) == len(e.candidates) for c, e in zip(choices.T, net.edges)
    )  # every candidate has its turn


def test_search_never_disconnects_a_cell():
    net = SuperNet(4, SIZE, 6, 0.8)
    assert net.genotype()["ops"] == ["skip skip skip skip skip"] * 3  # undecided: "nothing" needs more than half
    for logits in net.logits:
        logits.data[0] = 5.0  # N, nothing, no cross-up
    net.logits[4].data[5] = 1.0
    assert net.genotype() == {
        "ups": ["NN"] * 3,
        "ops": ["- - d3 - -", "- - skip - -", "- - skip - -"],
        "cross": ["ZZZZZZ"] * 2,
    }


def test_a_run_searches_and_keeps_what_it_found(tmp_path):
    overrides = [*TINY, "generator.genotype=search", "generator.search_steps=2"]
    trainer = Trainer(tiny(), load_recipe("autorecon", input_size=SIZE, overrides=overrides), input_size=SIZE)
    zsq.quantize(tiny(), "autorecon", input_size=SIZE, overrides=overrides, run_dir=tmp_path / "run", progress=False)
    from zsq_fast.runs import RunDir

    with RunDir.open(tmp_path / "run", read_only=True) as run:
        kept = Recipe.from_dict(run.recipe)
    assert kept == trainer.recipe and read_genotype(kept.generator.genotype)["ups"]
    assert Trainer(tiny(), kept, input_size=SIZE).recipe == kept  # no second search


# ---- whole runs --------------------------------------------------------------------------------------------------------

ALL = ["qimera", "qimera_ait", "autorecon", "autorecon_ait"]


def state(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().float().flatten() for t in model.state_dict().values()])


def train(name, *more, **options):
    return Trainer(tiny(), recipe(name, *more), input_size=SIZE, **options).run()


@pytest.mark.parametrize("name", ALL)
def test_two_epochs_end_to_end(name):
    student = zsq.quantize(tiny(), recipe(name), input_size=SIZE, progress=False)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), tiny().parameters()))


@pytest.mark.parametrize(
    "name, switch",
    [
        *(
            ("qimera", s)
            for s in (
                "conditional_norms=true", "superpose_probability=0", "superposed_classes=3", "embedding=teacher", "noise_scale=0.5",
                "disentangle=true", "embedding_norm=corrected", "norm_eps=corrected", "latent=5",
            )
        ),
        *(("autorecon", s) for s in ("genotype=resnet18", "norm_eps=corrected", "latent=30")),
    ],
)  # fmt: skip
def test_every_switch_changes_the_images(name, switch):
    always = ["superpose_probability=1"] if name == "qimera" else []
    plain, switched = (synthesis(name, *always, *s) for s in ((), (switch,)))
    for source in (plain, switched):
        batches = [source.step(i) for i in range(2)]
        assert all(torch.isfinite(v).all() for b in batches for v in b)
        if source is plain:
            expected = batches[1].images
    assert batches[1].images.shape == (8, *SIZE) and not torch.allclose(batches[1].images, expected, atol=1e-4)


def test_many_classes_shrink_the_published_affine_terms():
    """ait_family.md 5.2: almost zero scale at the start for K = 100 to 500, so that images leave the decoder far below unit variance."""
    spread = {}
    for quirk in ("faithful", "corrected"):
        torch.manual_seed(0)
        g = Qimera(recipes.Generator(kind="qimera", latent=6, conditional_norms=True, affine_scaling=quirk), 4, SIZE, 6)
        g.conv3.bias.data.zero_()
        spread[quirk] = g(torch.randn(8, 500, 6), torch.randint(4, (8, 500)), torch.randn(8, 500).softmax(1)).std()
    assert spread["faithful"] < 0.5 < 0.9 < spread["corrected"]


def test_affine_scaling_changes_the_images():
    seen = [
        synthesis("qimera", "conditional_norms=true", "superpose_probability=1", f"affine_scaling={quirk}")
        .step(0)
        .images
        for quirk in ("faithful", "corrected")
    ]
    assert not torch.allclose(*seen, atol=1e-4)


@pytest.mark.parametrize("name", ["qimera_ait", "autorecon_ait"])
def test_same_seed_same_bits(name):
    one, two, other = train(name, seed=5), train(name, seed=5), train(name, seed=6)
    assert torch.equal(state(one.student), state(two.student)) and not torch.equal(
        state(one.student), state(other.student)
    )
    assert torch.equal(state(one.synthesis.generator), state(two.synthesis.generator)) and one.history == two.history


@pytest.mark.parametrize("name", ["qimera", "autorecon"])
def test_resume(name, tmp_path, monkeypatch):
    options = dict(input_size=SIZE, progress=False)
    whole = zsq.quantize(tiny(), recipe(name), run_dir=tmp_path / "whole", **options)
    save = Trainer.save

    def save_then_stop(self: Trainer) -> None:
        save(self)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_then_stop)
        with pytest.raises(zsq.errors.Interrupted):
            zsq.quantize(tiny(), recipe(name), run_dir=tmp_path / "cut", **options)
    again = zsq.quantize(tiny(), recipe(name), run_dir=tmp_path / "cut", resume=True, **options)
    assert torch.equal(state(again), state(whole))


def test_superposed_batches_hand_on_soft_labels():
    source = synthesis("qimera", "superpose_probability=1")
    batch = source.step(0)
    assert batch.labels.shape == (8, 4) and batch.labels.dtype == torch.float32
    images, labels = source.images(0)
    assert images.shape == (8, *SIZE) and torch.equal(labels, batch.labels)
    assert synthesis("qimera", "superpose_probability=0").step(0).labels.dtype == torch.int64
