"""The nouns that everything else is written in.

Tensors carry their shape as a suffix, one capital per dimension:

    O  outputs of a layer (rows of its weight)      T  tokens
    I  inputs of a layer (columns of its weight)    N  windows of calibration text
    L  tokens in a window                           D  width of the hidden state
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import InputError, NumericalError, StatisticError
from .grid import Grid
from .samples import Numbers
from .statistics.registry import merged, of_inputs, whole
from .waits import demand


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand.

    `unstructured`: anywhere. `N:M`: **N kept of M** consecutive inputs of an output row (1:4 keeps one
    of four). `RxC`: rectangles of R outputs by C inputs are kept or pruned whole.

    >>> Pattern.parse("1:4").sparsity
    0.75
    """

    kind: Literal["unstructured", "nm", "block"] = "unstructured"
    first: int = 1
    second: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern of a name such as `unstructured`, `2:4` or `16x1`. Raises InputError for anything else."""
        text = text.strip().lower()
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d+)([:x])(\d+)", text):
            first, second = int(match[1]), int(match[3])
            if match[2] == ":" and 0 < first < second:
                return cls("nm", first, second)
            if match[2] == "x" and first > 0 and second > 0:
                return cls("block", first, second)
        raise InputError(
            f"pattern '{text}' is none of: unstructured, N:M (N kept of M consecutive weights, N below M,"
            " such as 2:4), RxC (blocks of R rows by C columns, such as 16x1)."
        )

    def __str__(self) -> str:
        return {
            "unstructured": "unstructured",
            "nm": f"{self.first}:{self.second}",
            "block": f"{self.first}x{self.second}",
        }[self.kind]

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that an N:M pattern fixes, 1 - N/M; None of the others, which take any."""
        return 1 - self.first / self.second if self.kind == "nm" else None

    @property
    def columns(self) -> int:
        """How many consecutive inputs belong together: M of an N:M pattern, C of an RxC one, else 1."""
        return 1 if self.kind == "unstructured" else self.second

    def units(self, shape: Sequence[int]) -> int:
        """How many things of a weight of `shape` (O, I) are kept or pruned one by one: weights, or blocks of them."""
        size = shape[0] * shape[1]
        return size // (self.first * self.second) if self.kind == "block" else size

    def check(self, shape: Sequence[int], name: str, channels: int | None = None) -> None:
        """Raises InputError, naming the layer, if a weight of `shape` (O, I) cannot take this pattern; `channels` of
        a row stand side by side where that is not all of it (a convolution's kernel)."""
        rows, columns = shape
        if (channels or columns) % self.columns:
            inputs = (
                f"its rows hold {columns} weights" if channels in (None, columns) else f"it has {channels} channels"
            )
            raise InputError(
                f"pattern {self} does not divide layer '{name}': {inputs}, not a"
                f" multiple of {self.columns}. Skip it with --skip '{name}' or choose another pattern."
            )
        if self.kind == "block" and rows % self.first:
            raise InputError(
                f"pattern {self} does not divide layer '{name}': it has {rows} rows, not a multiple of"
                f" {self.first}. Skip it with --skip '{name}' or choose another pattern."
            )


@dataclass(frozen=True)
class Stats:
    """What is known of a layer's inputs, and of the gradients of its weight: `statistics/` says how it is made.

    Statistics of several batches merge with `+`. Layers fed by the same tensor share one `Stats`. Reading a statistic
    that the step's `needs` do not name raises StatisticError.

    tokens:    how many there were
    values:    {statistic: its value}, read as `stats["name"]`; of those that come with Prunella by properties too
    sample_TI: a few of the tokens themselves, to measure errors on
    """

    tokens: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict)
    sample_TI: Tensor | None = None
    # Results that several layers with this input share (a Cholesky factor, say), made once by `once`.
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, x_TI: Tensor, needs: Collection[str], sample: int = 0, dense_TI: Tensor | None = None) -> Stats:
        """The statistics of one batch of tokens, keeping `sample` of them, evenly spread; `dense_TI` is what the
        dense model has in place of x_TI, if that is something else."""
        tokens = len(x_TI)
        kept_TI = x_TI[:: max(1, tokens // sample)][:sample].clone() if sample else None
        return cls(tokens, of_inputs(needs, x_TI, dense_TI), kept_TI)

    def __add__(self, other: Stats) -> Stats:
        samples = [s for s in (self.sample_TI, other.sample_TI) if s is not None]
        kept_TI = torch.cat(samples) if samples else None
        return Stats(self.tokens + other.tokens, merged(self.values, other.values), kept_TI)

    def only(self, needs: Collection[str]) -> Stats:
        """What a step that declared `needs` may read; the cache of shared results stays shared."""
        may = {statistic.name for statistic in whole(needs)}
        return replace(self, values={name: value for name, value in self.values.items() if name in may})

    def __getitem__(self, name: str) -> Tensor:
        """The value of a statistic, merged over all batches: of `norm`, say, the sum of x^2."""
        if name not in self.values:
            raise StatisticError(f"this statistic was not collected: declare '{name}' in the step's needs.")
        return self.values[name]

    @property
    def mean_I(self) -> Tensor:
        """E[x], from `moments`."""
        return self["moments"] / self.tokens

    @property
    def variance_I(self) -> Tensor:
        """Population variance of x over all tokens, from `moments`."""
        mean_I = self.mean_I
        return (self["norm"] / self.tokens - mean_I.square()).clamp_min_(0)

    @property
    def norm_I(self) -> Tensor:
        """Root mean square of x over tokens, sqrt(E[x^2]), from `norm`."""
        return (self["norm"] / self.tokens).sqrt()

    @property
    def hessian_II(self) -> Tensor:
        """E[x x^T], from `gram`: half the Hessian of the layer's mean squared output error."""
        return self["gram"] / self.tokens

    @property
    def mean_drift_II(self) -> Tensor:
        """E[(x' - x) x^T], from `drift`."""
        return self["drift"] / self.tokens

    @property
    def hessian_diagonal_I(self) -> Tensor:
        """E[x^2], the diagonal of the Hessian, from `gram`."""
        return self["gram"].diagonal() / self.tokens

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make()` returns, which is called the first time that any layer with this input asks for `key`."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


@dataclass(frozen=True)
class Layer:
    """One weight matrix and all that a step needs to prune it.

    name:       where it lives, such as `model.layers.0.self_attn.q_proj`; an expert adds its number
    weight_OI:  the weight as it is now, in the model's dtype
    dense_OI:   the weight before pruning, whose outputs the steps try to keep
    stats:      statistics of its inputs or gradients, those that the step's `needs` name
    sparsity:   share of weights to prune, 0 <= sparsity < 1
    pattern:    where zeros may stand
    mask_OI:    True where a weight is kept; None while no step has chosen
    bias_O:     its bias, if it has one
    grid:       what its values are multiples of, if a step quantized it
    notes:      what the report should say about this layer
    """

    name: str
    weight_OI: Tensor
    dense_OI: Tensor
    stats: Stats
    sparsity: float
    pattern: Pattern = Pattern()
    mask_OI: Tensor | None = None
    bias_O: Tensor | None = None
    grid: Grid | None = None
    notes: tuple[str, ...] = ()

    def pruned(self, weight_OI: Tensor, mask_OI: Tensor, *notes: str, grid: Grid | None = None) -> Layer:
        """This layer with a new weight under a new mask: the weight is cast to the layer's dtype and
        zeroed where the mask is False; `grid` says what its values are multiples of, if they are.
        Raises NumericalError if a kept weight is not finite (of a device, when the block is done)."""
        weight_OI = weight_OI.to(self.weight_OI.dtype).masked_fill(~mask_OI, 0)
        demand(
            torch.isfinite(weight_OI).all(),
            lambda: NumericalError(
                f"layer '{self.name}' got NaN or infinite weights while it was pruned: raise the damping,"
                " use more calibration text, or run in float32 (--dtype float32)."
            ),
        )
        return replace(self, weight_OI=weight_OI, mask_OI=mask_OI, grid=grid, notes=self.notes + notes)

    def lost(self) -> Tensor | None:
        """Squared error of the outputs, ||X (W - W_dense)^T||^2, and what it is an error of, ||X W_dense^T||^2, on the
        sample of calibration tokens: a tensor (2,). None where there is no sample."""
        if self.stats.sample_TI is None or not self.stats.tokens:
            return None
        x_TI, dense_OI = self.stats.sample_TI.float(), self.dense_OI.float()
        whole = (x_TI @ dense_OI.T).square().sum()
        return torch.stack(((x_TI @ (self.weight_OI.float() - dense_OI).T).square().sum(), whole))

    def error(self) -> float | None:
        """The relative one, a quotient; None where there is no sample, or where the dense output is zero."""
        found = self.lost()
        return None if found is None else quotient(found)


def quotient(pair: Tensor) -> float | None:
    """The first of two numbers over the second; None where that is zero."""
    one, other = pair.tolist()
    return one / other if other else None


@dataclass(frozen=True)
class Block:
    """One block of the model, with the layers in it that are to be pruned.

    index:      its number in the model, from 0
    name:       its name in the network, such as `model.layers.0`
    layers:     the layers to prune, in the order in which the block holds them
    run:        run(weights, n) runs the block on window n with the given weights {layer name: weight_OI, or name in
                `others`: tensor} in place of its own, and returns its output (1, L, D); differentiable in those
                weights. run(weights, n, at=path) stops at a module of the block and returns that one's output.
                For n a tuple of several numbers, as `pieces` gives them, their output (B, L, D) together. None in the
                orders `layer` and `back`
    windows:    how many calibration windows `run` takes
    targets:    targets(n) is the dense block's output on window n; where the dense model runs beside the pruned
                one (`drift`), its own output there. None unless a step needs `targets`
    dense:      dense(n) is what the dense model puts out here on window n, its own inputs given. None unless a step
                needs `dense`
    others:     the block's other parameters by name (norms, biases, …), which a step on blocks may replace
    buffers:    where the model is pruned already: what it has in place of the dense block's statistics of norms, for
                `run`
    fixed:      those of `others` that it should leave as they are: routers, and layers that stay dense
    pieces:     pieces(size) is the numbers of all windows, tuples of so many of one shape, or single ones
    """

    index: int
    name: str
    layers: tuple[Layer, ...]
    run: Callable[..., Tensor] | None = None
    windows: int = 0
    targets: Callable[[Numbers], Tensor] | None = None
    dense: Callable[[Numbers], Tensor] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    pieces: Callable[[int], Sequence[Numbers]] | None = None
