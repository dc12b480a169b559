"""What a method stores for one base weight, as a description without values."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a method stores for one site: its name, its PEFT key suffix and its two layouts.

    `axes` (in the model) and `torch` (in the file) name roles of the base weight's axes, "batch", "inn",
    "out", "channels" (of a convolution's inputs), or axes of the method's own with their sizes in `own`. An empty
    torch group is a size-1 axis; "inn" of a convolution is one PyTorch axis for the channels and one for each of the
    window's.

    `whole`: the tensor is a copy of the base weight itself, in both its layouts; `suffix` then goes between the
    module's name and the parameter's. `from_base`: its initial value follows from the base weight's.

    `degree` says what becomes of the tensor where one model holds f times the weight of the other (MaxText's
    queries): 1, it is multiplied by f as well; 0, it stays what it is; None, the method has no tensors for such
    a weight, or nobody has thought about it, and it is refused.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    torch: tuple[tuple[str, ...], ...]
    own: tuple[tuple[str, int], ...] = ()
    whole: bool = False
    from_base: bool = False
    degree: int | None = None
