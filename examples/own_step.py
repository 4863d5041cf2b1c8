"""A method of your own, on a model that is already in memory.

python examples/own_step.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import prunella
from prunella import Layer, keep, register


@register("spread", needs={"moments"})
def spread(layer: Layer, *, power: float = 0.5) -> Layer:
    """Prune the smallest |w| times the spread of its input: a constant input can go into a bias."""
    score_OI = layer.weight_OI.float().abs() * layer.stats.variance_I**power
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern, group="row"))


name = prunella.find_directory(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
network = AutoModelForCausalLM.from_pretrained(name)
report = prunella.prune(
    network,
    {"steps": [{"spread": {"power": 0.5}}], "pattern": "2:4", "calibration": {"samples": 8, "length": 64}},
    tokenizer=AutoTokenizer.from_pretrained(name),
)
print(f"{report.sparsity:.1%} of the block weights are zero;", *report.rows()[0])
worst = max(report.layers, key=lambda layer: layer.error or 0)
print(f"the layer that lost most is {worst.name}: {worst.error:.3f} of its output")
