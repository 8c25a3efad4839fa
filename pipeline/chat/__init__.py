"""Conversations as a model reads them: templates, tokens, labels and the contract that holds them together.

It knows nothing of files and formats: `pipeline.data` imports it, it never imports `pipeline.data`.
"""

from typing import Any

Message = dict[str, Any]  # one turn: role, content and what `data.messages` describes
