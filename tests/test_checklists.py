"""The acceptance and conformance checklists of the specifications (hast_family.md section 11, ait_family.md section 13), item by item:
which test covers it, or why none can. What no other file covers is tested here."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from networks import tiny
from test_images import make
from torch import Tensor, nn

import zsq_fast as zsq
from zsq_fast import ops
from zsq_fast.methods import Trainer, load_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
DATA = "needs the test images and the papers' checkpoints: "
GPU = "needs weeks of GPU time and the test images: "

CHECKLISTS: dict[str, list[str] | str] = {
    "hast 11.1 quantizer": [
        "test_checklists.py::test_quantizer_is_the_formula_of_the_specification",
        "test_ops.py::test_weight_values_and_codes",
    ],
    "hast 11.2 range tracker": ["test_hast.py::test_11_2_range_after_800_updates_is_a_plain_average"],
    "hast 11.3 BNS and FA gradients": [
        "test_images.py::test_batch_norm_gradient",
        "test_hast.py::test_11_3_alignment_gradient_has_the_closed_form",
    ],
    "hast 11.4 SDP in one backward": ["test_hast.py::test_11_4_gradients_are_exactly_those_of_two_backwards"],
    "hast 11.5 p to 1 with gamma 0.5": [
        "test_images.py::test_certain_teacher_gives_no_nan",
        "test_ops_losses.py::test_sure_samples",
    ],
    "hast 11.6 float accuracies": DATA
    + "the way there is tested on another checkpoint, test_data.py::test_real_resnet20_has_its_published_accuracy_on_all_real_test_images",
    "hast 11.7 images are logged, gamma makes them harder": [
        "test_images.py::test_optimising_lowers_the_loss",
        "test_checklists.py::test_more_gamma_more_hard_images",
    ],
    "hast 11.8 baselines": GPU + "IntraQ and HAST, W4A4 and W3A3",
    "hast 11.9 orderings": ["test_checklists.py::test_recorded_orderings"],
    "hast 11.10 best and last epoch": ["test_checklists.py::test_history_holds_best_and_last_epoch"],
    "hast 11.10 three seeds": GPU + "deviation over seeds",
    "ait 13.1 quantizer": [
        "test_checklists.py::test_quantizer_is_the_formula_of_the_specification",
        "test_ops.py::test_every_code_and_every_tie",
        "test_ops.py::test_weight_gradient_is_the_identity",
        "test_ops.py::test_act_gradients_are_the_identity",
        "test_ops.py::test_act_values",
    ],
    "ait 13.2 range trackers": ["test_ops.py::test_running_range_settles"],
    "ait 13.3 conversion counts": [
        "test_nn.py::test_counts_of_resnet20",
        "test_checklists.py::test_conversion_counts_of_the_table",
    ],
    "ait 13.4 KL gradient": ["test_losses.py::test_distillation_gradient"],
    "ait 13.5 BNS gradient": ["test_ops.py::test_bn_stats_values_and_gradient"],
    "ait 13.6 Qimera": [
        "test_generators.py::test_normalisation_axes",
        "test_generators.py::test_affine_terms_are_1_over_k_of_the_mixture",
        "test_generators.py::test_soft_labels_add_up_where_a_class_occurs_twice",
    ],
    "ait 13.7a kappa 1": ["test_optim.py::test_large_steps_are_not_amplified"],
    "ait 13.7b bracket and five mids": [
        "test_optim.py::test_equals_the_reference",
        "test_golden.py::test_every_recorded_vector_conforms",
    ],
    "ait 13.7c early stop": ["test_optim.py::test_search_stops_within_one_percent_of_the_threshold"],
    "ait 13.7d capped": ["test_optim.py::test_capped_search_ends_between_64_and_128"],
    "ait 13.7e momentum": ["test_optim.py::test_momentum_is_not_amplified"],
    "ait 13.7f zero gradient": ["test_optim.py::test_zero_gradient_changes_nothing"],
    "ait 13.8 schedules": [
        "test_checklists.py::test_published_schedule_epoch_by_epoch",
        "test_methods.py::test_decay_indices",
        "test_methods.py::test_timeline",
    ],
    "ait 13.9 float accuracies and three seeds": DATA + "see hast 11.6 and 11.10",
    "ait 13.9 best and last epoch": ["test_checklists.py::test_history_holds_best_and_last_epoch"],
    "ait 13.10 ladder": GPU
    + "GDFQ, KL-only and KL-only with inundation on CIFAR-100 W4A4; on CIFAR-10, test_checklists.py::test_recorded_ladder",
}


def test_the_table_names_every_item_and_tests_that_exist():
    for source, section, items in (("hast", "11", range(1, 11)), ("ait", "13", range(1, 11))):
        named = {int(m[1]) for key in CHECKLISTS if (m := re.match(rf"{source} {section}\.(\d+)", key))}
        assert named == set(items)
    defined: dict[str, set[str]] = {}
    for covering in CHECKLISTS.values():
        for entry in covering if isinstance(covering, list) else re.findall(r"\S+\.py::\w+", covering):
            file, name = entry.split("::")
            if file not in defined:
                tree = ast.parse((Path(__file__).parent / file).read_text())
                defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in defined[file], f"{entry} is named in the table and does not exist"
        assert covering


def _recorded(name: str) -> dict:
    (path,) = RESULTS.glob(f"cifar10_resnet20_{name}_seed0.json")
    found: dict = json.loads(path.read_text())
    return found


def test_recorded_orderings():
    """hast_family.md 11.9 at W3A3, on the committed ablations: what the students that were trained say, not that they would again."""
    last = {
        name: {
            key: student["results"]["last"]
            for key, student in _recorded(f"hast_w3a3_ablation_{name}")["students"].items()
        }
        for name in ("alignment", "weights", "samples")
    }
    assert last["alignment"]["rfa"] - last["alignment"]["dfa"] > 3
    assert last["weights"]["a1_b1"] - last["weights"]["a1_b0"] > 2
    assert min(last["samples"][n] for n in ("2560", "5120")) > max(last["samples"][n] for n in ("256", "1280"))


@pytest.mark.parametrize("bits", [4, 3])
def test_recorded_ladder(bits):
    """ait_family.md 13.10 on CIFAR-10's short schedule: KL-only above GDFQ (below it, at the published one), inundation above KL-only."""
    gdfq, kl_only, ait = (_recorded(f"{n}_w{bits}a{bits}_*")["results"]["last"] for n in ("gdfq", "kl_only", "ait"))
    assert gdfq < kl_only < ait


def _formula(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """ait_family.md section 2, hast_family.md 1.1; every operation rounds once, in float32."""
    s = (2**bits - 1) / (hi - lo).clamp(min=1e-8)
    z = (s * lo).round() + 2 ** (bits - 1)
    q = (s * x - z).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q + z) / s


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizer_is_the_formula_of_the_specification(bits, device):
    """Not the package's own reference, but the formula itself."""
    w = torch.randn(60, 37, device=device)
    w[:10] = w[:10].abs() + 0.2  # lo > 0
    w[10:20] = -w[10:20].abs() - 0.2  # hi < 0
    w[20:30] = w[20:30, :1]  # constant
    w[30] = 0
    lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    assert torch.equal(ops.fake_quant_weight(w, bits), _formula(w, lo, hi, bits))
    for low, high in ((0.0, 1.5), (-0.7, 1.5), (0.3, 1.5), (-1.5, -0.3), (0.4, 0.4)):  # many values saturate
        a, b = torch.tensor(low, device=device), torch.tensor(high, device=device)
        assert torch.equal(ops.fake_quant_act(w, a, b, bits), _formula(w, a, b, bits))


def test_more_gamma_more_hard_images():
    """The share of images with 1 - p_y > 0.5 (hast_family.md 11.7), for a teacher that is neither sure nor blind."""
    records: list[dict] = []
    for gamma in (0.0, 2.0, 4.0):
        teacher = tiny()
        teacher[-1].weight.data *= 10
        fields = dict(count=64, batch_size=64, iterations=60, lr=0.05, hard_weight=1.0, hard_gamma=gamma)
        make(teacher, options={"log": lambda **r: records.append(r)}, **fields)
    shares = [record["images_hard_share"] for record in records]
    assert shares[0] < shares[1] < shares[2]


# Model of pytorchcv, input; batch norms, their channels; weight tensors, weights, smallest, largest, rows; other trainable tensors,
# parameters; activation quantizers; quantized activations and batch-norm inputs per image.
COUNTS = [
    ("resnet20_cifar10", 32, 21, 784, 22, 270_896, 432, 36_864, 794, 43, 1_578, 19, 188_416, 200_704),
    ("resnet20_cifar100", 32, 21, 784, 22, 276_656, 432, 36_864, 884, 43, 1_668, 19, 188_416, 200_704),
    ("resnet18", 224, 20, 4_800, 21, 11_678_912, 8_192, 2_359_296, 5_800, 41, 10_600, 17, 2_308_096, 2_483_712),
    ("resnet50", 224, 53, 26_560, 54, 25_502_912, 4_096, 2_359_296, 27_560, 107, 54_120, 49, 9_081_856, 10_587_136),
    ("mobilenetv2_w1", 224, 53, 17_088, 54, 3_470_784, 288, 1_280_000, 18_088, 106, 34_176, 36, 6_507_200, 7_079_520),
]


@pytest.mark.parametrize("row", COUNTS, ids=[row[0] for row in COUNTS])
def test_conversion_counts_of_the_table(row):
    """ait_family.md section 2, the whole table."""
    pytest.importorskip("pytorchcv")
    from pytorchcv.model_provider import get_model

    name, size, *want = row
    student = zsq.convert(get_model(name, pretrained=False).eval(), 4, 4)
    norms = zsq.nn.usable_batch_norms(student)
    weights = [s for s in zsq.summarize(student).sites if s.kind in ("conv", "linear")]
    acts = [m for m in student.modules() if isinstance(m, zsq.QuantAct)]
    taken = {id(p) for p in zsq.nn.quantized_weights(student).values()}
    others = [p.numel() for p in student.parameters() if id(p) not in taken]
    elements = {"acts": 0, "norms": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        elements["acts" if isinstance(module, zsq.QuantAct) else "norms"] += args[0].numel()

    for module in (*acts, *norms.values()):
        module.register_forward_pre_hook(count)
    with torch.no_grad():
        student(torch.zeros(1, 3, size, size))
    sizes = [s.numel for s in weights]
    found = [len(norms), sum(m.num_features for m in norms.values())]
    found += [len(sizes), sum(sizes), min(sizes), max(sizes), sum(s.rows for s in weights)]
    found += [len(others), sum(others), len(acts), elements["acts"], elements["norms"]]
    assert found == want


@pytest.mark.parametrize("size, warmup, threshold", [(32, 4, 1e-3), (224, 50, 1e-4)])
def test_published_schedule_epoch_by_epoch(size, warmup, threshold):
    """Rates and threshold around the milestones, the cap's one epoch, frozen ranges, the first student step (ait_family.md 1.4)."""
    recipe = load_recipe("ait", input_size=(3, size, size))
    trainer = Trainer(tiny(), recipe, input_size=(3, 8, 8))
    acts = [m for m in trainer.student.modules() if isinstance(m, zsq.QuantAct)]
    gi, plain = trainer.gi.param_groups[0], trainer.optimizers[0].param_groups[0]
    for epoch in (0, 3, 4, warmup, warmup + 1, 99, 100, 199, 200, 299, 300, 399):
        trainer._set_schedule(epoch)
        factor = 0.1 ** sum(epoch >= m for m in (100, 200, 300))
        assert gi["lr"] == plain["lr"] == pytest.approx(1e-4 * factor)
        assert gi["threshold"] == pytest.approx(threshold * factor)
        assert gi["capped"] == (epoch <= warmup)
        assert all(act.frozen == (epoch >= 4) for act in acts)
    assert recipe.student_steps == (400 - warmup) * 200


def test_history_holds_best_and_last_epoch():
    """Nothing is chosen by accuracy, but every epoch's can be reported: the best next to the last."""
    options = ["schedule.epochs=4", "schedule.iterations=2", "schedule.batch_size=8", "schedule.warmup_epochs=1",
               "schedule.calibration_epochs=1", "quant.ema=plain"]  # fmt: skip
    recipe, scores = load_recipe("ait", input_size=(3, 8, 8), overrides=options), iter([90.0, 40.0, 60.0, 55.0, 50.0])
    trainer = Trainer(tiny(), recipe, input_size=(3, 8, 8), evaluate=lambda network: next(scores), eval_every=1)
    result = trainer.run()
    epochs = [record["top1"] for record in result.history if record["epoch"] >= 1]
    assert max(epochs) == 60.0 and epochs[-1] == result.evaluations["last"] == 50.0
