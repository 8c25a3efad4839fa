"""The turns of a conversation in one form, whatever a file calls their parts.

A message has role (system, user, assistant, tool) and content (text); an assistant's may have reasoning_content (text),
tool_calls (OpenAI's shape, arguments an object) and weight 0 (not trained), a tool's name and tool_call_id. What cannot
be a turn is a ValueError that continues the sentence "a row …".
"""

import re
from itertools import pairwise
from typing import Any

from pipeline.chat import Message
from pipeline.data.records import checked, parse_json, short, to_json

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system",
    "human": "user",  # ShareGPT's
    "prompter": "user",  # OpenAssistant's
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # of Qwen and DeepSeek; of OpenRouter; of gpt-oss
FLAGS = ("weight", "train", "loss_weight")  # of OpenAI, axolotl and LLaMA-Factory: whether a turn is trained
TURN_KEYS = frozenset(("role", "content", "tool_calls", "function_call", *REASONING, *FLAGS))
# A dialogue in one text, as BELLE's multi-turn rows, Anthropic's and Guanaco's have it.
SPEAKER = re.compile("(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[:\uff1a]")
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(?:(?:[ \t]*\r?\n)+|[ \t]*)", re.DOTALL)
# The generation prompts of DeepSeek R1 and others open the thinking, so that recorded answers only close it.
CLOSED_THOUGHTS = re.compile(r"((?:(?!<think>).)*?\n)</think>[ \t]*(?:\r?\n[ \t]*)*\n", re.DOTALL)
MIDDLE_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def chat_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """OpenAI's messages; `unused` takes up the keys that say something and are not read, such as `messages[].id`."""
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has role {short(role)}; expected one of {', '.join(ROLES)}")
        content, thoughts = turn.get("content"), ""
        if isinstance(content, list):
            content, thoughts = _join_parts(content)
        calls = turn.get("tool_calls")
        if calls is None and turn.get("function_call"):
            calls = [turn["function_call"]]
        text = "" if content is None and calls else checked(content, "content", required=not calls)
        message: Message = {"role": ROLES[role], "content": text}
        _add_reasoning(message, turn, thoughts, key, unused)
        if calls:
            if not isinstance(calls, list) or message["role"] != "assistant":
                raise ValueError("tool_calls is not a list in an assistant's message")
            message["tool_calls"] = [tool_call(call) for call in calls]
        for name in ("name", "tool_call_id") if message["role"] == "tool" else ():
            if turn.get(name) is not None:
                message[name] = checked(turn[name], name).strip()
        _add_weight(message, turn)
        unused.update(f"{key}[].{name}" for name in turn.keys() - TURN_KEYS if turn[name] and name not in message)
        messages.append(message)
    return messages


def sharegpt_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """ShareGPT's turns; `join_turns` makes one turn of function calls that follow each other."""
    translated = []
    for turn in turns:
        if isinstance(turn, dict):
            twice = ("role", "content", "tool_calls", "function_call")
            unused.update(f"{key}[].{name}" for name in twice if name in turn)
            message = {name: turn[name] for name in turn.keys() - {"from", "value", *twice}}
            value = turn.get("value")
            if turn.get("from") == "function_call":
                calls = value if isinstance(value, dict | list) else parse_json(value, "function_call")
                calls = calls if isinstance(calls, list) else [calls]
                turn = message | {"role": "assistant", "content": None, "tool_calls": calls}
            else:
                turn = message | {"role": turn.get("from"), "content": value}
        translated.append(turn)
    return chat_messages(translated, key, unused)


def alternating(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def is_dialogue(text: Any) -> bool:
    """Whether `text` is a conversation written out: it begins with `Human:` and has an `Assistant:` of its own line."""
    if not isinstance(text, str) or "Assistant" not in text:
        return False
    first = SPEAKER.match(text.strip())
    return first is not None and first[1] == "Human" and "Assistant" in SPEAKER.findall(text.strip())


def dialogue(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation written out; with `open_end` its last `Assistant:` is left open and not returned."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} holds a conversation whose turns do not alternate between Human: and Assistant:")
    if open_end and (speakers[-1] != "Assistant" or contents[-1]):
        raise ValueError(f"{key} holds a conversation (Human:/Assistant:) that does not end with Assistant:")
    return alternating([checked(content, key) for content in (contents[:-1] if open_end else contents)])


def join_turns(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Turns of one role that follow each other as one, which is what templates and servers expect, and what was joined.

    Results of tools stay apart: each answers a call of its own.
    """
    if all(one["role"] != two["role"] or one["role"] == "tool" for one, two in pairwise(messages)):
        return messages, []
    joined: list[Message] = []
    repairs: dict[str, None] = {}
    for message in messages:
        if not joined or joined[-1]["role"] != message["role"] or message["role"] == "tool":
            joined.append(message)
            continue
        last = joined[-1]
        unlike = last.get("weight") != message.get("weight") or "reasoning_content" in message
        if unlike or (last.get("tool_calls") and message["content"]):
            raise ValueError(
                "has two assistant turns in a row that are not one: an answer after a tool call, reasoning in the "
                "second, or one of them not trained"
            )
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        texts = [text for text in (last["content"], message["content"]) if text]
        joined[-1] = last | {"content": "\n\n".join(texts)} | ({"tool_calls": calls} if calls else {})
        if texts:  # calls alone that follow each other are the parallel calls of one turn
            repairs[f"consecutive {message['role']} turns joined"] = None
    return joined, [*repairs]


def split_thoughts(message: Message) -> None:
    """Take `<think>…</think>` at the beginning of an assistant's content out, as its reasoning_content."""
    content = message["content"]
    match = THOUGHTS.match(content) or CLOSED_THOUGHTS.match(content)
    if match is None and content.lstrip().startswith("<think>"):
        raise ValueError("has thoughts (<think>) that do not end before its answer")
    if match is not None and "reasoning_content" in message:
        raise ValueError("has its reasoning twice, in the content and beside it")
    answer = content
    if match is not None:
        answer = checked(content[match.end() :], "content after </think>", required="tool_calls" not in message)
    if MIDDLE_THOUGHTS.search(answer):
        raise ValueError("has thoughts (<think>…</think>) in the middle of an answer; expected them before it")
    message["content"] = answer
    if match is not None and (thoughts := match[1].strip()):
        message["reasoning_content"] = thoughts


def tool_call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, with its arguments as an object (many files have them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {short(function['name'])} are a {type(arguments).__name__}, not an object")
    to_json(arguments, "arguments")
    name = checked(function["name"], "name").strip()
    number = {} if call.get("id") is None else {"id": checked(call["id"], "id").strip()}
    return number | {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools_of(tools: Any) -> str | None:
    """The offer of tools in OpenAI's shape, which chat templates expect; bare schemas are wrapped."""
    tools = (parse_json(tools, "tools") if isinstance(tools, str) else tools) or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools is not a list of objects")
    return to_json([tool if "function" in tool else {"type": "function", "function": tool} for tool in tools], "tools")


def _join_parts(parts: list[Any]) -> tuple[str, str]:
    """(content, reasoning) of a list of parts; OpenAI's have `text`, LLaMA-Factory's `value`."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text", "reasoning", "thinking"):
            raise ValueError(f"content has a part of type {short(kind)}; only text can be trained on")
        text = next((part[name] for name in ("text", "value", "content", kind) if part.get(name) is not None), None)
        if not isinstance(text, str):
            raise ValueError(f"content has a part of type {short(kind)} without text; expected it as text or value")
        (thoughts if kind in ("reasoning", "thinking") else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _add_reasoning(message: Message, turn: dict[str, Any], thoughts: str, key: str, unused: set[str]) -> None:
    names = [name for name in REASONING if turn.get(name)]
    if message["role"] != "assistant":
        if thoughts:
            raise ValueError(f"has reasoning in a turn of role {message['role']}")
        unused.update(f"{key}[].{name}" for name in names)
        return
    texts = {text for name in names if (text := checked(turn[name], name, required=False))}
    texts |= {thoughts} if thoughts.strip() else set()
    if len(texts) > 1:
        raise ValueError(f"has two different texts of reasoning in one turn ({', '.join(REASONING)}, parts)")
    if texts:
        message["reasoning_content"] = checked(texts.pop(), "reasoning")


def _add_weight(message: Message, turn: dict[str, Any]) -> None:
    """Set weight 0 if a flag says that the turn is not trained; an assistant's turn without a flag is trained."""
    flags = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    said = ", ".join(f"{key} {short(value)}" for key, value in flags.items())
    if any(not isinstance(value, int | float) or value not in (0, 1) for value in flags.values()) or (
        len(set(map(bool, flags.values()))) > 1 or (message["role"] != "assistant" and any(flags.values()))
    ):
        raise ValueError(f"a turn of role {message['role']} has {said}; expected 0 (not trained), or 1 in an answer")
    if message["role"] == "assistant" and flags and not any(flags.values()):
        message["weight"] = 0
