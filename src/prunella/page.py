"""One page of HTML that shows what a run did: from prunella.json alone, with nothing to fetch."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from . import charts
from .errors import InputError, ModelError
from .histogram import SPAN
from .report import Report, layer_table
from .save import REPORT
from .stream import LayerResult

WORST = 10

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("prunella"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
)


@dataclass(frozen=True)
class Drawing:
    """A figure and the words around it."""

    title: str
    svg: Markup
    legend: Markup | str = ""
    caption: str = ""


def render(template: str, **values: Any) -> str:
    """A page made from one of the templates, styles included; every value is escaped."""
    style = Markup(_templates.get_template("style.css").render())
    return _templates.get_template(template).render(style=style, **values)


def write_page(directory: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a pruned model, report.html in its directory unless `path` says otherwise.

    Raises ModelError if the directory holds no report or a damaged one, InputError if the page cannot be written.
    """
    report = Report.read(directory)
    try:
        text = page(report, directory)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"'{Path(directory) / REPORT}' is damaged: {error}.") from None
    path = Path(directory) / "report.html" if path is None else Path(path)
    write_text(path, text)
    return path


def write_text(path: Path, text: str) -> None:
    """A file that is whole or not there. Raises InputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from None


def page(report: Report, directory: str | Path = "pruned") -> str:
    """The page as HTML."""
    blocks = by_block(report.layers)
    kinds = list(dict.fromkeys(kind for _, kind in blocks))
    histograms = [(kind, histogram_of(kind, blocks)) for kind in kinds]
    return render(
        "report.html",
        name=title_of_model(report),
        sentence=sentence(report),
        facts=facts(report),
        rows=[row for row in report.rows() if row[0] != "sample of text"],
        samples=samples(report),
        layers=[drawing for drawing in per_layer(blocks, kinds) if drawing.svg],
        worst=[(row[0], row[4], row[2], row[1]) for row in layer_table(worst(report.layers)[:WORST])],
        notes=report.notes(),
        histograms=[(kind, chart) for kind, chart in histograms if chart],
        losses=[drawing for drawing in losses(report) if drawing.svg],
        command=command(report, directory),
        versions=report.versions,
        table_of_layers=layer_table(report.layers),
    )


# ---------------------------------------------------------------------------------------------------------
# Words


def sentence(report: Report) -> str:
    """What was done."""
    recipe, calibration = report.recipe, report.recipe["calibration"]
    touched = sum(la.sparsity > 0 for la in report.layers)
    spread = " and ".join(name for name in recipe["allocate"] if name != "uniform")
    text = (
        f"{report.sparsity:.1%} of the block weights of {title_of_model(report)} are zero, pruned by"
        f" {title_of_steps(recipe['steps'])} in {touched} of {len(report.layers)} layers (pattern {recipe['pattern']}"
        + (f", spread by {spread}" if spread else "")
        + f"), calibrated on {calibration['samples']} windows of {calibration['length']} tokens of"
        f" {Path(calibration['source']).name}."
    )
    dense, pruned = report.dense.get("perplexity"), report.pruned.get("perplexity")
    if dense is not None and pruned is not None:
        verb = "rose" if pruned > dense else "fell"
        text += f" Perplexity on {Path(report.dense['source']).name} {verb} from {dense:.2f} to {pruned:.2f}."
    return text


def title_of_model(report: Report) -> str:
    """The model's name without the directories it lies in."""
    return Path(report.model["name"]).name or str(report.model["name"])


def title_of_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The steps of a recipe in a few words: `wanda + update`."""
    return " + ".join(name.rpartition(":")[2] for step in steps for name in step)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The few numbers to see first: (what, value, remark)."""
    dense, pruned, run = report.dense.get("perplexity"), report.pruned.get("perplexity"), report.run
    out = []
    if pruned is not None:
        out.append(("perplexity", f"{pruned:.2f}", "" if dense is None else f"dense {dense:.2f}"))
    out.append(("zeros in the blocks", f"{report.sparsity:.1%}", ""))
    out.append(("time to prune", duration(run["seconds"]["prune"]), f"on {report.recipe['device']}"))
    out.append(("peak memory", f"{run['peak_memory'] / 1e9:.2f} GB", ""))
    out.append(("parameters", f"{report.model['parameters'] / 1e6:,.1f} M", report.model["dtype"]))
    return out


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, whichever says it in few digits."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def samples(report: Report) -> list[tuple[str, str, str]]:
    """What both models write: (side, the words both begin with, the rest)."""
    texts = {"dense": report.dense.get("sample"), "pruned": report.pruned.get("sample")}
    shown = {side: text for side, text in texts.items() if text}
    words = [text.split(" ") for text in shown.values()]
    same = [all(word == group[0] for word in group) for group in zip(*words, strict=False)] if len(words) > 1 else []
    common = (*same, False).index(False)
    parts = [(" ".join(text[:common]), " ".join(text[common:])) for text in words]
    return [(side, *part) for side, part in zip(shown, parts, strict=True)]


def command(report: Report, directory: str | Path) -> str:
    """What to type to repeat the run."""
    model, out = report.model["name"], Path(directory).resolve().name
    recipe = yaml.safe_dump(
        {k: v for k, v in report.recipe.items() if k != "model"}, sort_keys=False, allow_unicode=True
    )
    return (
        f"cat > recipe.yaml <<'END OF RECIPE'\n{recipe}END OF RECIPE\n"
        f"prunella prune {shlex.quote(model)} -o {shlex.quote(out + '-again')} --recipe recipe.yaml"
    )


def worst(layers: Sequence[LayerResult]) -> list[LayerResult]:
    """The layers with the largest errors first; those whose error was not measured are left out."""
    return sorted((la for la in layers if la.error is not None), key=lambda la: -(la.error or 0))


# ---------------------------------------------------------------------------------------------------------
# Figures

Blocks = Mapping[tuple[str, str], list[LayerResult]]


def by_block(layers: Sequence[LayerResult]) -> Blocks:
    """{(block, kind): layers}: `model.layers.3.self_attn.q_proj` is block 3's `q_proj`. The experts of a mixture
    are of one kind; where two kinds end alike (`attn.c_proj`, `mlp.c_proj`) they keep more of their names."""
    split = []
    for layer in layers:
        match = re.match(r"(?:.*?\.)??(\d+)\.(.+)$", layer.name)
        block, rest = (match[1], match[2]) if match else ("0", layer.name)
        split.append((block, tuple(part for part in rest.split(".") if not part.isdigit())))
    kinds = {parts for _, parts in split}

    def short(parts: tuple[str, ...]) -> str:
        fit = (n for n in range(1, len(parts)) if sum(other[-n:] == parts[-n:] for other in kinds) == 1)
        return ".".join(parts[-next(fit, len(parts)) :])

    names = {parts: short(parts) for parts in kinds}
    out: dict[tuple[str, str], list[LayerResult]] = {}
    for (block, parts), layer in zip(split, layers, strict=True):
        out.setdefault((block, names[parts]), []).append(layer)
    return out


def mean(layers: Sequence[LayerResult], value: Callable[[LayerResult], float | None]) -> float | None:
    """Over layers, weighted by their sizes; None where none has a value."""
    known = [(found, la.shape[0] * la.shape[1]) for la in layers if (found := value(la)) is not None]
    return sum(found * size for found, size in known) / sum(size for _, size in known) if known else None


def per_layer(blocks: Blocks, kinds: Sequence[str]) -> list[Drawing]:
    """Sparsity and error over blocks and layers, as heat maps and as curves."""
    indices = list(dict.fromkeys(block for block, _ in blocks))
    mixture = any(len(layers) > 1 for layers in blocks.values())
    caption = "Experts of a mixture are shown by their mean." if mixture else ""
    out = []
    quantities: tuple[tuple[str, Callable[[LayerResult], float | None], str], ...] = (
        ("Sparsity", lambda la: la.sparsity or None, "{:.1%}"),
        ("Reconstruction error", lambda la: la.error, "{:.2g}"),
    )
    for what, value, form in quantities:
        say = form.format
        found = {key: mean(layers, value) for key, layers in blocks.items()}
        positive = [v for v in found.values() if v]
        log = what != "Sparsity" and bool(positive) and max(positive) > 20 * min(positive)
        title = f"{what} by block and layer"
        grid = charts.heat(title, kinds, indices, found, say, log)
        series = {kind: [(int(b), v) for b in indices if (v := found.get((b, kind))) is not None] for kind in kinds}
        curves = charts.lines(f"{what} from block to block", series, "block", what.lower(), say, log)
        out.append(Drawing(title, grid, caption=caption))
        out.append(Drawing(f"{what} from block to block", curves, charts.legend(kinds), caption))
    return out


def histogram_of(kind: str, blocks: Blocks) -> Markup:
    """Dense and kept weights of one kind of layer in all blocks."""
    found = [la.weights for (_, name), layers in blocks.items() if name == kind for la in layers if la.weights]
    dense, pruned = (
        [sum(column) for column in zip(*(map(int, str(w[side]).split()) for w in found), strict=True)]
        for side in ("dense", "pruned")
    )
    return charts.histogram(f"Weights of {kind}, dense and kept", dense, pruned, SPAN, "rms")


def losses(report: Report) -> list[Drawing]:
    """Loss over steps, where the model was healed."""
    curves = (getattr(report, "healing", None) or {}).get("losses") or {}
    svg = charts.lines("Loss while healing", curves, "step", "loss")
    return [Drawing("Loss", svg, charts.legend(curves))]
