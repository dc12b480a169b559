"""The layout of one method tensor at one matched leaf: its axes and keys, and the sizes of the base leaf's axes.

`plan.py` combines these layouts into a plan. Pure: names and shapes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jaxadapt.arrays.layout import part_sizes
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.parts import part_key
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.keymaps.weight import Weight

Layout = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]


def tensor_layout(match: Match, tensor: MethodTensor) -> Layout:
    """Return a tensor's axis names in the model (stacked axes at the base weight's positions) and in the file.

    The method's own axes are marked "~", because a base weight may have an axis called "r" as well.
    """
    cache = match.weight.layout_cache  # all layers share one entry of the keymap
    layout = cache.get(tensor)
    if layout is None:
        layout = cache[tensor] = _make_layout(match, tensor)
    return layout


def _make_layout(match: Match, tensor: MethodTensor) -> Layout:
    if tensor.is_copy:
        return match.weight.left, match.weight.right

    def expand(names: Iterable[str], roles: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(n for name in names for n in roles.get(name, (f"~{name}",)))

    left = list(expand(tensor.axes, match.roles))
    for axis in match.stack:  # ascending, so that each insertion is at the base weight's position
        if axis > len(left):
            raise KeyMapError(
                f"leaf {match.leaf!r} stacks its layers on axis {axis}, but its {tensor.name} has only"
                f" {len(left)} axes; stack the layers on an axis from 0 to {len(left)}"
            )
        left.insert(axis, match.weight.left[axis])
    torch = match.weight.torch_roles
    right: list[tuple[str, ...]] = []
    for group in tensor.torch:
        if match.weight.kind == "conv" and "in" in group:
            channels, *window = match.weight.right[1:]
            right += [expand((name for name in group if name != "in"), torch) + channels, *window]
        else:
            right.append(expand(group, torch))
    return tuple(left), tuple(right)


def torch_axes(match: Match, tensor: MethodTensor) -> tuple[tuple[str, ...], ...]:
    """Return the axes of a tensor in the file, each a group of the base weight's axes or of "~" and a method's axis."""
    return tensor_layout(match, tensor)[1]


def scale_factor(keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> float:
    """Return the factor by which to multiply the file's tensor to get the model's.

    Raises `KeyMapError` if the base weight is scaled and the effect on this tensor is not defined.
    """
    factor = 1.0
    if match.weight.scale is not None and tensor.scale_power != 0:
        if tensor.scale_power is None:
            raise KeyMapError(
                f"cannot convert {tensor.name} of leaf {match.leaf!r}: the keymap {keymap.name!r} defines the leaf as"
                " PyTorch's weight times a factor, and the effect of a factor on this tensor is not defined. Exclude"
                " the module, or use a method such as LORA"
            )
        factor = match.weight.factor(sizes) ** tensor.scale_power
    return factor


def tensor_key(keymap: KeyMap, match: Match, tensor: MethodTensor, text: Mapping[str, str]) -> str:
    """Return the key of one tensor in the file; the name of the root module is empty."""
    weight = match.weight
    if tensor.is_copy:
        module, parameter = match.parameter(text)
        return tensor_part_key(
            weight, paths.join(f"{keymap.prefix}{module}".rstrip(".") + tensor.suffix, parameter), weight.right
        )
    suffix = f".base_layer.out_proj{tensor.suffix}" if weight.products == 2 else tensor.suffix
    module = match.parameter(text)[0] if weight.kind == "experts" else match.module(text)
    return tensor_part_key(weight, f"{keymap.prefix}{module}".rstrip(".") + suffix, torch_axes(match, tensor))


def tensor_part_key(weight: Weight, key: str, axes: Sequence[tuple[str, ...]]) -> str:
    """Return the key of a tensor with these axes; a part key if the file tensor holds several leaves."""
    if not weight.part:
        return key
    return part_key(key, next((i for i, axis in enumerate(axes) if axis == weight.part_axis), None), weight.part)


def model_shape(match: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of one tensor in the model."""
    all_sizes = {**sizes, **{f"~{name}": size for name, size in tensor.own}}
    if match.parts is not None:
        all_sizes[match.roles["fused"][0]] = len(match.parts)
    return tuple(all_sizes[n] for n in tensor_layout(match, tensor)[0])


def axis_sizes(match: Match, shape: Sequence[int]) -> dict[str, int]:
    """Return the axis sizes of a base leaf by name; raise `MismatchError` if its entry contradicts the shape."""
    left = match.weight.left
    if len(left) != len(shape):
        raise MismatchError(
            f"leaf {match.leaf!r} has shape {tuple(shape)}, but the pattern of its entry, {match.weight.pattern!r},"
            f" names {len(left)} axes"
        )
    sizes = dict(zip(left, shape, strict=True))
    for axis, size in sizes.items():
        part_sizes(axis, size, dict(match.weight.sizes))
    for axis in match.roles["fused"]:
        names = match.weight.index_names(axis)
        if names is not None and len(names) != sizes[axis]:
            raise MismatchError(
                f"leaf {match.leaf!r} has size {sizes[axis]} on its fused axis, but its entry names {list(names)}"
            )
    return sizes


def axis_sizes_from_tensors(
    match: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return the axis sizes by name from the shapes of an adapter's tensors, without the base.

    Raises `MismatchError` if a tensor is missing, unknown or has the wrong number of axes, or if two tensors disagree.
    """
    sizes = {axis: len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"]}
    parts = {axis: size if match.parts is None else len(match.parts) for axis, size in sizes.items()}
    known = {t.name for t in tensors}
    problems = [f"{match.leaf}.{name}: the method has no such tensor" for name in shapes if name not in known]
    for tensor in tensors:
        left, _ = tensor_layout(match, tensor)
        shape = shapes.get(tensor.name)
        if shape is None and not tensor.trained:
            continue  # a tree with the trained tensors only
        if shape is None:
            problems.append(f"{match.leaf}.{tensor.name}: missing")
            continue
        if len(shape) != len(left):
            axes = " ".join(left).replace("~", "")
            problems.append(f"{match.leaf}.{tensor.name}: expected axes ({axes}), found shape {tuple(shape)}")
            continue
        fixed = {**parts, **{f"~{name}": size for name, size in tensor.own}}
        for name, size in zip(left, shape, strict=True):
            expected = fixed[name] if name in fixed else sizes.setdefault(name, size)
            if expected != size:
                axis = name.strip("~{}")
                problems.append(f"{match.leaf}.{tensor.name}: axis {axis!r} has size {size}, expected {expected}")
            try:
                part_sizes(name, size, dict(match.weight.sizes))
            except MismatchError as error:
                problems.append(f"{match.leaf}.{tensor.name}: {error}")
    raise_listed(
        MismatchError,
        "the adapter's tensors contradict each other or its configuration:",
        problems,
        "\nIf several adapters are stacked (for example by vmap), select one: jax.tree.map(lambda x: x[0], tree)",
    )
    return sizes


def stack_sizes(match: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the sizes of the numbered axes, from the tensors that have the right number of axes."""
    numbered = [axis for axis in match.braced if match.weight.index_names(axis) is None]
    layouts = [(tensor_layout(match, t)[0], shapes[t.name]) for t in tensors if t.name in shapes]
    fitting = [dict(zip(left, shape, strict=True)) for left, shape in layouts if len(left) == len(shape)]
    return {axis: sizes[axis] for sizes in reversed(fitting) for axis in numbered if axis in sizes}
