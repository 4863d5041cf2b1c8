"""Classifiers of pictures, by transformers and by timm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, pad

from ..compat import quiet_transformers
from ..errors import EndlessError, InputError, ModelError, first_line, say
from ..machine import free_memory
from ..model.cut import refused
from ..model.divergence import kl
from ..model.files import SINGLE, read_json
from ..model.names import find_directory
from ..model.network import Model
from ..model.open import open_files
from ..model.task import NO_ANSWERS, Answers, Counts, Task
from ..model.timm_models import PREFIX, build, is_timm, of_timm, pictures_of, save_timm, timm
from ..packed.opening import open_network
from ..photos import PHOTOS
from ..pictures import find_pictures, read_pictures
from ..samples import TARGET, Batch, Samples, in_dtype
from ..sparse.checkpoint import packed_config
from .labels import labels_of, match
from .registry import register_task
from .scores import class_answers, class_scores

PIXELS = "pixel_values"
LABELS = "labels"
TOP = 5
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Pictures(Samples):
    """Pictures of a source, with what a report says of them: the classes that theirs were taken for."""

    told: Mapping[str, Any] = field(default_factory=dict)


@register_task("images")
class Images(Task):
    """Classifiers of pictures: a picture goes in, a score for each class comes out."""

    source = PHOTOS
    follows = True
    argument = PIXELS
    counts = Counts(128, 256)
    figure = "top-1"
    higher = True
    unit = "%"
    many = None

    def __init__(
        self,
        *,
        size: PositiveInt | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop: Annotated[float, Field(gt=0, le=1)] | None = None,
        interpolation: Interpolation | None = None,
    ):
        """
        Args:
            size: of the square that the network sees, in pixels; None: as the model says, and all that follows too.
            mean: of red, green and blue, from 0 to 1, which is subtracted.
            std: of each, by which is divided then.
            crop: the share of the picture's shorter side that the square takes; None: all of it.
            interpolation: by which pictures are resized; None: bicubic.
        """
        self.side, self.mean, self.std = size, mean, std
        self.crop, self.interpolation = crop, interpolation
        given = [value is not None for value in (size, mean, std)]
        if any((*given, crop is not None, interpolation is not None)) and not all(given):
            raise InputError(
                "task 'images': size, mean and std say together how pictures are prepared: give all three."
            )

    # --- opening and saving

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        classes = [str(one) for one in config.get("architectures") or ()]
        return (
            name.startswith((PREFIX, "timm/"))
            or is_timm(config)
            or any("ForImageClassification" in one for one in classes)
        )

    def open(self, name: str, **options: Any) -> Model:
        trust: dict[str, Any] = {key: bool(options.get(key)) for key in ("remote_code", "pickles")}
        directory = Path(name) if Path(name).is_dir() else find_directory(name, **trust)
        if not is_timm(read_json(directory / "config.json")):
            kind = "classifier of pictures"
            return open_files(
                name,
                self,
                "AutoModelForImageClassification",
                kind,
                admit=_admit,
                check=lambda model: None,
                processor=_processor,
                **options,
            )
        if options.get("tokenizer") is not None:
            raise InputError(
                f"'{name}' is a network of timm, which says itself how pictures are prepared: no tokenizer."
            )
        if not (directory / SINGLE).is_file() and packed_config(directory) is None:
            raise ModelError(
                f"'{directory}' has no {SINGLE}: write it by timm.models.save_for_hf(…, safe_serialization=True)."
            )
        said = {key: options[key] for key in ("dtype", "device", "packed") if key in options}
        return open_network(lambda: build(directory), directory, self, name=name, **said)

    def save(self, model: Model, folder: Path) -> None:
        if of_timm(model.network):
            save_timm(model.network, folder)
        else:
            super().save(model, folder)

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        prepare, channels = self.prepared(model)
        found = find_pictures(source, seed, test)
        if count is None and found.count is None:
            raise EndlessError(f"'{source}' has no end in sight: say how many pictures (--set heal.samples=…).")
        used = 0 if test and found.apart else used
        labels, numbers, told = labels_of(model.network), list[int](), dict[str, Any]()
        if found.classes:
            matched = match(found.classes, labels, found.name)
            numbers, told = [matched.numbers[name] for name in found.classes], matched.told(labels)
            if matched.by == "order":
                say(f"the classes of '{found.name}' are taken for the model's in the order of their names")
        most = min(some for some in (count, found.count) if some is not None)
        groups: dict[tuple[Any, ...], _Rows] = {}
        for picture, label in read_pictures(found, prepare, count, used, channels):
            kinds = tuple((key, tensor.shape, tensor.dtype) for key, tensor in picture.items())
            rows = groups.setdefault(kinds, _Rows(found.name, picture, most))
            rows.add(picture, numbers[label] if numbers and label is not None else label)
        return Pictures(tuple(rows.group() for rows in groups.values()), told)

    def prepared(self, model: Model) -> tuple[Callable[[Any], dict[str, Tensor]], int]:
        """What makes tensors of a PIL image, and how many channels it wants. Raises InputError where nothing says how
        this model sees pictures."""
        own = None if self.side else pictures_of(model.network)
        if self.side or own:
            given: dict[str, Any] = own or {
                "input_size": (len(self.mean or ()), self.side, self.side),
                "mean": tuple(self.mean or ()),
                "std": tuple(self.std or ()),
                "crop_pct": self.crop or 1.0,
                "interpolation": self.interpolation or "bicubic",
            }
            if given["input_size"][0] not in (1, 3):
                raise InputError(
                    f"'{model.name}' takes pictures of {given['input_size'][0]} channels, neither 1 nor 3."
                )
            transform = timm().data.create_transform(**given, is_training=False)
            return lambda image: {PIXELS: transform(image)}, int(given["input_size"][0])
        processor = model.tokenizer
        if processor is None:
            raise InputError(
                f"'{model.name}' does not say how it sees pictures (preprocessor_config.json is missing): add that"
                " file, or say it, --set images.size=224 --set images.mean=[…] --set images.std=[…]."
            )

        def process(image: Any) -> dict[str, Tensor]:
            with quiet_transformers():
                made = processor(images=image, return_tensors="pt")
            return {key: tensor[0] for key, tensor in made.items() if isinstance(tensor, Tensor)}

        return process, 3

    def reads(self, model: Model) -> bool:
        """A directory has to say how pictures are prepared; a network in memory gets its samples where nothing does."""
        known = self.side or model.tokenizer is not None or pictures_of(model.network)
        return model.checkpoint is not None or bool(known)

    def example(self, network: nn.Module) -> Batch:
        config: Any = getattr(network, "config", None)
        if of_timm(network):
            said: Any = network.pretrained_cfg
            channels, height, width = said["input_size"]
        else:
            size = getattr(config, "image_size", None) or self.side or 224
            height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            channels = getattr(config, "num_channels", 3)
        return {PIXELS: torch.zeros(1, channels, height, width)}

    def check(self, model: Model, samples: Samples) -> None:
        count = labels_of(model.network).count
        for group in samples.groups:
            if PIXELS not in group:
                raise InputError(
                    f"samples of pictures are {PIXELS} (n, channels, height, width); these are {', '.join(group)}."
                )
            shape = tuple(group[PIXELS].shape[1:])
            labels = group.get(LABELS)
            if labels is not None and count and (int(labels.min()) < 0 or int(labels.max()) >= count):
                wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
                raise InputError(f"label {wrong} is none of the {count} classes of '{model.name}', 0 to {count - 1}.")
            one = {key: tensor[:1] for key, tensor in group.items()}
            example = self.example(model.network)
            why = refused(model.network, self, one)
            if why and not refused(model.network, self, example):
                wanted = " × ".join(map(str, example[PIXELS].shape[1:]))
                raise InputError(
                    f"'{model.name}' does not take pictures of {' × '.join(map(str, shape))}, but of {wanted}: {why}"
                )
        super().check(model, samples)

    # --- what they are compared with

    def lacks(self, group: Batch) -> bool:
        return LABELS not in group and TARGET not in group

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """The dense network's scores (B, classes), as logarithms of probabilities."""
        return _scores(outputs).log_softmax(1)

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        """It is called with pictures in the dtype of its weights, and with no labels."""
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        taken = in_dtype({key: t for key, t in batch.items() if key not in (LABELS, TARGET)}, dtype)
        if hasattr(network, "config"):
            return network(**taken, **options)
        return network(taken.pop(PIXELS), **taken, **options)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The cross entropy with each picture's label; where they have none, KL(dense || network)."""
        scores_BC = _scores(outputs)
        if LABELS in batch:
            return cross_entropy(scores_BC, batch[LABELS], reduction="none")
        dense_BC = batch[TARGET].to(scores_BC.device)
        return kl_div(scores_BC.log_softmax(1), dense_BC, reduction="none", log_target=True).sum(1)

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """KL(teacher || network), mean over pictures."""
        return kl(_scores(outputs), _scores(teacher), temperature)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Pictures mirrored by half, and moved by up to an eighth of their sides, what comes in being mirrored too."""
        x_BCHW, shifts = batch[PIXELS], [max(1, side // 8) for side in batch[PIXELS].shape[2:]]
        high, wide = (torch.randint(2 * s + 1, (len(x_BCHW),), generator=generator).tolist() for s in shifts)
        flips = (torch.rand(len(x_BCHW), generator=generator) < 0.5).tolist()
        room = pad(x_BCHW, (shifts[1], shifts[1], shifts[0], shifts[0]), mode="reflect")
        height, width = x_BCHW.shape[2:]
        moved = [one[:, h : h + height, w : w + width] for one, h, w in zip(room, high, wide, strict=True)]
        return {**batch, PIXELS: torch.stack([o.flip(2) if f else o for o, f in zip(moved, flips, strict=True)])}

    # --- what a report says

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        return class_answers(_scores(outputs), batch.get(LABELS), TOP)

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        if not losses:
            return {self.figure: None}
        found = class_scores(self.figure, losses, answers, dense, TOP)
        if self.figure not in found:  # without labels the loss is how far it is from the dense network
            return {**found, "divergence": found["loss"]}
        if not dense:
            _warn(model, found, labels_of(model.network).count)
        return {**found, **(samples.told if isinstance(samples, Pictures) else {})}


class _Rows:
    """Pictures of one shape, in memory that is laid out once."""

    def __init__(self, source: str, picture: Mapping[str, Tensor], most: int):
        size = sum(tensor.numel() * tensor.element_size() for tensor in picture.values()) * most
        if size > (free := free_memory(torch.device("cpu"))) * 0.8:
            raise InputError(
                f"{most} pictures of '{source}' take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: take fewer."
            )
        self.tensors = {key: torch.empty((most, *one.shape), dtype=one.dtype) for key, one in picture.items()}
        self.labels: list[int | None] = []

    def add(self, picture: Mapping[str, Tensor], label: int | None) -> None:
        for key, tensor in picture.items():
            self.tensors[key][len(self.labels)] = tensor
        self.labels.append(label)

    def group(self) -> Batch:
        n = len(self.labels)
        labels = {} if None in self.labels else {LABELS: torch.tensor(self.labels)}
        return {**{key: tensor[:n] for key, tensor in self.tensors.items()}, **labels}


def _warn(model: Model, found: Mapping[str, Any], classes: int) -> None:
    """Say so where a model is right no more often than one that guesses."""
    chance, n = 1 / max(classes, 2), found["samples"]
    if n >= 20 and found["top-1"] <= chance + 2 * math.sqrt(chance * (1 - chance) / n):
        say(
            f"'{model.name}' is right about {found['top-1']:.1%} of {n} pictures, where guessing is right about"
            f" {chance:.1%}: are the classes of these pictures those that it was trained with? The report shows how"
            " they were matched."
        )


def _scores(outputs: Any) -> Tensor:
    """The scores of all classes (B, classes) in float32."""
    scores: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return scores.float()


def _admit(name: str, config: Any) -> None:
    """Raises ModelError for a config of something else, with the task that it is for."""
    classes = getattr(config, "architectures", None) or []
    if classes and not any("ForImageClassification" in one for one in classes):
        raise ModelError(
            f"'{name}' is no classifier of pictures, but a {classes[0]}: leave --task out, and what it is for is found."
        )


def _processor(directory: Path, name: str, remote_code: bool) -> Any:
    """What makes tensors of pictures for a model of transformers, or None."""
    from transformers import AutoImageProcessor

    if not any((directory / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(f"the preprocessor_config.json of '{name}' cannot be used: {first_line(error)}") from None
