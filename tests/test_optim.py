"""Gradient inundation against the reference, step by step, and the rules of ait_family.md 7.2 and 7.5 one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsq_fast as zsq
from zsq_fast import ops, reference
from zsq_fast.errors import UsageError

SHAPES = [(16, 3, 3, 3), (32, 1, 3, 3), (10, 64), (5, 1, 1, 1), (300, 1000)]


def problem(shapes, device="cpu", grad=1e-3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda s, scale: (torch.randn(s, generator=rng) * scale).to(device)  # noqa: E731
    return [draw(s, 0.1) for s in shapes], [draw(s, grad) for s in shapes], [draw(s, 3 * grad) for s in shapes]


def step(
    function,
    weights,
    grads,
    momenta,
    lr=1e-4,
    momentum=0.9,
    nesterov=True,
    weight_decay=0.0,
    bits=4,
    threshold=1e-3,
    search_steps=5,
    capped=False,
    guaranteed=False,
):
    """Apply one step to copies; returns weights, momenta, kappa, changed."""
    w, v = [t.clone() for t in weights], [t.clone() for t in momenta]
    kappa = torch.full((len(w),), -1.0, device=w[0].device)
    changed = torch.full((len(w),), -1, dtype=torch.int64, device=w[0].device)
    function(
        w,
        [g.clone() for g in grads],
        v,
        kappa,
        changed,
        lr,
        momentum,
        nesterov,
        weight_decay,
        bits,
        threshold,
        search_steps,
        capped,
        guaranteed,
    )
    return w, v, kappa, changed


def both(*args, **kwargs):
    """Kernel and reference on the same problem, compared bit for bit."""
    got, want = step(torch.ops.zsq.gi_sgd_, *args, **kwargs), step(reference.gi_sgd_, *args, **kwargs)
    for a, b in zip((*got[0], *got[1], *got[2:]), (*want[0], *want[1], *want[2:]), strict=True):
        assert torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7)), f"{got[2]} != {want[2]}"
    return got


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("threshold", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"weight_decay": 1e-2},
        {"search_steps": 0},
        {"search_steps": 2},
        {"bits": 8},
        {"guaranteed": True},
    ],
)
def test_equals_the_reference(capped, threshold, options, device):
    weights, grads, momenta = problem(SHAPES, device)
    for lr in (1e-2, 1e-5):
        both(weights, grads, momenta, lr=lr, threshold=threshold, capped=capped, **options)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 12), cols=st.integers(1, 90), bits=st.integers(2, 8), lr=st.sampled_from([1e-7, 1e-4, 1.0]),
    threshold=st.sampled_from([1e-4, 0.02, 0.5]), capped=st.booleans(), guaranteed=st.booleans(), grad=st.sampled_from([1e-30, 1e-3, 1e3]),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep(rows, cols, bits, lr, threshold, capped, guaranteed, grad, seed):
    options = {"lr": lr, "bits": bits, "threshold": threshold, "capped": capped, "guaranteed": guaranteed}
    both(*problem([(rows, cols)], grad=grad, seed=seed), **options)


def test_last_midpoint_or_guaranteed_share():
    """The published search may end below the threshold; guaranteed, it never does, and asks for no more than a step of the bisection."""
    short = 0
    for seed in range(40):
        given = problem([(6, 50)], grad=1e-5, seed=seed)
        options = {"lr": 1e-3, "threshold": 0.02, "search_steps": 4}
        (_, _, last, moved), (_, _, reached, enough) = (both(*given, **options, guaranteed=g) for g in (False, True))
        short += int(moved) < 0.02 * 300
        assert int(enough) >= 0.02 * 300 and last <= reached <= last * (1 + 1 / 16)
    assert short > 5


ADAPTIVE = [
    (zsq.optim.GIAdam, torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-6}),
    (zsq.optim.GIRMSprop, torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6}),
]


@pytest.mark.parametrize("mine, torchs, own", ADAPTIVE, ids=["adam", "rmsprop"])
def test_adaptive_optimizers(mine, torchs, own, device):
    """At a threshold of 0 torch's steps; above, the same directions amplified until enough codes change; bad gradients leave no trace."""
    weights, _, _ = problem(SHAPES[:3], device)
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in "ab")
    a = mine(ours, lr=0.01, weight_decay=1e-2, threshold=0.0, **own)
    b = torchs(theirs, lr=0.01, weight_decay=1e-2, **own)
    for i in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device)
        a.step(), b.step()
        assert a.kappa.tolist() == [1, 1, 1]
        if i == 10:  # for one of ours alone
            before, ours[1].grad = ours[1].detach().clone(), torch.full_like(ours[1], float("nan"))
            a.step()
            assert torch.equal(ours[1], before) and a.kappa.isnan().tolist() == [False, True, False]
            ours[0].data.copy_(theirs[0]), ours[2].data.copy_(theirs[2])
            for p, q in zip((ours[0], ours[2]), (theirs[0], theirs[2]), strict=True):
                for name, value in a.state[p].items():
                    value.copy_(b.state[q]["step" if name == "count" else name])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in ours]
    for group in a.param_groups:
        group.update(lr=1e-9, threshold=0.05, guaranteed=True)
    a.step()
    assert (a.kappa > 1).all() and (a.changed >= 0.05 * a.changed.new_tensor([p.numel() for p in ours])).all()
    assert not any(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
    again = mine([torch.nn.Parameter(p.detach().clone()) for p in ours], **own)
    again.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(ours, again.param_groups[0]["params"], strict=True):
        q.grad = p.grad
    a.step(), again.step()
    for p, q in zip(ours, again.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def _between_codes(w, bits=4):
    """Every weight an ulp or none from where its code changes; the ends of a row stay."""
    lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = (2**bits - 1) / (hi - lo)
    near = ((scale * (w - lo)).floor() + 0.5) / scale + lo
    ulps = torch.randint(-1, 2, w.shape, generator=torch.Generator().manual_seed(1))
    near = near + ulps * near.abs() * 2**-23
    return torch.where((w == lo) | (w == hi), w, near)


EDGES = {
    "weights between two codes": _between_codes,
    "zero points between two values": lambda w: torch.cat([w, -w], 1),  # symmetric rows: scale * lo = -7.5
    "many weights at the ends": lambda w: w.clamp(-0.05, 0.07),
    "far from zero": lambda w: w + 1000,
    "all of one sign": lambda w: w.abs() + 0.01,
    "constant rows": lambda w: w[:, :1].expand_as(w).contiguous(),
    "two values": lambda w: w.sign() * 0.1,
    "subnormal": lambda w: w * 1e-42,
    "huge": lambda w: w * 1e38,
    "rows with NaN": lambda w: torch.where(torch.arange(len(w))[:, None] % 5 == 0, float("nan"), w),
}


@pytest.mark.parametrize("edge", EDGES)
def test_rows_where_single_weights_decide(edge):
    """The search leaves out the weights that cannot matter; here almost all of them can, or may seem not to."""
    for seed, (lr, grad) in enumerate([(1e-4, 1e-5), (1e-4, 1e-3), (1e-2, 1e-2), (1.0, 10.0), (0.0, 1e-3)]):
        weights, grads, momenta = problem([(40, 150), (7, 20)], grad=grad, seed=seed)
        weights = [EDGES[edge](w) for w in weights]
        wider = weights[0].shape[1] // grads[0].shape[1]
        grads, momenta = ([t.repeat(1, wider) for t in tensors] for tensors in (grads, momenta))
        for threshold in (1e-3, 2e-2, 0.3):
            both(weights, grads, momenta, lr=lr, threshold=threshold)


@pytest.mark.parametrize("ends", ["move outwards", "are overtaken"])
def test_the_bounds_of_the_search_are_wide_enough(ends):
    """All directions are equally long and add to what the moving range does to the codes, up to the last candidate, 126."""
    w = problem([(200, 150)])[0][0]
    if ends == "are overtaken":
        w = w.sort(1).values
        w[:, 1], w[:, -2] = w[:, 0] + 1e-4, w[:, -1] - 1e-4
    outer = (w == w.amin(1, keepdim=True)) | (w == w.amax(1, keepdim=True))
    if ends == "are overtaken":
        outer = ~outer & ((w <= w[:, 1:2]) | (w >= w[:, -2:-1]))
    for length in (0.02, 0.05, 0.1):
        gradient = length * torch.where(outer, -w.sign(), w.sign())
        both([w], [gradient], [torch.zeros_like(w)], nesterov=False, capped=True, threshold=0.9)


def test_large_steps_are_not_amplified():
    weights, grads, momenta = problem(SHAPES[:3], grad=1.0)
    assert both(weights, grads, momenta, lr=1.0)[2].tolist() == [1, 1, 1]


def test_a_tensor_that_cannot_reach_the_threshold_takes_the_plain_step():
    weights, _, _ = problem([(4, 9)])
    grads, momenta = [torch.full((4, 9), 1e-38)], [torch.zeros(4, 9)]
    assert both(weights, grads, momenta, lr=1e-4)[2].item() == 1


def test_zero_gradient_changes_nothing():
    weights, _, _ = problem(SHAPES[:2])
    zeros = [torch.zeros_like(w) for w in weights]
    w, _, kappa, changed = both(weights, zeros, zeros)
    assert (
        kappa.tolist() == [1, 1]
        and changed.tolist() == [0, 0]
        and all(torch.equal(a, b) for a, b in zip(w, weights, strict=True))
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_leaves_its_tensor_alone(bad):
    weights, grads, momenta = problem(SHAPES[:3])
    grads[1][0, 0, 0, 0] = bad
    w, v, kappa, changed = both(weights, grads, momenta)
    assert kappa[1].isnan() and changed[1] == 0 and torch.equal(w[1], weights[1]) and torch.equal(v[1], momenta[1])
    assert kappa[0] >= 1 and not torch.equal(w[0], weights[0])


def test_capped_search_ends_between_64_and_128():
    weights, grads, momenta = problem([(10, 64)], grad=1e-9)
    assert both(weights, grads, momenta, capped=True)[2].item() == 126  # all five bisections go up: 64 + 62


def test_momentum_is_not_amplified():
    weights, grads, momenta = problem(SHAPES[:1], grad=1e-6)
    _, v, kappa, _ = both(weights, grads, momenta)
    assert kappa.item() > 1 and torch.equal(v[0], 0.9 * momenta[0] + grads[0])


def test_search_stops_within_one_percent_of_the_threshold():
    """With 1000 weights and a threshold of 0.25 the counts 248..252 stop the bisection early; the kappa is then no 32nd."""
    stopped = 0
    for seed in range(40):
        weights, grads, momenta = problem([(10, 100)], seed=seed)
        _, _, kappa, changed = both(weights, grads, momenta, threshold=0.25)
        fraction = kappa.item() / 2 ** torch.floor(torch.log2(kappa)).item()
        stopped += abs(changed.item() / 1000 - 0.25) < 0.0025 and (fraction * 32) % 2 == 0
    assert stopped > 0


def test_layouts(device):
    shape = (8, 6, 3, 3)
    weights, grads, momenta = problem([shape], device)
    want = step(torch.ops.zsq.gi_sgd_, weights, grads, momenta)
    last = [t.to(memory_format=torch.channels_last) for t in (weights[0], momenta[0])]
    for g in (
        grads[0],
        grads[0].to(memory_format=torch.channels_last),
        grads[0].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        got = step(torch.ops.zsq.gi_sgd_, [last[0]], [g], [last[1]])
        assert all(
            torch.equal(a, b)
            for a, b in zip((*got[0], *got[1], *got[2:]), (*want[0], *want[1], *want[2:]), strict=True)
        )


def test_bits_do_not_depend_on_threads():
    weights, grads, momenta = problem(
        [(600, 500), (16, 9), (40, 900)]
    )  # one wide tensor, two that go to single threads
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(step(torch.ops.zsq.gi_sgd_, weights, grads, momenta))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(
            torch.equal(a, b)
            for a, b in zip((*other[0], *other[1], *other[2:]), (*seen[0][0], *seen[0][1], *seen[0][2:]), strict=True)
        )


def test_optimizer_without_inundation_is_sgd(device):
    """With a threshold of 0 every kappa is 1 and 20 steps equal torch's SGD but for its fused rounding."""
    weights, _, _ = problem(SHAPES[:3], device)
    mine, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in "ab")
    ours = zsq.optim.GISGD(mine, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, threshold=0.0)
    torchs = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for i in range(20):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device)
        ours.step()
        torchs.step()
        assert ours.kappa.tolist() == [1, 1, 1]
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_optimizer_groups_missing_gradients_and_state():
    weights, grads, _ = problem(SHAPES[:3])
    params = [torch.nn.Parameter(w) for w in weights]
    opt = zsq.optim.GISGD([{"params": params[:1]}, {"params": params[1:], "bits": 3, "capped": True}], lr=1e-4)
    params[0].grad, params[2].grad = grads[0], grads[2]
    opt.step()
    assert opt.kappa[1] == 0 and opt.changed[1] == 0 and opt.kappa[0] >= 1 and 1 <= opt.kappa[2] <= 128
    later = zsq.optim.GISGD(params[:1], lr=1e-4)
    later.add_param_group({"params": params[1:]})
    later.step()
    assert later.kappa.shape == (3,)
    again = zsq.optim.GISGD([{"params": params[:1]}, {"params": params[1:]}], lr=1.0)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[1]["capped"] and again.param_groups[0]["lr"] == 1e-4
    assert torch.equal(again.state[params[2]]["momentum_buffer"], opt.state[params[2]]["momentum_buffer"])


@pytest.mark.parametrize(
    "wrong, words", [({"bits": 1}, "bits"), ({"threshold": 2}, "threshold"), ({"momentum": 0.0}, "nesterov")]
)
def test_wrong_options(wrong, words):
    with pytest.raises(UsageError, match=words):
        zsq.optim.GISGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **wrong)


def test_wrong_arguments_are_named():
    weights, grads, momenta = problem(SHAPES[:2])
    call = lambda w, g, v, n=2, **o: ops.gi_sgd_(w, g, v, torch.zeros(n), torch.zeros(n, dtype=torch.int64), **{**dict(  # noqa: E731
        lr=1e-4, momentum=0.9, nesterov=True, weight_decay=0.0, bits=4, threshold=1e-3), **o})  # fmt: skip
    for error, words, run in (
        (ValueError, "as many", lambda: call(weights, grads[:1], momenta)),
        (ValueError, r"grads\[1\] must have shape", lambda: call(weights, [grads[0], grads[0]], momenta)),
        (TypeError, "float32", lambda: call([w.double() for w in weights], grads, momenta)),
        (ValueError, "kappa must be contiguous with shape", lambda: call(weights, grads, momenta, n=3)),
        (ValueError, "lr must be finite", lambda: call(weights, grads, momenta, lr=float("nan"))),
        (ValueError, "search_steps must be 0 to 5", lambda: call(weights, grads, momenta, search_steps=6)),
    ):
        with pytest.raises(error, match=words):
            run()
