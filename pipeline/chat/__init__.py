"""Conversations as a model reads them: chat templates, tokens, labels (which tokens are trained) and their contract.

It may import core and params.
"""

from typing import Any

Message = dict[str, Any]  # one turn: role, content and the other fields that `data.messages` describes
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # Qwen and DeepSeek; OpenRouter; gpt-oss


def alternating(*contents: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
