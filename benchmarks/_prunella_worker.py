"""Prune with Prunella; run by prune.py so that a whole process is measured.

_prunella_worker.py MODEL_DIR TOKENS.npy STEP OUT ORDER
"""

import sys

import numpy as np
import torch

import prunella

directory, tokens, step, out, order = sys.argv[1:]
prunella.prune(
    directory,
    {"steps": [step], "sparsity": 0.5, "order": order, "dtype": "bfloat16", "evaluate": {"source": None}},
    output=out,
    calibration=torch.from_numpy(np.load(tokens)),
)
