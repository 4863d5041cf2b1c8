"""The recipe: everything a run is, and the only configuration there is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from .allocate import Allocation, allocations, find_allocation, make_allocation
from .errors import InputError, unknown
from .norm_ways import Way, make_ways
from .registry import Method, Step, find, lookup, make, steps
from .store import MakeStore, find_store, make_store
from .tasks import AUTO, Task, find_task, make_task, task_of, tasks
from .train.parts import Group, groups, make_group
from .train.retrain import retrain
from .types import Pattern

_COUNTS = {"calibration": "samples", "evaluate": "windows"}  # what the number of samples is called
_SHIPPED = files(__package__) / "recipes"
_RECONSTRUCT: dict[str, Any] = find("reconstruct").defaults


def _option(key: str) -> Any:
    """A key of `heal` that is an option of `retrain`: what its signature says of it."""
    hint = get_type_hints(retrain, include_extras=True)[key]
    return FieldInfo.merge_field_infos(*getattr(hint, "__metadata__", (Field(),)), default=_RETRAIN[key])


_RETRAIN: dict[str, Any] = retrain.__kwdefaults__ or {}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Part):
    """The text that statistics are made from.

    source:     a text, see `prunella.texts`, or what else the task reads; `auto`: the task's own
    samples:    how many windows
    length:     tokens in a window; None: 2048, or the model's context if that is shorter
    min_tokens: a layer that fewer tokens reach (an expert, say) is pruned by magnitude
    augment:    the samples once more, changed at random as the task knows how (pictures cut and mirrored): of few
                samples twice as many
    """

    source: str = AUTO
    samples: int = Field(default=32, ge=1)
    length: int | None = Field(default=None, ge=2)
    min_tokens: int = Field(default=32, ge=1)
    augment: bool = False


class Evaluation(_Part):
    """The text on which dense and pruned perplexity are compared; `source: null` for none.

    If it is the calibration text, windows after the calibration's are taken.

    source:  a text, by a name as the calibration's
    windows: how many
    length:  tokens in a window; None: 2048, or the model's context if that is shorter
    """

    source: str | None = AUTO
    windows: int = Field(default=8, ge=1)
    length: int | None = Field(default=None, ge=2)


def _methods(kind: str, value: Any) -> list[dict[str, Any]]:
    """A list of names, or of {name: {option: value}}, as the latter."""
    items = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Mapping) for item in items):
        raise ValueError(f"{kind}: {value!r} should be a list of names, or of {{name: {{option: value}}}}")
    return [{item: {}} if isinstance(item, str) else {k: v or {} for k, v in item.items()} for item in items]


class Healing(_Part):
    """Retraining after pruning, the mask held.

    train:       what trains: a list of names, or of {name: {option: value}}; empty: a pruned model is not healed
    way:         `retrain`: the whole model on text; `reconstruct`: block by block, to the dense outputs, on the windows
                 of the calibration (of what follows only `rate`, `part`, `aim` and `epochs` are for it)
    text:        sources to train on, one after the other; empty: the calibration's
    tokens:      of text: to train on in all, as far as they make whole steps; text that is shorter is taken again
    length:      of text: tokens in a window; windows are packed, not padded
    samples:     of other tasks: how many to take of the sources; None: all that there are
    batch:       windows, or other samples, in a step, over all processes; None: as the task says, 8 windows or 32
                 samples
    micro:       windows, or samples, that one process runs at a time; None: as the task says, 4 windows or 32 samples
    rate:        learning rate of everything that trains; None: each method's own, and 1e-3 to reconstruct
    warmup:      share of the steps over which the rate rises; then it falls linearly to 0
    clip:        largest norm of the gradient
    betas:       how slowly AdamW's two moments forget
    distill:     share of the loss that is the divergence from the dense model's predictions
    temperature: by which both models' logits are divided in that divergence
    adapt:       tokens of further text (of other tasks: passes over the samples) on which the dense model itself is
                 trained before all else, so that it fits them: it teaches better then, and with `prune --heal` it is
                 what is pruned; 0: it is left as it is
    teacher:     the dense model stays in `memory`, or is streamed once over the text before training (`stream`)
    dense:       the dense model; None: the one that was pruned, by the report's word
    held_out:    windows of the text, or samples, that find the best checkpoint; 0: the last one is taken; None: as the
                 task says, 8 windows, or a tenth of the samples and 256 at most
    evaluations: how often in a run these windows are looked at
    patience:    stop after so many evaluations that were no better
    checkpointing: recompute activations and trained weights in the backward pass: less memory, more time
    batch_norm:  running statistics of batch norms `follow` what these see in training, and are saved; or are `fixed`,
                 and used in training too; `auto`: they follow where whole layers train (`all`)
    augment:     samples to train on are changed at random, as the task knows how (pictures cut and mirrored)
    part:        reconstruct whole blocks, or their attention and MLP one after the other
    aim:         reconstruct whole blocks to what the dense `model` puts out there, or the dense `block` from the pruned
                 model's inputs
    epochs:      passes over the samples: of `reconstruct`, over the calibration's; of `retrain`, where it is not text
                 that is trained on, in each round
    rounds:      prune and heal in so many rounds, each a little sparser: iterative magnitude pruning
    """

    train: tuple[dict[str, dict[str, Any]], ...] = ()
    way: Literal["retrain", "reconstruct"] = "retrain"
    text: tuple[str, ...] = ()
    tokens: int = Field(default=250_000, ge=1)
    length: int = Field(default=512, ge=2)
    samples: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    micro: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0, lt=1)
    warmup: float = _option("warmup")
    clip: float = _option("clip")
    betas: tuple[float, float] = _option("betas")
    distill: float = _option("distill")
    temperature: float = _option("temperature")
    adapt: int = Field(default=0, ge=0)
    teacher: Literal["memory", "stream"] = "memory"
    dense: str | None = None
    held_out: int | None = Field(default=None, ge=0)
    evaluations: int = _option("evaluations")
    patience: int = _option("patience")
    checkpointing: bool = _option("checkpointing")
    batch_norm: Literal["auto", "follow", "fixed"] = _option("batch_norm")
    augment: bool = _option("augment")
    part: Literal["block", "sub-block"] = _RECONSTRUCT["part"]
    aim: Literal["model", "block"] = _RECONSTRUCT["aim"]
    epochs: int = Field(default=_RECONSTRUCT["epochs"], ge=1)
    rounds: int = Field(default=1, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _train(cls, value: Any) -> Any:
        return _methods("train", value)

    @field_validator("text", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Healing:
        retrains = ("text", "distill", "checkpointing", "samples", "batch_norm", "augment")
        ignored = {"reconstruct": retrains, "retrain": ("part", "aim")}
        for key in ignored[self.way]:
            if getattr(self, key) != Healing.model_fields[key].get_default():
                other = "retrain" if self.way == "reconstruct" else "reconstruct"
                raise ValueError(
                    f"heal.{key} is of way: {other}, not of {self.way}"
                    + (", which trains on the calibration windows" if key == "text" else "")
                )
        return self

    @property
    def step(self) -> int:
        """How many samples a step takes."""
        return self.batch or int(_RETRAIN["batch"])

    @property
    def retraining(self) -> dict[str, Any]:
        """The options of `retrain`."""
        return {key: value for key in _RETRAIN if (value := getattr(self, key)) is not None}

    def make_groups(self) -> list[Group]:
        """What trains, ready to use. Raises InputError."""
        own = {"rate": _RECONSTRUCT["rate"]} if self.way == "reconstruct" else {}
        rate = {} if self.rate is None else {"rate": self.rate}
        return [make_group(name, {**own, **options, **rate}) for item in self.train for name, options in item.items()]


def _method(kind: str, value: Any) -> dict[str, dict[str, Any]]:
    """A name, or {name: {option: value}}, as the latter."""
    value = {value: {}} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"{kind}: {value!r} should be one name, or {{name: {{option: value}}}}")
    return {name: dict(options or {}) for name, options in value.items()}


class Recipe(_Part):
    """Everything a run is, and the only configuration there is. `Recipe.of` makes one from plain data.

    model:    hub id, directory, .gguf file or built-in name
    task:     what the network is for: a name, or `{name: {option: value}}`; `auto`: as the model's files say
    calibration: the text that statistics are made from: `source`, `samples` (windows), `length` (tokens in each),
              `min_tokens` (a layer that fewer tokens reach is pruned by magnitude), `augment` (the samples twice,
              once changed at random)
    pattern:  where zeros may stand: `unstructured`, `N:M` (N kept of M) or `RxC` (blocks), see `Pattern`
    sparsity: `{pattern of layer names: share of weights to prune}`, the last match wins; a plain number is
              `{"*": number}`. `down_proj` matches every layer whose name ends so. An N:M pattern fixes it.
    skip:     patterns of layer names that stay dense
    keep_zeros: zeros that the model comes with stay zero and count towards the sparsity: for a second pass over a
              pruned model. Without it a second pass chooses anew, and may fill what the first one pruned
    allocate: how sparsity is spread over the other layers: a name, or `{name: {option: value}}`
    lenses:   of your own, `path/to/file.py:name`: parameters that they fit are read as matrices through them
    steps:    a list of names, or of `{name: {option: value}}`
    order:    `layer`: a layer is pruned when its inputs arrive from the pruned layers before it; `block`: after a
              pass through the dense block has shown the inputs of all its layers; `back`: from the last block to the
              first, with gradients; `auto`: `back` where a step reads gradients, `layer` where every step looks at
              single layers, one of them at their inputs, and the activations are less than 8 GiB
    batch_norm: what becomes of the statistics of batch norms, in networks that have any: `keep`, or how they are
              estimated anew on the calibration samples: `reset`, `momentum`, `correct`; `auto`: what brings
              the network nearest to the dense one on those samples that are not estimated on
    evaluate: the text on which dense and pruned perplexity are compared: `source` (null: none), `windows`, `length`
    format:   the store that the weights are saved in: `dense`, zeros and all, or `packed`, without them
    bits:     packed weights that no step has quantized are rounded to 8 or 4 bits; null: they keep their dtype
    group:    inputs that share a scale, a multiple of 128; 0: whole rows
    round_head: a packed model's embedding and output head are rounded to 8 bits
    dtype:    compute and save in this dtype; `auto` keeps the checkpoint's
    device:   where blocks are computed: cpu, cuda, cuda:1 …; `auto` is cuda where there is one
    seed:     of everything that is drawn at random
    bos:      every window of calibration, healing and evaluation begins with what the tokenizer puts before a text, if
              it does (a BOS); false: none does
    heal:     retraining of what was pruned: `train` (what trains), `text`, `tokens` and more
    """

    model: str = "smollm2-135m"
    task: dict[str, dict[str, Any]] = {AUTO: {}}
    calibration: Calibration = Calibration()
    bos: bool = True
    pattern: str = "unstructured"
    sparsity: dict[str, float] = {}
    skip: tuple[str, ...] = ()
    keep_zeros: bool = False
    allocate: dict[str, dict[str, Any]] = {"uniform": {}}
    lenses: tuple[str, ...] = ()
    steps: tuple[dict[str, dict[str, Any]], ...] = ({"sparsegpt": {}},)
    order: Literal["auto", "layer", "block", "back"] = "auto"
    batch_norm: dict[str, dict[str, Any]] = {"auto": {}}
    evaluate: Evaluation = Evaluation()
    format: str = "dense"
    bits: Literal[8, 4] | None = None
    group: int = 128
    round_head: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    heal: Healing = Healing()

    @model_validator(mode="before")
    @classmethod
    def _of_task(cls, values: Any) -> Any:
        """What the task says of samples stands where the recipe says it: where they come from if nobody says so, and
        those of its options that are keys of the recipe."""
        if not isinstance(values, Mapping):
            return values
        task = _method("task", values.get("task", AUTO))
        ((name, options),) = task.items()
        out = {**values, "task": task, **{key: options.pop(key) for key in ("bos",) if key in options}}
        length = options.pop("length", None)
        for key in ("calibration", "evaluate"):
            part = values.get(key, {})
            if isinstance(part, Mapping):
                out[key] = dict(part)
                kind: Any = None if name == AUTO else find_task(name).function
                if kind is not None and part.get("source", AUTO) == AUTO:
                    follows = key == "evaluate" and kind.follows and isinstance(out["calibration"], Mapping)
                    out[key]["source"] = out["calibration"]["source"] if follows else kind.source
                if kind is not None:
                    out[key].setdefault(_COUNTS[key], getattr(kind.counts, key))
                if out[key].get("length") is None and length is not None:
                    out[key]["length"] = length
        heal = values.get("heal", {})
        if name != AUTO and isinstance(heal, Mapping):
            own: Mapping[str, Any] = find_task(name).function.training  # type: ignore[attr-defined]
            out["heal"] = {**heal, **{key: value for key, value in own.items() if heal.get(key) is None}}
        return out

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity(cls, value: Any) -> Any:
        for name, share in value.items() if isinstance(value, Mapping) else [("*", value)]:
            if isinstance(share, str) and re.fullmatch(r"\s*\d+(\.\d*)?\s*%\s*", share):
                meant = float(share.strip().rstrip("% ")) / 100
                raise ValueError(f"sparsity {share} for layers '{name}' is written as a share: did you mean {meant:g}?")
        return {"*": value} if isinstance(value, int | float) else value or {}

    @field_validator("sparsity")
    @classmethod
    def _range(cls, value: dict[str, float]) -> dict[str, float]:
        for name, share in value.items():
            if not 0 <= share < 1:
                meant = f"; did you mean {share / 100:g}?" if 1 < share < 100 else ""
                raise ValueError(
                    f"sparsity {share:g} for layers '{name}' is out of range: 0 (dense) up to, not including, 1{meant}"
                )
        return value

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        items = _methods("steps", value)
        if not items:
            raise ValueError("steps: at least one step is needed; see prunella methods")
        return items

    @field_validator("allocate", mode="before")
    @classmethod
    def _allocate(cls, value: Any) -> Any:
        return _method("allocate", value)

    @field_validator("batch_norm", mode="before")
    @classmethod
    def _batch_norm(cls, value: Any) -> Any:
        return _method("batch_norm", value)

    @field_validator("skip", "lenses", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for step in self.steps:
            if len(step) != 1:
                raise ValueError(f"steps: {step} should be one step, {{name: {{option: value}}}}")
        self._check_amounts()
        takes = find_store(self.format).options
        if self.bits is not None and "bits" not in takes:
            raise ValueError(f"bits: {self.bits} is of packed weights: add format: packed (--format packed)")
        if self.round_head and "round_head" not in takes:
            raise ValueError("round_head is of packed models: add format: packed (--format packed)")
        if self.group < 0 or self.group % 128:
            raise ValueError(f"group {self.group} is no multiple of 128 inputs, nor 0 for whole rows")
        fixed = Pattern.parse(self.pattern).sparsity
        if fixed is not None:
            for name, share in self.sparsity.items():
                if share and abs(share - fixed) > 1e-6:
                    raise ValueError(
                        f"pattern {self.pattern} prunes {fixed:g} of every layer, but the sparsity of '{name}' is"
                        f" {share:g}: leave it out, or use 0 for layers that stay dense"
                    )
            for name in self.allocate:
                if find_allocation(name).spreads:
                    raise ValueError(
                        f"pattern {self.pattern} prunes {fixed:g} of every layer, so allocation '{name}' has nothing"
                        " to spread: leave it out, or use another pattern"
                    )
        return self

    def _check_amounts(self) -> None:
        """Text is trained on by tokens, other samples in passes."""
        name, heal = next(iter(self.task)), self.heal
        if name == AUTO:
            return
        text: bool = find_task(name).function.language  # type: ignore[attr-defined]
        keys = ("samples", "augment", *(("epochs",) if heal.way == "retrain" else ())) if text else ("tokens", "length")
        for key in keys:
            if getattr(heal, key) == Healing.model_fields[key].get_default():
                continue
            if key == "epochs":
                raise ValueError("heal.epochs is of way: reconstruct, not of retrain")
            instead = "text is counted in heal.tokens" if text else f"task '{name}' trains in passes, heal.epochs"
            raise ValueError(f"heal.{key} is of {'other tasks than text' if text else 'text'}: {instead}")

    @property
    def shape(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def default_sparsity(self) -> float:
        """What layers get that no more special pattern matches."""
        fixed = self.shape.sparsity
        return self.sparsity.get("*", fixed if fixed is not None else 0.5)

    def make_task(self, length: int | None = None) -> Task:
        """What the network is for; with samples of this length, where the task knows lengths. Raises InputError, too
        where the recipe leaves it open and is not `resolved`."""
        if AUTO in self.task:
            raise InputError("the recipe does not say what the network is for: add a task, such as text.")
        said = ({} if length is None else {"length": length}) | ({} if self.bos else {"bos": False})
        return next(make_task(name, {**options, **said}) for name, options in self.task.items())

    def resolved(self, model: Any) -> Recipe:
        """For this model, by its name or in memory: with its task and that task's sources, where the recipe leaves them
        open. Raises InputError."""
        if AUTO not in self.task:
            return self
        ((_, options),) = self.task.items()
        return self.of({**self.plain(), "task": {name: {**found, **options} for name, found in task_of(model).items()}})

    @property
    def spreads(self) -> bool:
        """Do layers get sparsities of their own, found by looking at the model?"""
        return any(find_allocation(name).spreads for name in self.allocate)

    def make_allocation(self) -> Allocation:
        return next(make_allocation(name, options) for name, options in self.allocate.items())

    def make_steps(self) -> list[Step]:
        return [make(name, options) for step in self.steps for name, options in step.items()]

    def make_ways(self) -> dict[str, Way]:
        """The ways to estimate batch norms that are tried; none to keep them."""
        return {
            key: make for name, options in self.batch_norm.items() for key, make in make_ways(name, options).items()
        }

    def make_store(self) -> MakeStore:
        return make_store(self.format, {"bits": self.bits, "group": self.group, "round_head": self.round_head})

    @property
    def rounding(self) -> tuple[int, int] | None:
        """Bits and group of the grid for layers that no step quantizes: those of `bits`, or of the step that quantizes
        the other layers of a packed model (it leaves experts out that see too few tokens)."""
        if self.bits is not None:
            return self.bits, self.group
        options = [step.options for step in self.make_steps() if {"bits", "group"} <= step.options.keys()]
        return (
            (options[-1]["bits"], options[-1]["group"])
            if options and "bits" in find_store(self.format).options
            else None
        )

    # --- from files, flags and dictionaries

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data. Raises InputError: unknown keys come with the nearest known one."""
        try:
            recipe = cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(_explain(cls, error)) from None
        recipe.make_ways()
        made = recipe.make_steps()
        if not any(step.prunes for step in made):
            names = ", ".join(step.name for step in made)
            raise InputError(f"steps: {names} chooses no weights to prune: add a step that does, such as wanda.")
        recipe.make_allocation()
        if AUTO not in recipe.task:
            recipe.make_task(recipe.calibration.length or recipe.evaluate.length)
        recipe.heal.make_groups()
        return recipe

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The plain data of a YAML recipe: a file, or one of those that come with Prunella, by name.

        Raises InputError if it is missing or not a mapping.
        """
        named = {file.name.removesuffix(".yaml"): file for file in _SHIPPED.iterdir() if file.name.endswith(".yaml")}
        source: Traversable = named.get(str(path), Path(path))
        if str(path) not in named and not Path(path).suffix and not Path(path).exists():
            raise InputError(unknown("recipe", str(path), named) + " Or give a YAML file.")
        try:
            values = yaml.safe_load(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"recipe '{path}' cannot be read: {error.strerror}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"recipe '{path}' is not YAML: {reason}") from None
        if not isinstance(values, dict):
            raise InputError(f"recipe '{path}' is not a mapping of keys to values.")
        return values

    def plain(self) -> dict[str, Any]:
        """As plain data, ready for YAML or JSON; `Recipe.of` reads it back."""
        plain = self.model_dump(mode="json")
        if not self.lenses:  # directories, journals and cells from before there were any stay what they are
            del plain["lenses"]
        if AUTO in self.task:  # how many samples the task says
            for key, count in _COUNTS.items():
                if count not in getattr(self, key).model_fields_set:
                    del plain[key][count]
        for key in ("samples", "batch_norm", "augment"):  # likewise
            if plain["heal"][key] == Healing.model_fields[key].get_default():
                del plain["heal"][key]
        if not self.calibration.augment:
            del plain["calibration"]["augment"]
        if self.batch_norm == Recipe.model_fields["batch_norm"].get_default():
            del plain["batch_norm"]
        return plain


def only_dense(sparsity: Any) -> dict[str, float]:
    """What an N:M pattern leaves of a recipe's sparsities: the layers that stay dense."""
    return {name: share for name, share in sparsity.items() if share == 0} if isinstance(sparsity, Mapping) else {}


def override(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply `KEY=VALUE` settings to plain recipe data: `calibration.samples=8`, `sparsity.down_proj=0.3`, or
    an option of a step, an allocation or a task, `sparsegpt.damping=0.05`; where the task is left open, that of
    the option is meant. Values are YAML. Raises InputError."""
    out = Recipe.of(values).plain() if values else Recipe().plain()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write KEY=VALUE, for example calibration.samples=8.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {setting}: '{text}' is not a YAML value.") from None
        if AUTO in out["task"] and (name := key.partition(".")[0]) in tasks:
            out["task"] = {name: {}}
        methods: list[tuple[str, Mapping[str, Method], Any]] = [("step", steps, part) for part in out["steps"]]
        methods += [("allocation", allocations, out["allocate"]), ("task", tasks, out["task"])]
        methods += [("healing method", groups, part) for part in out["heal"]["train"]]
        used = [name for _, _, part in methods for name in part if name != AUTO]
        named = (name for name in used if key.startswith(f"{name}."))
        head = next(named, key.partition(".")[0])  # a step from a file has dots in its name
        rest = key[len(head) + 1 :]
        if head not in Recipe.model_fields:
            if head not in used:
                raise InputError(unknown("recipe key", head, [*Recipe.model_fields, *used]))
            for kind, known, part in methods:
                if head not in part:
                    continue
                method = lookup(kind, known, head)
                if rest not in method.options:
                    raise InputError(unknown(f"option of {kind} {head}", rest, method.options))
                part[head][rest] = value
        elif rest:
            if not isinstance(out[head], dict):
                raise InputError(f"--set {setting}: '{head}' is a single value; write {head}=VALUE.")
            out[head][rest] = _methods("train", value) if (head, rest) == ("heal", "train") else value
        else:
            out[head] = {value: {}} if head in ("allocate", "task", "batch_norm") and isinstance(value, str) else value
    return out


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        model: Any = cls
        for part in path[:-1]:
            model = model.model_fields[part].annotation
        prefix = "".join(f"{part}." for part in path[:-1])
        return unknown("recipe key", prefix + path[-1], [prefix + name for name in model.model_fields])
    message = first["msg"].removeprefix("Value error, ")
    shown = first.get("input")
    value = f" (got {shown!r})" if isinstance(shown, str | int | float) else ""
    where = f"recipe key '{'.'.join(path)}': " if path and first["type"] != "value_error" else ""
    return f"{where}{message}{value if where else ''}" + ("" if message.endswith("?") and not where else ".")
