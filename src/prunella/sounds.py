"""From the name of a source to sounds, and what is said in them.

A source is one of

    sounds/                      a folder of sounds (.wav, .flac, .ogg, .mp3, …), each with its text in a .txt of the
                                 same name beside it, or none of them with one
    sounds.jsonl, .csv, …        `audio`, a path from the folder of that file, and `text` in each row
    hf:DATASET[:CONFIG[:SPLIT]]  a data set of the hub with such columns
    tones                        tones and noise, drawn from a seed; no network

Sounds of several channels become their mean, and those of another rate than the model's are resampled by a polyphase
filter. What cannot be read is left out and named.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, first_line, say, some, unknown
from .texts import Split, is_prose, not_empty, records

TONES = "tones"
ENDINGS = frozenset([".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"])  # what libsndfile reads
UNREADABLE = 0.1  # of the sounds that may be
MANY = 50  # more than are read after which nothing good is expected
SECONDS = 4.0  # of a drawn sound


@dataclass(frozen=True)
class Sound:
    """A sound that is not read yet.

    name: for messages
    text: what is said in it, if that is known
    load: reads it at a rate: numbers between -1 and 1, (T,)
    """

    name: str
    text: str | None
    load: Callable[[int], np.ndarray]


def find_sounds(source: str, seed: int = 0, split: Split = "train") -> Iterator[Sound]:
    """The sounds of a source, none of which is read yet, in order. Raises InputError."""
    path = Path(source)
    if source == TONES:
        return (Sound(f"{TONES}, number {n}", None, partial(_tone, seed, n)) for n in itertools.count())
    if path.is_dir():
        return _folder(path)
    if source.startswith("hf:") or (path.is_file() and not is_prose(source) and path.suffix.lower() not in ENDINGS):
        return records(source, partial(_of_row, folder=path.parent), ("audio", "text"), split)
    if path.is_file():
        raise InputError(f"'{source}' is neither a folder of sounds nor a table with 'audio' and 'text'.")
    raise InputError(
        unknown("source of sounds", source, [TONES])
        + " Or give a folder of sounds, JSON lines with 'audio' and 'text', or hf:DATASET[:CONFIG[:SPLIT]]."
    )


class Reader:
    """Reads sounds at a rate; those that cannot be are left out, and told at the end."""

    def __init__(self, source: str, rate: int):
        self.source = source
        self.rate = rate
        self.read = 0
        self.bad: list[str] = []

    def __call__(self, sound: Sound) -> np.ndarray | None:
        """A sound (T,), or None. Raises InputError where what reads sounds is not installed."""
        try:
            found = sound.load(self.rate)
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file does to the library
            self.bad.append(f"{sound.name} ({first_line(error)})")
            if len(self.bad) > MANY + self.read:
                self.tell()
            return None
        self.read += 1
        return found

    def tell(self) -> None:
        """Say what could not be read. Raises InputError where that is too much."""
        if not self.bad:
            return
        if len(self.bad) > UNREADABLE * (self.read + len(self.bad)):
            raise InputError(f"{len(self.bad)} sounds of '{self.source}' cannot be read: {some(self.bad)}")
        say(f"{len(self.bad)} sounds of '{self.source}' cannot be read and are left out: {some(self.bad)}")


def _folder(folder: Path) -> Iterator[Sound]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.name[0] != ".")
    if not files:
        raise InputError(f"'{folder}' holds no sounds ({', '.join(sorted(ENDINGS))}).")
    texts = [path.with_suffix(".txt") for path in files]
    silent = [path for path, text in zip(files, texts, strict=True) if not text.is_file()]
    if 0 < len(silent) < len(files):
        raise InputError(
            f"{len(silent)} of the {len(files)} sounds in '{folder}' have no text beside them ('{silent[0].name}', of"
            f" which '{silent[0].stem}.txt' would say it): give all of them one, or none."
        )
    for path, text in zip(files, texts, strict=True):
        try:
            said = None if silent else text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{text}' cannot be read: {first_line(error)}.") from None
        if said == "":
            raise InputError(f"'{text}' is empty.")
        yield Sound(str(path), said, partial(_file, path))


def _of_row(row: Any, place: str, *, folder: Path) -> Sound:
    if not isinstance(row, Mapping) or not row.get("audio"):
        raise InputError(f"{place}: not an object with 'audio', the path of a sound.")
    text, audio = row.get("text"), row["audio"]
    text = None if text is None else not_empty(text, "text", place)
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        array, own = np.asarray(audio["array"], np.float32), int(audio["sampling_rate"])
        return Sound(place, text, lambda rate: resampled(array[:, None] if array.ndim == 1 else array.T, own, rate))
    if isinstance(audio, Mapping) and audio.get("bytes"):
        return Sound(place, text, partial(_file, io.BytesIO(audio["bytes"])))
    name = audio.get("path") if isinstance(audio, Mapping) else audio
    if not isinstance(name, str):
        raise InputError(f"{place}: 'audio' is no path of a sound.")
    if not (folder / name).is_file():
        raise InputError(f"{place}: there is no '{folder / name}'.")
    return Sound(str(folder / name), text, partial(_file, folder / name))


def _file(file: Any, rate: int) -> np.ndarray:
    try:
        import soundfile
    except ImportError:
        raise InputError("sounds are read by the package soundfile: pip install 'prunella[audio]'.") from None
    sound_TC, own = soundfile.read(file, dtype="float32", always_2d=True)
    return resampled(sound_TC, own, rate)


def resampled(sound_TC: np.ndarray, own: int, rate: int) -> np.ndarray:
    """The mean of a sound's channels, (T,), at another rate. Raises ValueError where it is empty or not finite,
    InputError without SciPy."""
    if not len(sound_TC):
        raise ValueError("it is empty")
    sound_T = sound_TC.mean(1, dtype=np.float64)
    if not np.isfinite(sound_T).all():
        raise ValueError("it holds NaN or infinity")
    if own != rate:
        try:
            from scipy.signal import resample_poly
        except ImportError:
            raise InputError(
                f"a sound has {own} numbers a second and the model takes {rate}: resample it, or pip install scipy."
            ) from None
        common = math.gcd(own, rate)
        sound_T = resample_poly(sound_T, rate // common, own // common)
    return np.asarray(sound_T, np.float32)


def _tone(seed: int, number: int, rate: int) -> np.ndarray:
    """A few tones that come and go in noise."""
    random = np.random.default_rng((seed, number))
    t = np.arange(int(SECONDS * rate)) / rate
    sound = 0.02 * random.standard_normal(len(t))
    for _ in range(4):
        pitch, start, length = random.uniform(100, 3000), random.uniform(0, SECONDS), random.uniform(0.1, 1.5)
        within = np.clip(np.minimum(t - start, start + length - t) * 20, 0, 1)  # fades in a twentieth of a second
        sound += random.uniform(0.05, 0.2) * within * np.sin(2 * np.pi * pitch * t * (1 + 0.05 * np.sin(t)))
    return np.asarray(sound, np.float32)
