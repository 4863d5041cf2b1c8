"""One page of HTML that shows what a run did: from prunella.json alone, with nothing to fetch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from .. import tensors
from ..errors import InputError, ModelError
from ..histogram import SPAN
from ..outcome import LayerResult, mean
from ..save import REPORT
from . import charts
from .figure import PERPLEXITY, Figure, bos_words
from .report import Report, layer_table, numbers, trained_on

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
    """A file that is whole or not there, wherever the user wants it. Raises InputError."""
    if path.is_dir():
        raise InputError(f"'{path}' is a directory: give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors.write_text(path, text)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from None


def page(report: Report, directory: str | Path = "pruned") -> str:
    """The page as HTML."""
    blocks = by_block(report.layers, report.model.get("blocks"))
    kinds = list(dict.fromkeys(kind for _, kind in blocks))
    histograms = [(kind, histogram_of(kind, blocks)) for kind in kinds]
    return render(
        "report.html",
        name=title_of_model(report),
        sentence=sentence(report),
        facts=facts(report),
        rows=numbers(report.rows()),
        samples=samples(report),
        layers=[drawing for drawing in per_layer(blocks, kinds, "blocks" in report.model) if drawing.svg],
        worst=[(row[0], row[4], row[2], row[1]) for row in layer_table(worst(report.layers)[:WORST])],
        notes=report.notes(),
        histograms=[(kind, chart) for kind, chart in histograms if chart],
        healing=numbers(report.healing_rows()) if report.healing else [],
        losses=[drawing for drawing in losses(report.healing) if drawing.svg],
        command=command(report, directory),
        versions=report.versions,
        table_of_layers=layer_table(report.layers),
    )


# ---------------------------------------------------------------------------------------------------------
# Words


def sentence(report: Report) -> str:
    """What was done, in a paragraph."""
    recipe = report.recipe
    text = f"{report.sparsity:.1%} of the block weights of {title_of_model(report)} are zero"
    if pruned_here(report):
        touched = sum(la.target > 0 for la in report.layers)
        spread = " and ".join(name for name in recipe["allocate"] if name != "uniform")
        text += (
            f", pruned by {title_of_steps(recipe['steps'])} in {touched} of {len(report.layers)} layers (pattern"
            f" {recipe['pattern']}" + (f", spread by {spread}" if spread else "") + ")"
        )
        if any(la.tokens for la in report.layers):
            what, source = report.calibration()
            text += f", calibrated on {what} " + (f"of {source}" if source else "that were handed over")
    text += "." + _moved(report.dense, report.pruned)
    did = report.healing
    if did:
        what, _, many = trained_on(did)
        text += f" Then it was healed on {many} {what}, the mask held." + _moved(did["before"], did["after"])
    return text


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How the figure changed, as a sentence; nothing if it was not measured."""
    first, last = Figure.of(before), Figure.of(after)
    if first.value is None or last.value is None or first.name != last.name:
        return ""
    way = "rose" if last.value > first.value else "fell"
    begin = bos_words(before.get("bos"))
    windows = f" (windows {begin})" if begin else ""
    source = f" on {Path(before['source']).name}" if before["source"] else ""
    if last.value == first.value and first.name != PERPLEXITY:
        return f" {last.title}{source} stayed at {last}."
    return f" {last.title}{source}{windows} {way} from {first} to {last.beside(first)}."


def pruned_here(report: Report) -> bool:
    """Did this report's run prune? Else it only healed a model that was pruned elsewhere."""
    return bool(report.run["seconds"])


def title_of_model(report: Report) -> str:
    """The model's name without the directories it lies in."""
    return Path(report.model["name"]).name or str(report.model["name"])


def title_of_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The steps of a recipe in a few words: `wanda + update`."""
    return " + ".join(name.rpartition(":")[2] for step in steps for name in step)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The few numbers to see first: (what, value, remark)."""
    dense, pruned, run = Figure.of(report.dense), Figure.of(report.pruned), report.run
    out = []
    if pruned.value is not None:
        said = ["" if dense.value is None else f"dense {dense}", bos_words(report.pruned.get("bos"))]
        out.append((pruned.name, str(pruned), ", ".join(word for word in said if word)))
    out.append(("zeros in the blocks", f"{report.sparsity:.1%}", ""))
    healed = Figure.of(report.healing.get("after", {}))
    if healed.value is not None:
        out.append((f"{healed.name}, healed", str(healed), "with the adapter" if report.apart else ""))
    if pruned_here(report):
        out.append(("time to prune", duration(run["seconds"]["prune"]), f"on {report.recipe['device']}"))
    out.append(("peak memory", f"{run['peak_memory'] / 1e9:.2f} GB", ""))
    out.append(("parameters", f"{report.model['parameters'] / 1e6:,.1f} M", report.model["dtype"]))
    return out


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, whichever says it in few digits."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def samples(report: Report) -> list[tuple[str, str, str]]:
    """What the models write: (side, the words all begin with, the rest)."""
    texts = {"dense": report.dense.get("sample"), "pruned": report.pruned.get("sample")}
    texts["healed"] = report.healing.get("after", {}).get("sample")
    shown = {side: text for side, text in texts.items() if text}
    words = [text.split(" ") for text in shown.values()]
    same = [all(word == group[0] for word in group) for group in zip(*words, strict=False)] if len(words) > 1 else []
    common = (*same, False).index(False)
    parts = [(" ".join(text[:common]), " ".join(text[common:])) for text in words]
    return [(side, *part) for side, part in zip(shown, parts, strict=True)]


def command(report: Report, directory: str | Path) -> str:
    """What to type to repeat the run."""
    out, did = Path(directory).resolve().name, report.healing
    source = did["source"] if did else ""
    lines = []

    def add(file: str, recipe: Mapping[str, Any], verb: str, model: str, out: str) -> None:
        text = yaml.safe_dump({k: v for k, v in recipe.items() if k != "model"}, sort_keys=False, allow_unicode=True)
        lines.append(f"cat > {file} <<'END OF RECIPE'\n{text}END OF RECIPE")
        lines.append(f"prunella {verb} {shlex.quote(model)} -o {shlex.quote(out)} --recipe {file}")

    if report.run.get("handed_over"):
        lines.append("# calibrated on samples that were handed over: these commands take the recipe's in their place")
    if pruned_here(report):
        name = Path(source).name + "-again" if did else out + "-again"
        add("recipe.yaml", report.recipe, "prune", report.model["name"], name)
        source = name
    if did:
        shared = {key: report.recipe[key] for key in ("calibration", "evaluate", "seed", "device")}
        add("heal.yaml", {**shared, "heal": did["recipe"]}, "heal", source, out + "-again")
    return "\n".join(lines)


def worst(layers: Sequence[LayerResult]) -> list[LayerResult]:
    """The layers with the largest errors first; those whose error was not measured are left out."""
    return sorted((la for la in layers if la.error is not None), key=lambda la: -(la.error or 0))


# ---------------------------------------------------------------------------------------------------------
# Figures

Blocks = Mapping[tuple[str, str], list[LayerResult]]


def by_block(layers: Sequence[LayerResult], names: Sequence[str] | None = None) -> Blocks:
    """{(block, kind): layers}: `model.layers.3.self_attn.q_proj` is block 3's `q_proj`. The experts of a mixture
    are of one kind; where two kinds end alike (`attn.c_proj`, `mlp.c_proj`) they keep more of their names.

    names: of the blocks, where they are known: a layer is of the block that it lies in. Of a network that is one block
           each layer has a column of its own.
    """
    if names is not None and len(names) == 1:
        return {(str(number), "layers in order"): [layer] for number, layer in enumerate(layers)}
    split = [_place(layer.name, names) for layer in layers]
    kinds = {parts for _, parts in split}

    def short(parts: tuple[str, ...]) -> str:
        fit = (n for n in range(1, len(parts)) if sum(other[-n:] == parts[-n:] for other in kinds) == 1)
        return ".".join(parts[-next(fit, len(parts)) :])

    short_names = {parts: short(parts) for parts in kinds}
    out: dict[tuple[str, str], list[LayerResult]] = {}
    for (block, parts), layer in zip(split, layers, strict=True):
        out.setdefault((block, short_names[parts]), []).append(layer)
    return out


def _place(name: str, blocks: Sequence[str] | None) -> tuple[str, tuple[str, ...]]:
    """The number of the block that a layer lies in, and the parts of its name there, numbers left out of it that only
    tell alike ones apart."""
    if blocks is None:
        match = re.match(r"(?:.*?\.)??(\d+)\.(.+)$", name)
        block, rest = (match[1], match[2]) if match else ("0", name)
    else:
        number = next((n for n, one in enumerate(blocks) if name == one or name.startswith(f"{one}.")), 0)
        block, rest = str(number), name.removeprefix(blocks[number]).lstrip(".") or name.rpartition(".")[2]
    words = tuple(part for part in rest.split(".") if not part.isdigit())
    return block, words or (rest,)


def per_layer(blocks: Blocks, kinds: Sequence[str], other: bool = False) -> list[Drawing]:
    """Sparsity and error over blocks and layers, as heat maps and as curves; of a language model or an `other` one."""
    indices = list(dict.fromkeys(block for block, _ in blocks))
    mixture = any(len(layers) > 1 for layers in blocks.values())
    several = "Layers of one kind in a block" if other else "Experts of a mixture"
    caption = f"{several} are shown by their mean." if mixture else ""
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
        heat = charts.heat(title, kinds, indices, found, say, log)
        series = {kind: [(int(b), v) for b in indices if (v := found.get((b, kind))) is not None] for kind in kinds}
        curves = charts.lines(f"{what} from block to block", series, "block", what.lower(), say, log)
        out.append(Drawing(title, heat, caption=caption))
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


def losses(healing: Mapping[str, Any]) -> list[Drawing]:
    """Loss over steps of retraining or, where blocks were reconstructed one by one, before and after over blocks."""
    found = healing.get("losses") or []
    if isinstance(found, Mapping):
        curves = {
            name: [(block, seen[at]) for block, seen in enumerate(found.values()) if seen]
            for name, at in (("first step", 0), ("last step", -1))
        }
        title, x = "Reconstruction loss of each block", "block"
    else:
        distilled = healing.get("recipe", {}).get("distill")  # another loss than that of held-out text
        curves = {"training, distilled" if distilled else "training": list(enumerate(found, 1))}
        curves["held out"] = [(int(step), loss) for step, loss in (healing.get("held_out") or {}).items()]
        title, x = "Loss while healing", "step"
    return [Drawing(title, charts.lines(title, curves, x, "loss"), charts.legend(curves))]
