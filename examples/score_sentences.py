"""Score the sentences of a file, one a line, by an encoder as it is and by the same one pruned and packed: how long
each takes, and how many answers agree. A classifier says the class of each sentence, any other encoder (the built-in
one) which of the others is nearest to it.

python examples/score_sentences.py FILE [MODEL] [OUT]
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

import prunella
from prunella.bench.turns import in_turns
from prunella.packing import pack_model
from prunella.tasks.labels import labels_of

sentences = [line.strip() for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
name = sys.argv[2] if len(sys.argv) > 2 else "minilm-l6"
out = Path(sys.argv[3] if len(sys.argv) > 3 else "pruned-encoder")
BATCH = 16

# SparseGPT, and the zeros left out. Texts of yours are better to calibrate on than Python's documentation.
recipe = {"steps": ["sparsegpt"], "sparsity": 0.7, "calibration": {"samples": 64}, "evaluate": {"source": None}}
prunella.prune(name, recipe, output=out / "pruned")
pack_model(str(out / "pruned"), out / "packed")
packed = prunella.load_packed(out / "packed")

model = prunella.open_model(name, device="cpu")
order = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))  # those of a batch are of one length
batches = [
    model.tokenizer(
        [sentences[number] for number in order[start : start + BATCH]],
        padding=True,
        truncation=True,
        max_length=model.task.longest(model),
        return_tensors="pt",
    )
    for start in range(0, len(order), BATCH)
]


@torch.inference_mode()
def scores(network):
    """A row for each sentence: the probability of each class, or its cosine with each other sentence."""
    rows = []
    for batch in batches:
        found = network(**batch)
        if model.task.name == "classify":
            rows.append(found.logits.softmax(1))
        else:  # the mean of its tokens' states, without those that fill up
            seen_BL1 = batch["attention_mask"][:, :, None]
            rows.append(normalize((found.last_hidden_state * seen_BL1).sum(1) / seen_BL1.sum(1)))
    row_of = torch.cat(rows)[torch.tensor(order).argsort()]
    return row_of if model.task.name == "classify" else (row_of @ row_of.T).fill_diagonal_(-1)


with model.whole() as dense:
    answers, theirs = scores(packed), scores(dense)
    times = in_turns({"dense": lambda: scores(dense), "packed": lambda: scores(packed)}, rounds=3, seconds=0.0)

for sentence, score, before in zip(sentences, answers, theirs, strict=True):
    best, was = int(score.argmax()), int(before.argmax())
    said = [labels_of(packed).name(n) if model.task.name == "classify" else repr(sentences[n]) for n in (best, was)]
    print(f"{sentence}\n    {float(score[best]):.2f} {said[0]}{'' if best == was else f' (dense: {said[1]})'}")
agree = float((answers.argmax(1) == theirs.argmax(1)).double().mean())
milliseconds = {side: 1e3 * found.quantile(0.5) / len(sentences) for side, found in times.items()}
print(
    f"{len(sentences)} sentences: {agree:.0%} of the answers agree; dense {milliseconds['dense']:.1f} ms a sentence,"
    f" packed {milliseconds['packed']:.1f} ({milliseconds['dense'] / milliseconds['packed']:.2f} times as fast)"
)
