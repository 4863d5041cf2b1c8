"""Prune with llm-compressor; run by prune.py in an environment of its own.

_llmcompressor_worker.py MODEL_DIR TOKENS.npy STEP OUT
"""

import sys

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

directory, tokens, step, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
windows = torch.from_numpy(np.load(tokens))
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[step](
    sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
)
oneshot(
    model=model,
    dataset=DataLoader(rows, batch_size=1),
    recipe=modifier,
    max_seq_length=windows.shape[1],
    num_calibration_samples=len(windows),
    pipeline="sequential",
)
model.save_pretrained(out, save_compressed=False)
