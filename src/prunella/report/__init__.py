"""What a run did, and how it is shown.

```
report.py     prunella.json, and tables of words and numbers made from it
charts.py     figures as SVG
page.py       one run as a page of HTML
compare.py    several runs side by side
results.py    a sweep: tables, plots, a page
```
"""

from .report import Report, bos_words, layer_table, peak_memory, seen, versions

__all__ = ["Report", "bos_words", "layer_table", "peak_memory", "seen", "versions"]
