"""How far the transformer's call is from what the machine's matrix products and attention allow."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import BenchmarkError, Times, interleaved, table
from benchmarks.sizes import Sizes
from benchmarks.wan import DTYPES, Call, Pair, calls

_SHARE = 0.01  # of the counted operations, from which on a shape's own rate is measured
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Work:
    """A kind of heavy operation and its shapes.

    Attributes:
        kind: "product" of `[M, K]` with `[K, N]`, or "attention" of `[B, H, N, d]` over `[B, H, M, d]`.
    """

    kind: Literal["product", "attention"]
    shapes: Shapes

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        if self.kind == "product":
            (rows, inner), (_, columns) = self.shapes
            return 2 * rows * inner * columns
        query, key = self.shapes
        return 4 * math.prod(query) * key[-2]

    @property
    def title(self) -> str:
        """For the table."""
        first, second = ("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.kind} {first} {'by' if self.kind == 'product' else 'over'} {second}"

    def call(self, dtype: torch.dtype) -> Callable[[], object]:
        """It alone, on random numbers, as the model's layers do it."""
        first, second = (torch.randn(shape, dtype=dtype) for shape in self.shapes)
        if self.kind == "product":
            weight, bias = second.T.contiguous(), torch.randn(second.shape[1], dtype=dtype)
            return lambda: F.linear(first, weight, bias)
        value = torch.randn_like(second)
        return lambda: F.scaled_dot_product_attention(first, second, value)


class Recorder(TorchDispatchMode):
    """Counts the heavy operations of what runs inside.

    torch's own `FlopCounterMode` leaves out attention on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Work] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        work = self._work(func.overloadpacket.__name__, args)
        if work is not None:
            self.found[work] += 1
        return func(*args, **(kwargs or {}))

    def _work(self, name: str, args: Sequence[Any]) -> Work | None:
        if name == "mm":
            return Work("product", _shapes(*args[:2]))
        if name == "addmm":
            return Work("product", _shapes(*args[1:3]))
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return Work("attention", _shapes(*args[:2]))
        if name == "convolution":  # the patch embedding, whose patches do not overlap: a product
            clips, kernel = args[:2]
            patches = clips.numel() // math.prod(kernel.shape[1:])
            inner = math.prod(kernel.shape[1:])
            return Work("product", ((patches, inner), (inner, kernel.shape[0])))
        if any(part in name for part in ("attention", "bmm", "conv")):
            raise BenchmarkError(f"the transformer's call has an operation that is not counted: {name}")
        return None


def _shapes(*tensors: torch.Tensor) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the tables."""
    parts = [
        "Operations are multiplications and additions of matrix products (the patch embedding is one) and of "
        "attention, counted from the shapes that run. Attainable is the time in which the machine does so "
        "many at the best rate that it reaches at one of the model's own shapes, for products and attention "
        f"each; shapes with less than {_SHARE:.0%} of the operations are not measured alone. Calls and "
        f"shapes take turns; median of {sizes.rounds} rounds, blocks: {sizes.blocks[1]}, "
        f"{sizes.latent_frames} x {sizes.latent_size} x {sizes.latent_size} latents."
    ]
    for name, dtype in DTYPES.items():
        made = calls(Pair.of(sizes.blocks[1], dtype), sizes, dtype)
        counted = {call: _count(do) for call, do in made.items()}
        alone = {work: work.call(dtype) for work in _large(counted)}
        timed = interleaved({**made, **{work.title: do for work, do in alone.items()}}, sizes.rounds)
        rates = {work: work.operations / timed[work.title].median for work in alone}
        parts += [f"In {name}:", _calls_table(counted, timed, rates), _rates_table(rates)]
    return "\n\n".join(parts)


def _count(call: Call) -> Counter[Work]:
    call()  # what is kept is made by the first
    with Recorder() as recorder:
        call()
    return recorder.found


def _operations(found: Counter[Work], kind: str | None = None) -> int:
    return sum(work.operations * times for work, times in found.items() if kind in (None, work.kind))


def _large(counted: Mapping[str, Counter[Work]]) -> list[Work]:
    """Every shape that has its share in one of the calls, and the largest of each kind."""
    large: dict[Work, None] = {}
    for found in counted.values():
        total = _operations(found)
        for kind in ("product", "attention"):
            of_kind = [work for work in found if work.kind == kind]
            most = max(of_kind, key=lambda work: work.operations * found[work])
            chosen = [work for work in of_kind if work.operations * found[work] >= _SHARE * total]
            large.update(dict.fromkeys([most, *chosen]))
    return list(large)


def _calls_table(
    counted: Mapping[str, Counter[Work]], timed: Mapping[str, Times], rates: Mapping[Work, float]
) -> str:
    best = {kind: max(rates[w] for w in rates if w.kind == kind) for kind in ("product", "attention")}
    rows = []
    for call, found in counted.items():
        seconds = timed[call].median
        attainable = sum(_operations(found, kind) / rate for kind, rate in best.items())
        rows.append(
            [
                call,
                f"{_operations(found, 'product') / 1e9:,.1f}",
                f"{_operations(found, 'attention') / 1e9:,.1f}",
                f"{_operations(found) / seconds / 1e9:,.0f}",
                f"{seconds:.3f}",
                f"{attainable:.3f}",
                f"{attainable / seconds:.0%}",
            ]
        )
    headings = [
        "call", "products, Gop", "attention, Gop", "Gop/s", "seconds", "attainable seconds",
        "of what is attainable",
    ]  # fmt: skip
    return table(headings, rows)


def _rates_table(rates: Mapping[Work, float]) -> str:
    fastest = sorted(rates.items(), key=lambda item: -item[1])
    return table(["alone", "Gop/s"], [[work.title, f"{rate / 1e9:,.0f}"] for work, rate in fastest])
