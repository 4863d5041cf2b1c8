"""From sources to pictures, and from their classes to the model's."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pictures as drawn
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunella.errors import InputError
from prunella.pictures import find_pictures, read_pictures, upright
from prunella.tasks.labels import Labels, match

Image = pytest.importorskip("PIL.Image")
IMAGENET = Labels(3, ("tench, Tinca tinca", "crane", "crane"), ("n01440764", "n02012849", "n03126707"))


def read(source: Path, count: int = 1000, **options: Any) -> list[tuple[Any, int | None]]:
    used = options.pop("used", 0)
    return list(read_pictures(find_pictures(str(source), **options), lambda image: image, count, used))


# ---------------------------------------------------------------------------------------------------------
# Sources


def test_a_folder_by_class_gives_all_classes_by_turns(tmp_path: Path) -> None:
    found = read(drawn.folder(tmp_path, 4))
    assert find_pictures(str(tmp_path)).classes == ("blue_disc", "green_square", "red_stripe")
    assert [sorted(label for _, label in found[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4  # type: ignore[type-var]
    for image, label in found:
        color = np.asarray(image).reshape(-1, 3).astype(int)
        assert color[np.ptp(color, 1).argmax()].argmax() == (2, 1, 0)[label or 0]  # blue, green, red


def test_the_seed_draws_the_order_and_what_is_used_is_left_out(tmp_path: Path) -> None:
    drawn.folder(tmp_path, 6)
    names = [p.name for p in find_pictures(str(tmp_path), seed=3).pictures]
    assert names == [p.name for p in find_pictures(str(tmp_path), seed=3).pictures]
    assert names != [p.name for p in find_pictures(str(tmp_path), seed=4).pictures]
    first, rest = read(tmp_path, 5, seed=3), read(tmp_path, used=5, seed=3)
    assert len(first) + len(rest) == 18
    seen = {image.tobytes() for image, _ in first}
    assert not any(image.tobytes() in seen for image, _ in rest)


def test_a_zip_is_read_like_its_folder(tmp_path: Path) -> None:
    drawn.folder(tmp_path / "in" / "pictures", 3)
    packed = tmp_path / "p.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "in"))
        archive.writestr("__MACOSX/pictures/blue_disc/0.png", b"no picture")
    plain = read(tmp_path / "in" / "pictures")
    for source in (packed, packed / "pictures"):
        there = read(source)
        assert [(a.tobytes(), n) for a, n in there] == [(b.tobytes(), n) for b, n in plain]
    with pytest.raises(InputError, match="no pictures in a folder 'other'"):
        find_pictures(str(packed / "other"))


def test_a_folder_may_hold_a_side_to_calibrate_on_and_one_to_measure_on(tmp_path: Path) -> None:
    drawn.folder(tmp_path / "train", 3)
    drawn.folder(tmp_path / "val", 2, start=50)
    train, test = find_pictures(str(tmp_path)), find_pictures(str(tmp_path), test=True)
    assert (train.count, test.count, train.apart, test.apart) == (9, 6, True, True)
    assert (train.name, test.name) == (f"{tmp_path}/train", f"{tmp_path}/val")
    alone = find_pictures(str(tmp_path / "train"), test=True)
    assert (alone.count, alone.apart) == (9, False)


def test_pictures_without_folders_have_no_classes(tmp_path: Path) -> None:
    drawn.draw("blue disc", 1).save(tmp_path / "one.png")
    assert find_pictures(str(tmp_path)).classes is None
    assert [label for _, label in read(tmp_path)] == [None]
    drawn.folder(tmp_path, 1)
    with pytest.raises(InputError, match="1 pictures beside folders"):
        find_pictures(str(tmp_path))


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no", encoding="utf-8")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    for source, words in {
        "empty": "holds no pictures",
        "notes.txt": "neither a folder",
        "bad.zip": "cannot be read as a zip",
        "nowhere": "Or give a folder",
    }.items():
        with pytest.raises(InputError, match=words):
            find_pictures(str(tmp_path / source))


def test_photographs_are_on_every_machine() -> None:
    pytest.importorskip("sklearn")
    found = [image for image, _ in read_pictures(find_pictures("photos", seed=1), lambda image: image, 8)]
    again = [image for image, _ in read_pictures(find_pictures("photos", seed=1), lambda image: image, 8)]
    other = [image for image, _ in read_pictures(find_pictures("photos", seed=1, test=True), lambda image: image, 8)]
    assert [a.tobytes() for a in found] == [b.tobytes() for b in again]
    assert len({a.tobytes() for a in (*found, *other)}) == 16
    assert all(a.size == (256, 256) and np.asarray(a).std() > 5 for a in found)


def test_a_data_set_of_the_hub_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    drawn.folder(tmp_path / "train", 3)
    drawn.folder(tmp_path / "test", 2, start=70)
    source = f"hf:{tmp_path}"
    found = find_pictures(source)
    assert found.classes == ("blue_disc", "green_square", "red_stripe")
    assert (len(read(Path(source))), len(read(Path(source), test=True))) == (9, 6)


# ---------------------------------------------------------------------------------------------------------
# Pictures of all kinds


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "I;16"])
def test_every_picture_has_three_channels(mode: str, tmp_path: Path) -> None:
    pixels = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.stack([pixels, pixels, pixels], 2)).convert(mode)
    path = tmp_path / f"p.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    ((found, _),) = read(tmp_path)
    assert found.mode == "RGB"
    off = np.abs(np.asarray(found).astype(int) - pixels[:, :, None])
    assert off.mean() < {"1": 130, "P": 20}.get(mode, 2)  # 16 bits are not cut off at 255


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    image.paste((255, 0, 0), (0, 0, 10, 10))  # left half red
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    ((found, _),) = read(tmp_path)
    assert found.size == (10, 20)
    assert np.asarray(found)[2, 5].tolist() == [255, 0, 0]
    assert np.asarray(found)[17, 5].tolist() == [0, 0, 0]


def test_measurements_are_no_picture() -> None:
    with pytest.raises(ValueError, match="32-bit floats"):
        upright(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn.folder(tmp_path, 8)
    whole = (tmp_path / "red_stripe" / "3.png").read_bytes()
    (tmp_path / "red_stripe" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "blue_disc" / "9.jpg").write_bytes(b"no picture")
    found = read(tmp_path)
    assert len(found) == 23
    said = capsys.readouterr().err
    assert "2 pictures of" in said
    assert "red_stripe/3.png" in said
    assert "blue_disc/9.jpg" in said
    (tmp_path / "blue_disc" / "10.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 26 pictures of .* cannot be read"):
        read(tmp_path)


def test_nothing_left_to_measure_on_is_refused(tmp_path: Path) -> None:
    drawn.folder(tmp_path, 2)
    with pytest.raises(InputError, match=r"left to measure on: calibrate on fewer \(--samples\)"):
        read(tmp_path, used=6)


# ---------------------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    ("classes", "by", "numbers"),
    [
        (("Blue_Disc", "RED-stripe"), "name", (0, 2)),
        (("2", "0"), "leading number", (2, 0)),
        (("002_red", "0 blue"), "leading number", (2, 0)),
        (("c", "a", "b"), "order", (2, 0, 1)),
        (("1", "10", "2"), "order", (0, 2, 1)),  # as numbers
    ],
)
def test_classes_are_matched(classes: tuple[str, ...], by: str, numbers: tuple[int, ...]) -> None:
    found = match(classes, Labels(3, ("blue disc", "green square", "red stripe")), "p")
    assert (found.by, tuple(found.numbers[name] for name in classes)) == (by, numbers)


def test_classes_are_matched_by_synonym_and_by_wordnet_id() -> None:
    assert match(("tinca_tinca",), IMAGENET, "p").numbers == {"tinca_tinca": 0}
    assert match(("n03126707_crane", "n01440764"), IMAGENET, "p").numbers == {"n03126707_crane": 2, "n01440764": 0}
    assert match(("n01440764",), IMAGENET, "p").by == "name"  # the model's own names are ids
    with pytest.raises(InputError, match=r"1 of 1 classes .* 'crane'"):  # there are two
        match(("crane",), IMAGENET, "p")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("blue disc", "violet disc"), r"1 of 2 classes of 'p' are none of the model's 3: 'violet disc'"),
        (("0", "1", "3", "x"), "2 of 4 classes"),
        (("a", "b"), "numbered from 0 to 2"),
        (("3d", "2nd"), "2 of 2 classes"),
        (("1_cat", "01_dog"), "are one class of the model"),
    ],
)
def test_classes_that_fit_none_are_refused_with_what_would_work(classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        match(classes, Labels(3, ("blue disc", "green square", "red stripe")), "p")


@given(st.permutations(range(12)))
def test_numbers_are_never_sorted_as_text(order: list[int]) -> None:
    names = [str(number + 1) for number in order]
    found = match(names, Labels(12), "p")
    assert found.by == "order"
    assert all(found.numbers[name] == int(name) - 1 for name in names)


def test_the_tensors_are_those_that_timm_makes(tmp_path: Path) -> None:
    """Of the same file the same numbers, whatever reads it."""
    network = drawn.tiny_timm()
    prepare = drawn.prepared(network)
    image = drawn.draw("red stripe", 5)
    image.save(tmp_path / "one.png")
    ((made, _),) = list(read_pictures(find_pictures(str(tmp_path)), prepare, 1))
    assert torch.equal(made, prepare(image))
    assert made.shape == (3, drawn.SIZE, drawn.SIZE)
