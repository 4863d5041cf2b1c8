"""Sparse weights: how they are stored and multiplied.

```
format.py      pack and unpack one weight; the checks that every packed tensor passes
arguments.py   its parts as the kernels take them
kernels.py     the products as torch operators: C where it was compiled, else plain torch
gpu.py         the same products in Triton, for GPUs
striped.py     weights for many positions; coded.py: machine code for them; measured.py: which way is the fastest
steps.py       the steps of a plan: what a network does between its products, too
linear.py      the modules that hold packed weights
conv.py        convolutions: those in one and two dimensions run packed, the others are expanded when loaded
rounded.py     embeddings and heads in 8 bits, nothing left out
semi.py        2:4 weights on sparse tensor cores
block.py       one token through whole blocks in C; placed.py knows where their weights lie, cache.py has the room
checkpoint.py  their files, read as those of a plain model
bench.py       how fast it is
csrc/          the source of the compiled kernels, which native.py finds
```
"""
