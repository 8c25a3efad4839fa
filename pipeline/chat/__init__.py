"""Conversations as a model reads them: templates, tokens, labels and the contract that holds them together.

It knows core and params.
"""

from typing import Any

Message = dict[str, Any]  # one turn: role, content and what `data.messages` describes
