"""A model whose blocks come on demand.

Weights stay in their safetensors files until a block is asked for: the network is built with its
parameters on the meta device (its buffers are real: rotary frequencies are not in the checkpoint) and
`Model.block(i)` fills one block for as long as it is needed. A model object that is already in memory is
wrapped the same way and simply has every block at hand.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..compat import (
    attention_of,
    can_set_experts,
    computing_on,
    conversions,
    experts_of,
    fill,
    make_missing,
    quiet_transformers,
    rename,
    revert,
)
from ..errors import ModelError, ReadError
from ..fast import use_fast_attention
from ..learn import learn
from ..machine import free_memory
from ..phases import phase
from ..progress import Track, no_track
from ..samples import Batch, on
from .checkpoint import Checkpoint, Source
from .cut import WHOLE, Interface, find_stacks, inside, whole_run
from .walk import LoadedBlock, ReadAhead

if TYPE_CHECKING:
    from .task import Task


class Model:
    """A network whose weights are loaded block by block; `load_model` and `wrap_model` make one of a causal language
    model.

    network:     a model of transformers, or any module; parameters that are not loaded are on the meta device
    tokenizer:   its tokenizer, or None
    task:        what the network is for
    stacks:      names of its blocks, in order, a tuple a stack: most networks have one
    blocks:      all of them
    spans:       the numbers of each stack's blocks
    undivided:   the network is no chain of blocks, but itself the only one
    checkpoint:  where its weights come from, or None if the model is in memory
    scratch:     folder for hidden states that do not fit into memory; None: one in the cache
    """

    scratch: Path | None = None

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        checkpoint: Checkpoint | None,
        device: torch.device,
        name: str,
        task: Task,
    ):
        self.task = task
        self.tokenizer_given = False  # it is not the one in the checkpoint's directory
        self.network = network
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.device = device
        self.name = name
        self._training = {module: module.training for module in network.modules()}
        self._attention = attention_of(getattr(network, "config", None))
        self._experts: str | None = None
        self.interface: Interface | None = None  # how its blocks are called, once that was examined
        self._plan: dict[str, tuple[str, bool]] | None = None
        try:
            self._find()
        except BaseException:
            self.give_back()
            raise

    def _find(self) -> None:
        """Find the blocks, and let the network compute in the way that can be watched."""
        network = self.network.eval()
        self.stacks = find_stacks(network, self.task)
        self.blocks = [name for stack in self.stacks for name in stack]
        ends = list(itertools.accumulate(map(len, self.stacks)))
        self.spans = [range(end - len(stack), end) for end, stack in zip(ends, self.stacks, strict=True)]
        self.undivided = self.stacks == WHOLE
        if can_set_experts(network):
            self._experts = experts_of(network.config)
            network.set_experts_implementation("eager")  # one product per expert, which the stream can watch
        learn(network, self.blocks, *whole_run(network, self.task))
        if self.device.type == "cpu" and self.task.language:
            use_fast_attention(network)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        own = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        dtype: torch.dtype = getattr(self.network, "dtype", None) or next(own, torch.get_default_dtype())
        return dtype

    @property
    def tied(self) -> Mapping[str, str]:
        """Names of parameters that are another one by another name, {one: the other}, as transformers knows them."""
        tied: Mapping[str, str] = getattr(self.network, "all_tied_weights_keys", {})
        return tied

    def run(self, batch: Batch, **options: Any) -> Any:
        """What the network makes of a batch, wherever that is. `options` go to its forward pass."""
        streamed = self.checkpoint is not None
        with computing_on(self.network, self.device) if streamed else contextlib.nullcontext():
            return self.task.run(self.network, on(batch, self.device), **options)

    @property
    def parameters(self) -> int:
        """How many parameters the network has. Tied ones count once, whether they are loaded or not."""
        named = dict(self.network.named_parameters())
        return sum(p.numel() for name, p in named.items() if self.tied.get(name) not in named)

    def fits(self) -> bool:
        """Does the whole of it fit comfortably into memory? What is there already does."""
        return self.checkpoint is None or self.parameters * self.dtype.itemsize <= free_memory(self.device) // 3

    def give_back(self) -> None:
        """Let a wrapped model compute as it did before it was wrapped."""
        if attention_of(getattr(self.network, "config", None)) != self._attention:
            self.network.set_attn_implementation(self._attention)
        if self._experts is not None:
            self.network.set_experts_implementation(self._experts)
        for module, training in self._training.items():  # each by itself: parts may have been in the other mode
            module.training = training

    def module(self, name: str) -> nn.Module:
        module: nn.Module = self.network.get_submodule(name)
        return module

    def block_of(self, parameter: str) -> str | None:
        """The block that a parameter belongs to."""
        return next((block for block in self.blocks if inside(parameter, block)), None)

    def stack_of(self, index: int) -> int:
        """The number of the stack that block `index` belongs to."""
        return next(number for number, span in enumerate(self.spans) if index in span)

    # --- loading

    def plan(self) -> dict[str, tuple[str, bool]]:
        """{tensor in the files: (parameter of the network, does it need converting)}, as transformers maps them.

        Names in the files may differ from names in the network, and a parameter may be put together from
        several tensors (the experts of a mixture); a converted group is listed under its first parameter.
        """
        if self._plan is None:
            assert self.checkpoint is not None
            renamings, converters = conversions(self.network)
            prefix, parameters = getattr(self.network, "base_model_prefix", None), self.network.state_dict()
            self._plan = {}
            for key in self.checkpoint.where:
                name, pattern = rename(key, renamings, converters, prefix, parameters)
                if name not in parameters and key in parameters:
                    name, pattern = rename(key, [], [], prefix, parameters)
                self._plan[key] = (name, pattern is not None)
        return self._plan

    def parameter_of(self, key: str) -> str:
        """The parameter of the network that a tensor in the files becomes, or one of a name that is spelled as in the
        files."""
        if key in self.plan():
            return self.plan()[key][0]
        renamings, _ = conversions(self.network)
        prefix = getattr(self.network, "base_model_prefix", None)
        return rename(key, renamings, [], prefix, self.network.state_dict())[0]

    def _keys(self, wanted: Callable[[str], bool], checkpoint: Source) -> list[str]:
        """The tensors of a checkpoint that these parameters are made of."""
        stored = {name for name, _ in self.plan().values()}
        also = {  # what is stored under the name of a parameter that it is tied to, in another block maybe
            other
            for pair in self.tied.items()
            for one, other in (pair, pair[::-1])
            if wanted(one) and one not in stored
        }
        found = ((key, name) for key, (name, _) in self.plan().items() if wanted(name) or name in also)
        return [key for key, _ in found if key in checkpoint.where]

    @phase("load")
    def load(self, wanted: Callable[[str], bool], checkpoint: Source | None = None) -> None:
        """Fill the parameters whose names are `wanted`, from the model's own checkpoint or from another one
        with the same tensors. Raises ModelError for a tensor that is missing or has the wrong shape."""
        checkpoint = checkpoint or self.checkpoint
        if checkpoint is None:
            return
        try:
            with quiet_transformers(), checkpoint.open(self._keys(wanted, checkpoint)) as slices:
                info = fill(self.network, slices, self.dtype, self.device)
        except SafetensorError as error:
            raise ReadError(f"a tensor in '{checkpoint.directory}' cannot be read: {error}.") from None
        if info.mismatched_keys:
            name, shape, expected = sorted(info.mismatched_keys)[0][:3]
            raise ModelError(
                f"tensor '{name}' in '{checkpoint.directory}' has shape {tuple(shape)}, but config.json says"
                f" {tuple(expected)}."
            )
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            said = [line.strip() for line in str(reason).splitlines() if line.strip()]
            raise ModelError(f"tensor '{name}' in '{checkpoint.directory}' cannot be converted: {said[-1]}")
        for key in checkpoint.own:
            if wanted(name := self.parameter_of(key)):
                owner, _, last = name.rpartition(".")
                held = self.network.get_submodule(owner)._parameters
                weight = checkpoint.parameter(key, self.dtype).to(self.device)
                if last not in held or held[last].shape != weight.shape:
                    raise ModelError(f"'{key}' in '{checkpoint.directory}' is no parameter of '{self.name}'.")
                held[last] = nn.Parameter(weight, requires_grad=False)
        self._tie()
        for name, parameter in list(self.network.named_parameters()):
            if not wanted(name):
                continue
            if parameter.is_meta and not make_missing(self.network, name, self.dtype, self.device):
                raise ModelError(f"tensor '{name}' is missing from the checkpoint in '{checkpoint.directory}'.")
            parameter.requires_grad_(False)

    def release(self, wanted: Callable[[str], bool]) -> None:
        """Forget the parameters whose names are `wanted`; nothing happens to a model that lives in memory."""
        if self.checkpoint is None:
            return
        every = self.network.named_parameters(remove_duplicate=False)
        going = {id(parameter) for name, parameter in every if wanted(name)}  # under all names, where it is tied
        for module in self.network.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta and id(parameter) in going:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _tie(self) -> None:
        """Where two parameters are one, share what is loaded: a checkpoint has one of them, or both alike."""
        for pair in self.tied.items():
            loaded = [self.network.get_parameter(name) for name in pair]
            twice = loaded[0] is not loaded[1] and not loaded[0].is_meta and not loaded[1].is_meta
            if loaded[0].is_meta != loaded[1].is_meta or (twice and torch.equal(*loaded)):
                real, name = (loaded[1], pair[0]) if loaded[0].is_meta else (loaded[0], pair[1])
                owner, _, key = name.rpartition(".")
                self.network.get_submodule(owner)._parameters[key] = real

    @contextlib.contextmanager
    def block(self, index: int, checkpoint: Source | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights, which are loaded for as long as the context lasts: `with model.block(0) as
        block`. They are the model's own, or those in `checkpoint`."""
        with self._loaded(self._within(index), checkpoint):
            yield self.module(self.blocks[index])

    @contextlib.contextmanager
    def _loaded(self, wanted: Callable[[str], bool], checkpoint: Source | None) -> Iterator[None]:
        """These parameters have their weights for as long as the context lasts; those that had some before, in a walk
        around this one, have them back then."""
        owners = {path: module for path, module in self.network.named_modules() if self.checkpoint is not None}
        before = [
            (module, key, parameter)
            for path, module in owners.items()
            for key, parameter in module._parameters.items()
            if parameter is not None and not parameter.is_meta and wanted(".".join(filter(None, (path, key))))
        ]
        self.load(wanted, checkpoint)
        try:
            yield
        finally:
            self.release(wanted)
            for module, key, parameter in before:
                module._parameters[key] = parameter

    def walk(
        self, source: Source | None = None, *, back: bool = False, track: Track = no_track, what: str = ""
    ) -> Iterator[tuple[int, LoadedBlock]]:
        """All blocks, one after the other, each with its weights: its number and the block. This is the only loop over
        blocks.

        The weights are those of the source, whatever was done with a block before: `use` puts others in their place
        for a while, and only a writer (`LoadedBlock.keep`, or an `Output`) makes them last. While one block is computed
        a thread reads the next one.

        Args:
            source: a checkpoint with the same tensors as the model's own, in place of it.
            back: from the last block to the first.
            track: wraps the loop, `track(range, what, total)`, to show progress.
        """
        count = len(self.blocks)
        order = range(count - 1, -1, -1) if back else range(count)
        following = dict(itertools.pairwise(order))
        checkpoint = source or self.checkpoint
        with contextlib.ExitStack() as stack:
            ahead: Any = None if checkpoint is None else ReadAhead(checkpoint, self.device)
            if ahead is not None:
                stack.callback(ahead.close)
            for index in track(order, what, count):
                with self.block(index, ahead) as module:
                    if ahead is not None and index in following:
                        ahead.expect(self._keys(self._within(following[index]), ahead))
                    yield index, self.at(index, module)

    def at(self, index: int, module: nn.Module | None = None) -> LoadedBlock:
        """Block `index`, whose weights are loaded."""
        name = self.blocks[index]
        within = self._within(index)
        return LoadedBlock(index, name, module or self.module(name), lambda source: self.load(within, source))

    def _within(self, index: int) -> Callable[[str], bool]:
        """Does a parameter belong to block `index`?"""
        return lambda name: inside(name, self.blocks[index])

    @contextlib.contextmanager
    def outside(self, head: bool = True, checkpoint: Source | None = None) -> Iterator[None]:
        """Loads everything but the blocks for as long as the context lasts: embeddings and norms, and with `head` the
        output head as well."""
        base = getattr(self.network, "base_model_prefix", "") + "."
        single = not self.task.language or self.network.base_model is self.network

        def wanted(name: str) -> bool:
            return self.block_of(name) is None and (head or single or name.startswith(base))

        with self._loaded(wanted, checkpoint):
            yield

    @contextlib.contextmanager
    def whole(self, checkpoint: Source | None = None) -> Iterator[Any]:
        """The network with all its weights loaded, for as long as the context lasts: to generate text, say."""
        with self._loaded(lambda name: True, checkpoint):
            yield self.network

    def stored(self, block: str, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of a loaded block, {parameter: tensor}, as the tensors that the checkpoint stores them in."""
        plan = self.plan()
        plain = {name: key for key, (name, convert) in plan.items() if not convert}
        tensors = {plain[name]: tensor for name, tensor in changed.items() if name in plain}
        converted = {name: tensor for name, tensor in changed.items() if name not in plain}
        if converted:
            expected = {key for key, (name, convert) in plan.items() if convert and inside(name, block)}
            # A group is converted back as a whole: parameters that no step changed may belong to it.
            whole = {n: p.data for n, p in self.network.named_parameters() if inside(n, block) and n not in plain}
            back = revert(self.network, whole | converted)
            for key, tensor in back.items():
                full = [k for k in expected if k == key or k.endswith("." + key) or key.endswith("." + k)]
                if len(full) != 1:
                    raise ModelError(f"'{key}' cannot be written back under the names of the checkpoint.")
                tensors[full[0]] = tensor
        return tensors
