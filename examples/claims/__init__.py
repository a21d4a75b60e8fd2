"""What is claimed of residual networks, each claim in a module of its own: measured, judged, drawn.

A module has

- ``TITLE``, the claim in a few words;
- ``QUICK`` and ``FULL``, its settings;
- ``steps(settings)``, how often ``measure`` moves its progress bar;
- ``measure(settings, seed, device, bar)``, the numbers: the same ones for the same seed, but for times;
- ``rows(found)``, these numbers as a table, headings first;
- ``verdicts(found)``, what the claim predicts of them, and whether it is so;
- ``draw(found, path)``, the plot.
"""

from typing import NamedTuple


class Verdict(NamedTuple):
    """A sentence about what was measured, and whether it is true."""

    sentence: str
    holds: bool
