"""Where bases and adapters come from: folders, the catalogue, the Hugging Face hub, and URLs.

Nothing is downloaded unless the operator configured its source. Inference requests never get here.
"""

from server.sources.adapters import Sources
from server.sources.models import Resolved, resolve_model

__all__ = ["Resolved", "Sources", "resolve_model"]
