"""``convert``, ``revert`` and ``fusion_report``: a network with bnfused's batch norms, fused with what follows them.

``model.py`` says which modules are swapped and which are given another forward; ``forwards.py`` has these forwards.
A forward in Python is rewritten (``source.py``, ``rewriting.py``) so that it calls the helpers of ``pending.py``, which
decide at each call, by the facts of that moment (``facts.py``). ``report.py`` says what they would decide, and
``preview.py`` finds that out without running anything.
"""

import sys

from bnfused.conversion import forwards
from bnfused.conversion.model import convert, revert
from bnfused.conversion.report import FusionEntry, FusionReport, fusion_report

__all__ = ["FusionEntry", "FusionReport", "convert", "fusion_report", "revert"]

# Where models that were pickled by bnfused 0.1.0 look for the classes of their forwards.
sys.modules["bnfused.fusion"] = sys.modules["bnfused.blocks"] = forwards
