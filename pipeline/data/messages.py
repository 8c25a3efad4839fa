"""The turns of a conversation in one form, whatever a file calls their parts.

A message has role (system, user, assistant, tool) and content (text); an assistant's may have reasoning_content (text),
tool_calls (OpenAI's shape, arguments an object) and weight 0 (not trained), a tool's name and tool_call_id. What cannot
be a turn is a ValueError that continues the sentence "a row …".
"""

import re
from itertools import pairwise
from typing import Any

from pipeline.chat import Message
from pipeline.data.values import checked, compact, parse_json, short

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # of Qwen and DeepSeek; of OpenRouter; of gpt-oss
FLAGS = ("weight", "train", "loss_weight")  # of OpenAI, axolotl and LLaMA-Factory: whether a turn is trained
TURN_KEYS = frozenset(("role", "content", "tool_calls", "function_call", *REASONING, *FLAGS))
SHAREGPT_KEYS = frozenset(("from", "value", *REASONING, *FLAGS))
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(?:(?:[ \t]*\r?\n)+|[ \t]*)", re.DOTALL)
# The generation prompts of DeepSeek R1 and others open the thinking, so that recorded answers only close it.
CLOSED_THOUGHTS = re.compile(r"((?:(?!<think>).)*?\n)</think>[ \t]*(?:\r?\n[ \t]*)*\n", re.DOTALL)
MIDDLE_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def chat_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """OpenAI's messages; text parts of a content are joined, any other part cannot be trained on here.

    Args:
        unused: takes up the names of the keys that say something and are not read, such as `messages[].id`.
    """
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has role {short(role)}; expected system, user, assistant or tool")
        content, thoughts = turn.get("content"), ""
        if isinstance(content, list):
            content, thoughts = _join_parts(content)
        message: Message = {"role": ROLES[role], "content": content}
        calls = turn.get("tool_calls")
        if calls is None and turn.get("function_call"):
            calls = [turn["function_call"]]
        message["content"] = "" if content is None and calls else checked(content, "content", required=not calls)
        _add_reasoning(message, turn, thoughts, key, unused)
        if calls:
            if not isinstance(calls, list) or message["role"] != "assistant":
                raise ValueError("tool_calls is not a list in an assistant's message")
            message["tool_calls"] = [tool_call(call) for call in calls]
        if message["role"] == "tool":
            for name in ("name", "tool_call_id"):
                if turn.get(name) is not None:
                    message[name] = checked(turn[name], name).strip()
        _add_weight(message, turn)
        if others := turn.keys() - TURN_KEYS:
            unused.update(f"{key}[].{name}" for name in others if turn[name] and name not in message)
        messages.append(message)
    return messages


def sharegpt_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """ShareGPT's turns; function calls that follow each other are the calls of one turn."""
    messages: list[Message] = []
    before = None
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise ValueError(f"a turn is from {short(speaker)}; expected one of {', '.join(SHAREGPT_ROLES)}")
        value = turn.get("value")
        message: Message = {"role": SHAREGPT_ROLES[speaker], "content": ""}
        if speaker == "function_call":
            calls = value if isinstance(value, dict | list) else parse_json(value, "function_call")
            message["tool_calls"] = [tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            if not message["tool_calls"]:
                raise ValueError("a function_call has no call")
        else:
            value, thoughts = _join_parts(value) if isinstance(value, list) else (value, "")
            message["content"] = checked(value, "value")
            _add_reasoning(message, turn, thoughts, key, unused)
        _add_weight(message, turn)
        if others := turn.keys() - SHAREGPT_KEYS:
            unused.update(f"{key}[].{name}" for name in others if turn[name])
        if speaker == before == "function_call" and message.get("weight") == messages[-1].get("weight"):
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
        before = speaker
    return messages


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
        if last.get("tool_calls") and message["content"]:
            raise ValueError("has an answer right after a tool call; expected the tool's result between them")
        if last.get("weight") != message.get("weight"):
            raise ValueError("has two assistant turns in a row of which one is not trained")
        if "reasoning_content" in message:
            raise ValueError("has reasoning in the second of two assistant turns in a row")
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        texts = [text for text in (last["content"], message["content"]) if text]
        joined[-1] = last | {"content": "\n\n".join(texts)} | ({"tool_calls": calls} if calls else {})
        repairs[f"consecutive {message['role']} turns joined"] = None
    return joined, [*repairs]


def split_thoughts(message: Message) -> None:
    """Take `<think>…</think>` at the beginning of an assistant's content out, as its reasoning_content."""
    content = message["content"]
    match = THOUGHTS.match(content) or CLOSED_THOUGHTS.match(content)
    if match is None:
        if content.lstrip().startswith("<think>"):
            raise ValueError("has thoughts (<think>) that do not end before its answer")
        if MIDDLE_THOUGHTS.search(content):
            raise ValueError("has thoughts (<think>…</think>) in the middle of an answer; expected them before it")
        return
    if "reasoning_content" in message:
        raise ValueError("has its reasoning twice, in the content and beside it")
    rest = checked(content[match.end() :], "content after </think>", required="tool_calls" not in message)
    if MIDDLE_THOUGHTS.search(rest):
        raise ValueError("has thoughts (<think>…</think>) in the middle of an answer; expected them before it")
    message["content"] = rest
    if thoughts := match[1].strip():
        message["reasoning_content"] = thoughts


def tool_call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, with its arguments as an object (many files have them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = parse_json(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {short(function['name'])} are a {type(arguments).__name__}, not an object")
    compact(arguments, "arguments")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": checked(function["name"], "name").strip(), "arguments": arguments},
    }
    return made if call.get("id") is None else {"id": checked(call["id"], "id").strip()} | made


def tools_of(record: dict[str, Any], unused: set[str]) -> str | None:
    """The offer of tools in OpenAI's shape, which chat templates expect; bare schemas are wrapped."""
    tools = record.get("tools") or record.get("functions") or None
    if record.get("tools") and record.get("functions"):
        unused.add("functions")
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools is not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return checked(compact(tools, "tools"), "tools")


def _join_parts(parts: list[Any]) -> tuple[str, str]:
    """(content, reasoning) of a list of parts; OpenAI's have `text`, LLaMA-Factory's `value`."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text", "reasoning", "thinking"):
            raise ValueError(f"content has a part of type {short(kind)}; only text can be trained on")
        names = ("text", "value", "content", kind)
        text = next((part[name] for name in names if part.get(name) is not None), None)
        if not isinstance(text, str):
            raise ValueError(f"content has a part of type {short(kind)} without text; expected it as text or value")
        (thoughts if kind in ("reasoning", "thinking") else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _add_reasoning(message: Message, turn: dict[str, Any], thoughts: str, key: str, unused: set[str]) -> None:
    given = {thoughts} if thoughts else set()
    for name in REASONING:
        if turn.get(name):
            if message["role"] != "assistant":
                unused.add(f"{key}[].{name}")
            elif text := checked(turn[name], name, required=False):
                given.add(text)
    if message["role"] != "assistant" and thoughts:
        raise ValueError(f"has reasoning in a turn of role {message['role']}")
    if len(given) > 1:
        raise ValueError(f"has two different texts of reasoning in one turn ({', '.join(REASONING)}, parts)")
    if given and (text := checked(given.pop(), "reasoning", required=False)):
        message["reasoning_content"] = text


def _add_weight(message: Message, turn: dict[str, Any]) -> None:
    """weight 0 where a turn says that it is not trained; an assistant's turn without a flag is."""
    given = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    if not given:
        return
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"a turn has {key} {short(value)}; expected 0 (not trained) or 1")
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"a turn has {', '.join(f'{key} {short(value)}' for key, value in given.items())}")
    key, value = next(iter(given.items()))
    if message["role"] != "assistant":
        if value:
            raise ValueError(f"a {message['role']} turn has {key} {short(value)}; only the assistant's can be trained")
    elif not value:
        message["weight"] = 0
