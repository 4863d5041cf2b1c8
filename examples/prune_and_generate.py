"""Prune a model, look at what it cost, and let it write.

python examples/prune_and_generate.py [MODEL] [OUT]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import prunella

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
out = sys.argv[2] if len(sys.argv) > 2 else "pruned"

report = prunella.prune(
    model,
    {"steps": ["wanda", "sparsegpt"], "sparsity": 0.5, "calibration": {"samples": 8, "length": 64}},
    output=out,
)
for what, dense, pruned in report.rows():
    print(f"{what:50} {dense:>24} {pruned:>24}")

# The result is an ordinary transformers model: nothing of Prunella is needed to use it.
network = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
prompt = tokenizer("A garden is", return_tensors="pt")
print(tokenizer.decode(network.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))
