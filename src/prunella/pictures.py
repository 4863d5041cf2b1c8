"""From the name of a source to pictures.

A source is one of

    pictures/                      a folder with a folder of pictures for each class, CLASS/*.jpg
    pictures.zip                   the same in a zip; pictures.zip/FOLDER is a folder in it
    flat/                          a folder of pictures without classes
    hf:DATASET[:CONFIG[:SPLIT]]    a data set of the hub with a column of pictures, and maybe one of labels
    photos                         two photographs that come with scikit-learn, cut in many ways, and drawn pictures;
                                   no network, and no classes (see photos.py)

A folder whose folders are `train` and `test` (or `val`, `validation`; `calibration`) holds both: the one is calibrated
on, the other measured on. Pictures of all classes come by turns, in an order that the seed draws.

Every picture is turned upright as its EXIF data say, which is how it was looked at when its class was given to it, and
has three channels then: gray is repeated, transparency dropped, CMYK converted. What cannot be read is left out and
named.
"""

from __future__ import annotations

import io
import itertools
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import InputError, PrunellaError, first_line, say, some, unknown
from .photos import PHOTOS, photo

# Of the files that Pillow reads.
_KINDS = ("jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif")
ENDINGS = frozenset(f".{kind}" for kind in _KINDS)
TRAIN = ("train", "training", "calibration")
TEST = ("test", "val", "valid", "validation")
UNREADABLE = 0.1  # of the pictures that may be


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet.

    name:  for messages
    label: the number of its class among the source's, if it has classes
    load:  reads it: a PIL image as it is stored
    """

    name: str
    label: int | None
    load: Callable[[], Any]


@dataclass(frozen=True)
class Found:
    """The pictures of a source, in the order in which they are taken.

    name:    of the source, with the folder in it that was chosen
    classes: the names of its classes, or None if it has none; empty if its labels are numbers
    count:   how many pictures there are, if that is known
    apart:   are those to measure on others than those to calibrate on?
    """

    name: str
    pictures: Iterator[Picture]
    classes: tuple[str, ...] | None
    count: int | None
    apart: bool = False


def find_pictures(source: str, seed: int = 0, test: bool = False) -> Found:
    """The pictures of a source, none of which is read yet. Raises InputError.

    Args:
        seed: of the order.
        test: they are to measure on, not to calibrate on.
    """
    if source == PHOTOS:
        drawn = (Picture(f"{PHOTOS}, number {n}", None, partial(photo, n, seed, test)) for n in itertools.count())
        return Found(source, drawn, None, None, apart=True)
    if source.startswith("hf:"):
        return _dataset(source, seed, test)
    path = Path(source)
    if path.is_dir():
        names = sorted(str(p.relative_to(path).as_posix()) for p in path.rglob("*") if _is_picture(p.name))
        return _laid_out(source, names, lambda name: (path / name).open("rb"), seed, test)
    if packed := next((p for p in (path, *path.parents) if p.suffix.lower() == ".zip" and p.is_file()), None):
        return _zip(source, packed, path.relative_to(packed).as_posix(), seed, test)
    if path.is_file():
        raise InputError(f"'{source}' is neither a folder of pictures nor a .zip of one.")
    raise InputError(
        unknown("source of pictures", source, [PHOTOS])
        + " Or give a folder with a folder of pictures for each class, a .zip of it, or hf:DATASET[:CONFIG[:SPLIT]]."
    )


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in ENDINGS and not hidden


def _zip(source: str, packed: Path, within: str, seed: int, test: bool) -> Found:
    try:
        archive = zipfile.ZipFile(packed)
        names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"'{packed}' cannot be read as a zip: {first_line(error)}") from None
    above = "" if within == "." else f"{within.rstrip('/')}/"
    chosen = sorted(n.removeprefix(above) for n in names if n.startswith(above) and _is_picture(n))
    if above and not chosen:
        raise InputError(f"'{packed}' has no pictures in a folder '{within}'.")
    return _laid_out(source, chosen, lambda name: io.BytesIO(archive.read(above + name)), seed, test)


def _laid_out(source: str, names: Sequence[str], open_: Callable[[str], Any], seed: int, test: bool) -> Found:
    """Pictures by their paths below the source."""
    if not names:
        raise InputError(f"'{source}' holds no pictures ({', '.join(sorted(ENDINGS))}).")
    above, apart = "", False
    while all(name.count("/") > 1 for name in names):  # folders of folders
        tops = {name.partition("/")[0] for name in names}
        sides = [side for side in (TEST + TRAIN if test else TRAIN + TEST) if side in tops]
        if len(tops) > 1 and len(sides) < len(tops):
            break  # classes with folders in them
        top = sides[0] if sides else next(iter(tops))
        apart = apart or bool(tops & {*TRAIN} and tops & {*TEST})
        above, names = f"{above}{top}/", [n.removeprefix(f"{top}/") for n in names if n.startswith(f"{top}/")]
    loose = sum("/" not in name for name in names)
    if 0 < loose < len(names):
        raise InputError(
            f"'{source}' holds {loose} pictures beside folders with pictures: give a folder for each class, or pictures"
            " without folders, which have no classes then."
        )
    shown = f"{source.rstrip('/')}/{above}".rstrip("/") if above else source
    folders = [] if loose else sorted({name.partition("/")[0] for name in names})
    number = {folder: n for n, folder in enumerate(folders)}
    by_class: dict[str, list[str]] = {}
    for name in names:
        by_class.setdefault("" if loose else name.partition("/")[0], []).append(name)

    def picture(name: str) -> Picture:
        label = number.get(name.partition("/")[0]) if folders else None
        return Picture(f"{shown}/{name}", label, lambda: _opened(open_(above + name)))

    ordered = _by_turns(list(by_class.values()), seed)
    return Found(shown, map(picture, ordered), tuple(folders) if folders else None, len(names), apart)


def _by_turns(classes: Sequence[list[str]], seed: int) -> Iterator[str]:
    """One of each class, then another one of each, in an order that is drawn."""
    draw = random.Random(seed)
    mixed = [draw.sample(names, len(names)) for names in classes]
    draw.shuffle(mixed)
    for turn in range(max(map(len, mixed))):
        yield from (names[turn] for names in mixed if turn < len(names))


def _opened(file: Any) -> Any:
    """A picture of a file, wholly read. Raises InputError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("pictures need the package pillow: pip install 'prunella[vision]'.") from None

    with file:
        image = Image.open(file)
        image.load()
        return image


def upright(image: Any, channels: int = 3) -> Any:
    """A picture turned as its EXIF data say, with three channels, or gray. Raises ValueError for one that has no
    colors, only measurements (32-bit floats)."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it holds 32-bit floats, no colors")
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits of gray, which Pillow would cut off at 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def read_pictures(
    found: Found, prepare: Callable[[Any], Any], count: int | None, used: int = 0, channels: int = 3
) -> Iterator[tuple[Any, int | None]]:
    """What `prepare` makes of upright pictures, one after the other, with the numbers of their classes: of `count`
    pictures, or all, after the first `used` that can be read. What cannot be is named on stderr, and refused if it is
    more than a tenth. Raises InputError."""
    bad: list[str] = []
    taken = skipped = 0
    for picture in found.pictures:
        if taken == count:
            break
        try:
            image = upright(picture.load(), channels)
        except (PrunellaError, ImportError, MemoryError):
            raise
        except Exception as error:  # of Pillow, whose readers raise what they like
            bad.append(f"{picture.name} ({first_line(error).rstrip('.')})")
            if len(bad) > 100 + taken + skipped:
                break
            continue
        if skipped < used:
            skipped += 1
            continue
        taken += 1
        yield prepare(image), picture.label
    if len(bad) > UNREADABLE * (taken + skipped + len(bad)):
        raise InputError(
            f"{len(bad)} of {taken + skipped + len(bad)} pictures of '{found.name}' cannot be read: {some(bad)}."
        )
    if bad:
        say(f"{len(bad)} pictures of '{found.name}' cannot be read and are left out: {some(bad)}")
    if not taken:
        more = " left to measure on: calibrate on fewer (--samples), or measure on others (--evaluate)" if used else ""
        raise InputError(f"'{found.name}' has no pictures{more}.")


# ---------------------------------------------------------------------------------------------------------
# Data sets of the hub


def _dataset(source: str, seed: int, test: bool) -> Found:
    name, _, rest = source[3:].partition(":")
    config, _, own = rest.partition(":")
    split = own or ("test" if test else "train")
    try:
        import datasets
    except ImportError:
        raise InputError("data sets of the hub need the package datasets: pip install 'prunella[data]'.") from None
    say(f"reading the data set {name} ({config or 'default'}, {split}) from the hub")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        features: Any = rows.features or next(iter(rows.take(1)), {})
        rows = rows.shuffle(seed=seed, buffer_size=1000)
    except Exception as error:
        raise InputError(f"data set '{name}' cannot be read: {first_line(error)}") from None
    held = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [key for key in ("label", "labels", "fine_label") if key in features]
    if len(held) != 1 or len(labels) > 1:
        raise InputError(
            f"data set '{name}' has no one column of pictures and one of labels; it has: {', '.join(features)}."
        )
    rows = rows.cast_column(held[0], datasets.Image(decode=False))
    classes: tuple[str, ...] | None = tuple(getattr(features[labels[0]], "names", ())) if labels else None

    def pictures() -> Iterator[Picture]:
        try:
            for number, row in enumerate(rows, 1):
                kept = row[held[0]] or {}
                label = row[labels[0]] if labels else None
                if labels and (not isinstance(label, int) or label < 0):
                    raise InputError(
                        f"data set '{name}' ({split}) has no labels in row {number}: choose another split."
                    )
                yield Picture(f"{source}, row {number}", label, partial(stored, kept))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"data set '{name}' cannot be read: {first_line(error)}") from None

    return Found(source, pictures(), classes, None, apart=not own)


def stored(kept: Mapping[str, Any]) -> Any:
    """A picture as a data set holds it: its bytes, or the name of its file."""
    if kept.get("bytes") is not None:
        return _opened(io.BytesIO(kept["bytes"]))
    return _opened(Path(kept["path"]).open("rb"))
