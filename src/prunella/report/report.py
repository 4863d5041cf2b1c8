"""What a run did: the content of prunella.json, and tables and texts made from it."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..layers import UNSEEN, LeftOut
from ..model.network import Model
from ..outcome import LayerResult, mean
from ..overlap import joined
from ..save import REPORT
from ..version import __version__
from .figure import Figure, label, more_of

SAMPLE = "sample of text"
Rows = list[tuple[str, str, str]]


@dataclass(frozen=True)
class Report:
    """Everything worth knowing about one run.

    recipe:   the resolved recipe; `Recipe.of(report.recipe)` repeats the run
    model:    name, class, dtype, parameters (all), prunable (weights in layers that could be pruned); where the task is
              not text, the library that its class comes from, and the names of its blocks
    dense, pruned: of text perplexity (None if not measured), its windows and length, a sample of text; of another task
              what `Task.scores` says: `figure` is the name of what counts, `higher` and `unit` how it is read (see
              `report.Figure`), `more` what tables show besides; bytes of the files
    layers:   what became of each layer, in order: name, shape, sparsity, error and more
    left_out: the matrices of the blocks that are no layers to prune (routers, convolutions, …), and why
    run:      seconds by phase, cpu_seconds, peak memory in bytes (resident, and of the GPU), threads, blocks that an
              interrupted run had finished before; were the calibration samples handed over, in place of the recipe's?
    versions: of what the result depends on
    fingerprint: of the calibration text; by it `prunella eval` knows a text that the model was calibrated on
    batch_norm: what became of the statistics of batch norms, if there are any: the way that was `taken`, for each that
              was `tried` the loss and the task's figure on `held_out` calibration samples, which were not estimated on,
              how many norms and samples, norms that stayed as they were and why
    healing:  what retraining did, if there was any: what trained and how, losses, tokens, seconds, perplexity before
              and after, fingerprint of the text; `apart`: what of it is in an adapter, and then `weights`: perplexity
              without that
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    dense: dict[str, Any]
    pruned: dict[str, Any]
    layers: tuple[LayerResult, ...]
    run: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    fingerprint: str = ""
    healing: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    batch_norm: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many weights all matrices of the blocks hold, pruned or not."""
        return sum(la.size for la in self.layers) + sum(item.weights for item in self.left_out)

    @property
    def sparsity(self) -> float:
        """Share of zeros among these weights."""
        return self._zeros([la.sparsity for la in self.layers])

    @property
    def before(self) -> float:
        """Share of zeros among these weights before pruning."""
        return self._zeros([la.before for la in self.layers])

    def _zeros(self, shares: Sequence[float]) -> float:
        zeros = sum(share * la.size for share, la in zip(shares, self.layers, strict=True))
        return (zeros + sum(item.zeros for item in self.left_out)) / self.weights if self.weights else 0.0

    def _left(self) -> dict[str, list[int]]:
        """The sizes of all matrices that stayed as they were, {why: sizes}."""
        out: dict[str, list[int]] = {}
        for why, size in (
            *((item.why, item.weights) for item in self.left_out),
            *(("skipped", la.size) for la in self.layers if not la.target),
        ):
            out.setdefault(why, []).append(size)
        return out

    @property
    def seen(self) -> str:
        """The fingerprint of all text that went into the weights: to calibrate, to heal, to train a teacher."""
        taught = self.healing.get("taught", {})
        return joined(self.fingerprint, self.healing.get("fingerprint", ""), taught.get("fingerprint", ""))

    def plain(self) -> dict[str, Any]:
        """As plain data, as it stands in prunella.json."""
        plain = {"sparsity": self.sparsity, **asdict(self)}
        if not self.batch_norm:  # most networks have none, and their reports are what they were
            del plain["batch_norm"]
        return plain

    @classmethod
    def read(cls, directory: str | Path) -> Report:
        """The report saved with a pruned model. Raises ModelError if there is none or it is damaged."""
        path = Path(directory) / REPORT
        if not path.is_file():
            raise ModelError(f"'{directory}' has no {REPORT}: it was not pruned by Prunella.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data.pop("sparsity")
            for side in (data["dense"], data["pruned"]):  # said now, not when hours of healing are to be reported
                label(side)
            layers = tuple(
                LayerResult(**{**la, "shape": tuple(la["shape"]), "notes": tuple(la["notes"])})
                for la in data.pop("layers")
            )
            left = tuple(LeftOut(**{**item, "shape": tuple(item["shape"])}) for item in data.pop("left_out", ()))
            return cls(layers=layers, left_out=left, **data)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"'{path}' is damaged: {error}.") from None

    def rows(self) -> Rows:
        """Dense beside pruned, ready for a table: (what, dense, pruned)."""

        def size(side: Mapping[str, Any]) -> str:
            return f"{side['bytes'] / 1e6:,.1f} MB" if "bytes" in side else "not saved"

        active = [la for la in self.layers if la.target]
        before, after = (mean(active, share) or 0.0 for share in (lambda la: la.before, lambda la: la.sparsity))
        rows = [
            *_measured(self.dense, self.pruned),
            ("sparsity of the pruned layers", f"{before:.1%}", f"{after:.1%}"),
            ("sparsity of all block weights", f"{self.before:.1%}", f"{self.sparsity:.1%}"),
            *(
                (f"stayed dense: {why}", "", f"{len(sizes)} matrices, {sum(sizes) / self.weights:.2%} of the weights")
                for why, sizes in self._left().items()
            ),
            *self._outside_row(),
            *self._batch_norm_rows(),
            ("size of the weights", size(self.dense), size(self.pruned)),
            ("seconds to prune", "", f"{self.run['seconds'].get('prune', 0):.1f}"),
            ("seconds in all, evaluation too", "", f"{self.run['seconds'].get('all', 0):.1f}"),
            ("peak memory", "", f"{self.run['peak_memory'] / 1e9:.2f} GB"),
        ]
        return rows + _sample(self.dense, self.pruned)

    def _batch_norm_rows(self) -> Rows:
        did = self.batch_norm
        if not did:
            return []

        def said(name: str) -> str:
            figures = ", ".join(f"{figure} {value:.4g}" for figure, value in did["tried"][name].items())
            return (figures or "not measured") + ("; taken" if name == did["taken"] else "")

        what = f"batch norm {{}}, on {did['held_out']} calibration samples"
        return [(what.format("as it was" if name == "keep" else name), "", said(name)) for name in did["tried"]]

    def _outside_row(self) -> Rows:
        """What lies outside of the blocks, where the report says it: not so of language models."""
        sizes = self.model.get("outside")
        return (
            [("outside of the blocks, dense", "", f"{len(sizes)} matrices, {sum(sizes.values()):,}")] if sizes else []
        )

    def _healed_card(self) -> str:
        if not self.healing:
            return ""
        told = "Then it was retrained, the mask held"
        if self.apart:
            told += "; what is in `adapter`, in PEFT's format, `PeftModel.from_pretrained` adds to the model"
        table = _markdown("pruned", "healed", self.healing_rows())
        return f"\n{told}:\n\n{table}\n"

    @property
    def apart(self) -> list[str]:
        """What training left in an adapter, beside the weights."""
        return list(self.healing.get("apart", ()))

    def healing_rows(self) -> Rows:
        """Pruned beside healed, ready for a table: (what, pruned, healed)."""
        did, apart = self.healing, self.apart
        first, before = label(did["before"]), str(Figure.of(did["before"]))
        within = [name for item in did["recipe"]["train"] for name in item if name not in apart]
        rows = [(first, before, self.healed), *_more(did["before"], did["after"])]
        if apart:
            rows += [
                (f"{first}, the weights alone", before, str(Figure.of(did["weights"]))),
                ("trained, in the adapter", "", ", ".join(apart)),
                ("trained, in the weights", "", ", ".join(within) or "nothing"),
            ]
        else:
            rows.append(("trained", "", ", ".join(within)))
        rows += [("parameters that trained", "", f"{did['trained']:.3%}"), trained_on(did)]
        if "best_step" in did:
            best = f"step {did['best_step']} of {did['steps']}" if did["best_step"] else "none: no step made it better"
            rows.append(("checkpoint that was kept", "", best))
        if taught := did.get("taught"):
            what, _, many = trained_on(taught)
            spent = f"{many} {what}, {taught['seconds']:.1f} s"
            rows.append(("the dense model trained first", "", spent))
        rows += [
            ("seconds to heal", "", f"{did['seconds']:.1f}"),
            ("peak memory", "", f"{did['peak_memory'] / 1e9:.2f} GB"),
        ]
        if did.get("processes", 1) > 1:
            how = "sharded" if did["sharded"] else "each with the whole model"
            rows.append(("processes", "", f"{did['processes']}, {how}"))
        return rows + _sample(did["before"], did["after"])

    @property
    def healed(self) -> str:
        """The figure after healing, in words."""
        before, after = Figure.of(self.healing["before"]), Figure.of(self.healing["after"])
        return after.beside(before) + (" with the adapter" if self.apart and after.value is not None else "")

    def outcome(self) -> Rows:
        """As `rows`, with what the directory holds now: after healing, if there was any."""
        did = self.healing
        if not did:
            return self.rows()
        rows = {what: (dense, pruned) for what, dense, pruned in self.rows()}
        (first, (dense, pruned)), last = next(iter(rows.items())), label(did["after"])
        measured = Figure.of(did["after"]).value is not None
        rows[first] = dense, f"{pruned} before healing" + ("" if measured else ", not measured since")
        if measured:  # maybe on other windows
            after = str(Figure.of(did["after"])) + (" with the adapter" if self.apart else "")
            rows[last] = rows.get(last, ("", ""))[0], f"{after}, healed ({Figure.of(did['before'])} before)"
            rows |= {what: (one, other) for what, one, other in _more(self.dense, did["after"])}
        rows.pop(SAMPLE, None)
        return [(what, *both) for what, both in rows.items()] + _sample(self.dense, did["after"])

    def notes(self) -> list[str]:
        """What happened to single layers that a user should know."""
        unknown = [f"{item.name}: stays dense; {item.why}" for item in self.left_out if item.why == UNSEEN]
        unknown += [
            f"batch norm {name}: {why}; stays as it is" for name, why in self.batch_norm.get("kept", {}).items()
        ]
        return unknown + [f"{la.name}: {note}" for la in self.layers for note in la.notes]

    def calibration(self) -> tuple[str, str]:
        """On what it was calibrated, in words, and where that came from; "" for samples that were handed over."""
        said = self.recipe["calibration"]
        length = f" of {said['length']} tokens" if said.get("length") else ""  # else they are of several
        what = f"windows{length}" if "text" in self.recipe.get("task", ["text"]) else "samples"
        return f"{said['samples']} {what}", "" if self.run.get("handed_over") else Path(said["source"]).name

    def card(self) -> str:
        """A model card that says what was done."""
        steps = " + ".join(name for step in self.recipe["steps"] for name in step)
        base = self.model["name"]
        made_by = self.model.get("library", "transformers")
        library = f"library_name: {made_by}\n" if made_by in ("transformers", "timm") else ""
        front = f"base_model: {base}\n" if "/" in base and not Path(base).exists() else ""
        task = next(iter(self.recipe.get("task", ["text"])))
        text = "which reads no text" if task == "text" else "which looks at no samples"
        if any(layer.tokens for layer in self.layers):
            what, source = self.calibration()
            what = what.replace(" of ", " of\n")
            text = f"calibrated on {what} " + (f"of `{source}`" if source else "that were handed over")
        format_, masks = self.recipe.get("format", "dense"), "The masks are in `prunella.masks` (bit-packed)"
        loader = "`AutoModelForCausalLM.from_pretrained`" if task == "text" else _LOADERS.get(made_by, _LOADERS[""])
        loader = loader.format(self.model["class"])
        if format_ == "packed":
            loader = loader if made_by == "transformers" else _LOADERS[""]
            load = f"{loader} loads it where Prunella is installed. Its zeros are not stored"
        elif format_ != "dense":
            load = f"Its weights are in the format `{Path(format_).name}`"
        else:
            load = f"Load it with {loader}. {masks}"
        return f"""---
{library}tags:
- prunella
- pruned
{front}---

# {Path(base).name or base}, pruned

{self.sparsity:.1%} of the block weights of `{Path(base).name or base}` are zero: pruned in one shot with
`{steps}` (pattern `{self.recipe["pattern"]}`), {text}.

{_markdown("dense", "pruned", self.rows())}
{self._healed_card()}
{load}, and `prunella.json` holds the
recipe, the versions and what happened to every layer. The license is that of the original model.
"""


_LOADERS = {  # what opens a directory, by the library that a network's class comes from
    "transformers": "`transformers.{}.from_pretrained`",
    "timm": '`timm.create_model("local-dir:DIRECTORY", pretrained=True)`',
    "": "`prunella.open_model`",
}


def anatomy(model: Model) -> dict[str, Any]:
    """What a report says of a network beside its class: the library that this comes from, its blocks, and the matrices
    that are in none of them (stem, head, embeddings), {name: how many weights}."""
    library = type(model.network).__module__.partition(".")[0]
    matrices = {name: p for name, p in model.network.named_parameters() if p.ndim > 1}
    outside = {name: p for name, p in matrices.items() if model.block_of(name) is None}
    own = {name: p.numel() for name, p in outside.items() if model.tied.get(name) not in outside}
    return {"library": library, "blocks": list(model.blocks), "outside": own}


def buffer_bytes(model: Model) -> int:
    """Of what a network that is no language model stores beside parameters: statistics of batch norms, say."""
    named = {} if model.task.language else model.network.state_dict(keep_vars=True)
    return sum(tensor.nbytes for tensor in named.values() if not isinstance(tensor, nn.Parameter))


def seen(directory: str | Path) -> str:
    """The fingerprint of all text that went into the model in a directory; empty where nothing is known."""
    try:
        return Report.read(directory).seen
    except ModelError:
        return ""


def _sample(before: Mapping[str, Any], after: Mapping[str, Any]) -> Rows:
    return [(SAMPLE, before["sample"], after["sample"])] if before.get("sample") and after.get("sample") else []


def numbers(rows: Rows) -> Rows:
    """The rows of a table without those that show a sample of text."""
    return [row for row in rows if row[0] != SAMPLE]


def _markdown(before: str, after: str, rows: Rows) -> str:
    head = (f"| | {before} | {after} |", "| --- | --- | --- |")
    return "\n".join((*head, *(f"| {a} | {b} | {c} |" for a, b, c in numbers(rows))))


def trained_on(did: Mapping[str, Any]) -> tuple[str, str, str]:
    """How much a healing trained on, as a row of a table: what it is counted in, nothing, how many."""
    what = "tokens" if "tokens" in did else "samples"
    return what, "", f"{did[what]:,}"


def _measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> Rows:
    """The figure before and after, and what was measured beside it."""
    one, other = Figure.of(before), Figure.of(after)
    return [(label(before), str(one), other.beside(one)), *_more(before, after)]


def _more(before: Mapping[str, Any], after: Mapping[str, Any]) -> Rows:
    one, other = more_of(before), more_of(after)
    return [(name, one.get(name, ""), other.get(name, "")) for name in dict.fromkeys((*one, *other))]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import safetensors
    import transformers

    return {
        "prunella": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def layer_table(layers: Sequence[LayerResult]) -> list[tuple[str, ...]]:
    """Rows for a table of layers: name, shape, sparsity, pattern, error, notes."""
    return [
        (
            la.name,
            f"{la.shape[0]}x{la.shape[1]}",
            f"{la.sparsity:.2%}",
            la.pattern if la.target else "dense",
            "" if la.error is None else f"{la.error:.4f}",
            "; ".join(la.notes),
        )
        for la in layers
    ]
