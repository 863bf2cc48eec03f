"""LSTM and GRU language models, with an external memory where asked, as transformers models; see docs/recurrent.md.

The classes are in `configuration_recurrent` and `modeling_recurrent`, which load transformers.
"""

from hybrid.models.recurrent.make import new
from hybrid.models.recurrent.registration import after_import

__all__ = ["after_import", "new"]
