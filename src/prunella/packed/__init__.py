"""Packed networks: how they are opened, and made ready to run.

```
quantizer.py   how transformers loads and saves them
opening.py     those of timm and modules of one's own
```
"""
