"""Where two networks are compared inside: feature points found by the structure of the forward pass, and taps on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UnsupportedModelError, UsageError, nearest
from zsq_fast.nn.probe import probing


def feature_points(model: nn.Module, input_size: Sequence[int]) -> tuple[str, ...]:
    """Names of the modules whose outputs HAST aligns (hast_family.md 5.3), in the order of the forward pass.

    Read off the autograd graph of one forward on zeros, so any forward will do and no class or attribute name counts:

    - where two tensors are added, the operand with more convolutions behind it, if a module returned it: the output of a
      residual branch, after its last batch norm;
    - the batch norm of a 1x1 convolution that works on the output of a depthwise one: the end of a depthwise-separable
      block or of an inverted residual block, with or without a residual connection.

    Args:
        input_size: `(C, H, W)`.

    Raises:
        UsageError: the network does not run on that size.
        UnsupportedModelError: there is no such place.
    """
    made_by, leaf, root = _trace(model, input_size)
    depth = {leaf: 0}  # most convolutions on a path from the input; nodes that the input does not reach are missing
    latest: dict[Any, set[nn.Module | None]] = {leaf: set()}  # the convolutions next upstream
    found: list[str] = []
    for node in _in_order(root):
        before = [n for n, _ in node.next_functions if n in depth]
        if not before:
            continue
        name, module = made_by.get(node, ("", None))
        is_conv = node.name().startswith("ConvolutionBackward")
        depth[node] = max(depth[n] for n in before) + is_conv
        latest[node] = {module} if is_conv else _above(node, latest)
        if node.name().startswith("AddBackward") and len({depth[n] for n in before}) == 2:
            branch = max(before, key=lambda n: depth[n])
            if branch in made_by:
                found.append(made_by[branch][0])
        elif isinstance(module, nn.BatchNorm2d):
            _, conv = made_by.get(before[0], ("", None))
            if _is_pointwise(conv) and any(map(_is_depthwise, _above(before[0], latest))):
                found.append(name)
    if not found:
        raise UnsupportedModelError(
            "no feature points found: the forward adds no residual branch that a module returns and has no 1x1 convolution "
            "with batch norm after a depthwise one; name modules yourself (recipe option student.feature_points)."
        )
    return tuple(dict.fromkeys(found))


_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Squeeze", "Unsqueeze", "Clone")
_AVERAGES = ("Mean", "AdaptiveAvgPool2D", "AvgPool2D")


def class_map_layers(model: nn.Module, input_size: Sequence[int]) -> tuple[str, str]:
    """Names of the module that returns the last feature map and of the classifier behind its global average.

    Read off the autograd graph, then checked: the classifier on the averages must give the logits. So the gradient of logit y
    by the map is row y of the classifier's weight over `H * W`, everywhere (hast_family.md section 10.3, rank 6).

    Args:
        input_size: `(C, H, W)`.

    Raises:
        UsageError: the network does not run on that size.
        UnsupportedModelError: the network does not end in this way; the message says how it does.
    """
    made_by, leaf, root = _trace(model, input_size)
    reached = {leaf}
    for node in _in_order(root):
        if any(n in reached for n, _ in node.next_functions):
            reached.add(node)

    def source(node: Any) -> Any:
        """What a node computes from, reshaping left out."""
        node = next(n for n, _ in node.next_functions if n in reached)
        return source(node) if node.name().startswith(_RESHAPES) else node

    def refuse(found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            "class activation maps need a network that ends in global average pooling and one linear layer (or 1x1 convolution), "
            f"but {found}; set student.cam_weight=0."
        )

    def describe(node: Any) -> str:
        name, module = made_by.get(node, ("", None))
        return f"'{name}' ({type(module).__name__})" if name else f"an operation outside modules ({node.name()})"

    end = source(root) if root.name().startswith(_RESHAPES) else root
    name, classifier = made_by.get(end, ("", None))
    if not isinstance(classifier, (nn.Linear, nn.Conv2d)):
        raise refuse(f"its logits come from {describe(end)}")
    pool = source(end)
    if not pool.name().startswith(_AVERAGES):
        raise refuse(f"the input of its classifier '{name}' comes from {describe(pool)}")
    point, _ = made_by.get(source(pool), ("", None))
    if not point:
        raise refuse(f"the input of the pooling comes from {describe(source(pool))}")
    with FeatureTap(model, [point]) as tap, probing(model, input_size, []) as x, torch.no_grad():
        logits = model(x + torch.linspace(-1, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x))
        features, rows = tap.features()[-1], classifier.weight.flatten(1)
    if features.dim() == 4 and features.shape[1] == rows.shape[1]:
        again = F.linear(features.mean((2, 3)), rows, classifier.bias)
        if torch.allclose(again, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            return point, name
    raise refuse(f"its logits are not those of '{name}' on the mean of '{point}', {list(features.shape)}")


def _above(node: Any, latest: dict[Any, set[nn.Module | None]]) -> set[nn.Module | None]:
    """The convolutions next upstream of a node, itself left out."""
    return set().union(*(latest[n] for n, _ in node.next_functions if n in latest))


def _is_pointwise(m: nn.Module | None) -> bool:
    return isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1


def _is_depthwise(m: nn.Module | None) -> bool:
    return isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1


def _trace(model: nn.Module, input_size: Sequence[int]) -> tuple[dict[Any, tuple[str, nn.Module]], Any, Any]:
    """Per node of the autograd graph the innermost module that returned it; the node of the input; the graph's root."""
    made_by: dict[Any, tuple[str, nn.Module]] = {}

    def note(name: str, module: nn.Module, out: Any) -> None:
        if isinstance(out, Tensor) and out.grad_fn is not None and not isinstance(module, nn.Identity):
            made_by.setdefault(out.grad_fn, (name, module))  # inner modules return first

    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: note(name, m, out)) for name, m in model.named_modules()
    ]
    with probing(model, input_size, handles) as zeros, torch.enable_grad():
        source = zeros.requires_grad_() * 1  # not a leaf, which nothing may write over in place
        leaf = source.grad_fn
        out = model(source)
    if not isinstance(out, Tensor):
        raise UnsupportedModelError(f"the model must return class logits [N, classes], got {type(out).__name__}")
    return made_by, leaf, out.grad_fn


def _in_order(root: Any) -> list[Any]:
    """Nodes of an autograd graph, each after everything it depends on."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, complete = stack.pop()
        if complete:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions)
    return order


class FeatureTap:
    """Context manager that records the outputs of named modules, with their gradient history.

    >>> with FeatureTap(student, names) as tap:
    ...     logits = student(images)
    ...     features = tap.features()      # in the order they were computed; clears the record

    What the network later writes over in place (torchvision's `out += identity`) is recorded as it was before.

    Raises:
        UsageError: the network has no module of such a name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        modules = dict(model.named_modules())
        self._modules: dict[str, nn.Module] = {}
        for name in names:
            if name not in modules:
                raise UsageError(f"the model has no module '{name}' to take features from.{nearest(name, modules)}")
            self._modules[name] = modules[name]
        self._record: list[tuple[str, Tensor, Tensor, int]] = []
        self._overwritten: set[str] | None = None  # not known before a first forward has been through
        self._handles: list[Any] = []

    def _hook(self, name: str, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise UsageError(f"the module '{name}' returns {type(out).__name__}; features are taken from tensors.")
        passed = out.clone() if self._overwritten is None or name in self._overwritten else out
        self._record.append((name, out, passed, passed._version))
        return passed

    def __enter__(self) -> FeatureTap:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(lambda m, args, out, name=name: self._hook(name, out)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._record.clear()

    def features(self) -> list[Tensor]:
        """What the tapped modules returned since the last call, one tensor per call of a module.

        Raises UsageError when one of them was not run.
        """
        missing = self._modules.keys() - {name for name, *_ in self._record}
        if missing:
            raise UsageError(f"the module '{min(missing)}' gives no features: the forward does not run it.")
        if self._overwritten is None:
            self._overwritten = {name for name, _, passed, version in self._record if passed._version != version}
        features = [out for _, out, _, _ in self._record]
        self._record.clear()
        return features
