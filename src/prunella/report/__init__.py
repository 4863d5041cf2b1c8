"""What a run did, and how it is shown.

```
figure.py     how good a network is, in words
report.py     prunella.json, and tables of words and numbers made from it
charts.py     figures as SVG
page.py       one run as a page of HTML
compare.py    several runs side by side
results.py    a sweep: tables, plots, a page
```
"""

from .figure import Figure, bos_words
from .report import Report, anatomy, buffer_bytes, layer_table, peak_memory, seen, versions

__all__ = ["Figure", "Report", "anatomy", "bos_words", "buffer_bytes", "layer_table", "peak_memory", "seen", "versions"]
