"""Sparse weights: how they are stored and multiplied.

```
format.py      pack and unpack one weight; the checks that every packed tensor passes
kernels.py     the products as torch operators: C where it was compiled, else plain torch
gpu.py         the same products in Triton, for GPUs
semi.py        2:4 weights on sparse tensor cores
linear.py      the modules that hold packed weights
quantizer.py   how transformers loads and saves them
commands.py    whole models: pack, unpack, bench
csrc/          the source of the compiled kernels, which native.py finds
```
"""

from prunella_hook import register as _register

_register()  # it has been, where torch calls what is installed beside it
