"""Converts the turns of every chat format to messages of one shape.

A message has a role (system, user, assistant, tool) and content (text). An assistant message may also have
reasoning_content (text), tool_calls (OpenAI's shape, with arguments as an object) and weight 0 (not trained); a tool
message may have name and tool_call_id. A turn that cannot be converted raises a ValueError.
"""

import re
from typing import Any

from pipeline.chat import REASONING_KEYS, Message, alternating
from pipeline.data.records import check_text, parse_json, shorten, to_json

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system",
    "human": "user",  # ShareGPT
    "prompter": "user",  # OpenAssistant
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
}
TRAINED_FLAGS = ("weight", "train", "loss_weight")  # OpenAI, axolotl, LLaMA-Factory: whether a turn is trained
TURN_KEYS = frozenset(("role", "content", "tool_calls", "function_call", *REASONING_KEYS, *TRAINED_FLAGS))
# A dialogue in one text, as in multi-turn rows of BELLE, Anthropic and Guanaco.
SPEAKER = re.compile("(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[:\uff1a]")
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(?:(?:[ \t]*\r?\n)+|[ \t]*)", re.DOTALL)
# The generation prompts of DeepSeek R1 and others open the thinking, so recorded answers only close it.
CLOSED_THOUGHTS = re.compile(r"((?:(?!<think>).)*?\n)</think>[ \t]*(?:\r?\n[ \t]*)*\n", re.DOTALL)
MIDDLE_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def chat_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """Messages from OpenAI's; keys with a value that are not read, such as `messages[].id`, are added to `unused`."""
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has role {shorten(role)}; expected one of {', '.join(ROLES)}")
        content, thoughts = turn.get("content"), ""
        if isinstance(content, list):
            content, thoughts = _join_parts(content)
        calls = turn.get("tool_calls")
        if calls is None and turn.get("function_call"):
            calls = [turn["function_call"]]
        text = "" if content is None and calls else check_text(content, "content", required=not calls)
        message: Message = {"role": ROLES[role], "content": text}
        _add_reasoning(message, turn, thoughts, key, unused)
        if calls:
            if not isinstance(calls, list) or message["role"] != "assistant":
                raise ValueError("tool_calls is not a list in an assistant message")
            message["tool_calls"] = [tool_call(call) for call in calls]
        for name in ("name", "tool_call_id") if message["role"] == "tool" else ():
            if turn.get(name) is not None:
                message[name] = check_text(turn[name], name).strip()
        _add_weight(message, turn)
        unused.update(f"{key}[].{name}" for name in turn.keys() - TURN_KEYS if turn[name] and name not in message)
        messages.append(message)
    return messages


def sharegpt_messages(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    """Messages from ShareGPT's turns; each function call becomes a message of its own, see `join_turns`."""
    renamed_turns = []
    for turn in turns:
        if isinstance(turn, dict):
            openai_keys = ("role", "content", "tool_calls", "function_call")
            unused.update(f"{key}[].{name}" for name in openai_keys if name in turn)
            message = {name: turn[name] for name in turn.keys() - {"from", "value", *openai_keys}}
            value = turn.get("value")
            if turn.get("from") == "function_call":
                calls = value if isinstance(value, dict | list) else parse_json(value, "function_call")
                calls = calls if isinstance(calls, list) else [calls]
                turn = message | {"role": "assistant", "content": None, "tool_calls": calls}
            else:
                turn = message | {"role": turn.get("from"), "content": value}
        renamed_turns.append(turn)
    return chat_messages(renamed_turns, key, unused)


def is_dialogue(text: Any) -> bool:
    """Whether `text` is a whole conversation: it starts with `Human:` and a later line starts with `Assistant:`."""
    speakers = SPEAKER.findall(text.strip()) if isinstance(text, str) and SPEAKER.match(text.strip()) else []
    return speakers[:1] == ["Human"] and "Assistant" in speakers


def dialogue(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation in one text. With `open_end`, it must end with an empty `Assistant:`, left out."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} contains a conversation in which Human: and Assistant: do not alternate")
    if open_end and (speakers[-1] != "Assistant" or contents[-1]):
        raise ValueError(f"{key} contains a conversation (Human:/Assistant:) that does not end with Assistant:")
    return alternating(*(check_text(content, key) for content in (contents[:-1] if open_end else contents)))


def join_turns(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Join consecutive turns of one role, as templates and servers expect; returns messages and repairs."""
    joined: list[Message] = []
    repairs: dict[str, None] = {}
    for message in messages:
        last: Message = joined[-1] if joined else {"role": None}
        if last["role"] != message["role"] or message["role"] == "tool":  # each tool result answers its own call
            joined.append(message)
            continue
        weights_differ = last.get("weight") != message.get("weight")
        answer_after_call = last.get("tool_calls") and message["content"]
        if weights_differ or answer_after_call or "reasoning_content" in message:
            raise ValueError(
                "has two assistant turns in a row that cannot be joined: an answer after a tool call, reasoning in "
                "the second turn, or only one of them is trained"
            )
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        texts = [text for text in (last["content"], message["content"]) if text]
        joined[-1] = last | {"content": "\n\n".join(texts)} | ({"tool_calls": calls} if calls else {})
        if texts:  # turns with calls only are the parallel calls of one turn, so joining them is not a repair
            repairs[f"consecutive {message['role']} turns joined"] = None
    return joined, [*repairs]


def split_thoughts(message: Message) -> None:
    """Move `<think>…</think>` at the start of an assistant message to its reasoning_content."""
    content = message["content"]
    match = THOUGHTS.match(content) or CLOSED_THOUGHTS.match(content)
    if match is None and content.lstrip().startswith("<think>"):
        raise ValueError("has <think> without </think> before its answer")
    if match is not None:
        if "reasoning_content" in message:
            raise ValueError("has reasoning twice: as <think> in its content and under a key of its own")
        content = check_text(content[match.end() :], "content after </think>", required="tool_calls" not in message)
        message |= {"content": content} | ({"reasoning_content": match[1].strip()} if match[1].strip() else {})
    if MIDDLE_THOUGHTS.search(content):
        raise ValueError("has <think>…</think> in the middle of an answer; expected it before the answer")


def tool_call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, but with arguments as an object (many files have them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {shorten(function['name'])} are a {type(arguments).__name__}, not an object")
    to_json(arguments, "arguments")
    name = check_text(function["name"], "name").strip()
    call_id = {} if call.get("id") is None else {"id": check_text(call["id"], "id").strip()}
    return call_id | {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools_json(tools: Any) -> str | None:
    """Tool schemas as JSON in OpenAI's shape, which chat templates expect; bare function schemas are wrapped."""
    tools = (parse_json(tools, "tools") if isinstance(tools, str) else tools) or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools is not a list of objects")
    return to_json([tool if "function" in tool else {"type": "function", "function": tool} for tool in tools], "tools")


def _join_parts(parts: list[Any]) -> tuple[str, str]:
    """(content, reasoning) of a list of parts; the text is under `text` (OpenAI) or `value` (LLaMA-Factory)."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text", "reasoning", "thinking"):
            raise ValueError(f"content has a part of type {shorten(kind)}; only text can be trained on")
        text = next((part[name] for name in ("text", "value", "content", kind) if part.get(name) is not None), None)
        if not isinstance(text, str):
            raise ValueError(f"content has a part of type {shorten(kind)} without text; expected a key text or value")
        (thoughts if kind in ("reasoning", "thinking") else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _add_reasoning(message: Message, turn: dict[str, Any], thoughts: str, key: str, unused: set[str]) -> None:
    names = [name for name in REASONING_KEYS if turn.get(name)]
    if message["role"] != "assistant":
        if thoughts:
            raise ValueError(f"has reasoning in a turn of role {message['role']}")
        unused.update(f"{key}[].{name}" for name in names)
        return
    texts = {text for name in names if (text := check_text(turn[name], name, required=False))}
    texts |= {thoughts} if thoughts.strip() else set()
    if len(texts) > 1:
        raise ValueError(f"has two different texts of reasoning in one turn ({', '.join(REASONING_KEYS)}, parts)")
    if texts:
        message["reasoning_content"] = check_text(texts.pop(), "reasoning")


def _add_weight(message: Message, turn: dict[str, Any]) -> None:
    """Set weight 0 if a flag says that the turn is not trained; an assistant turn without a flag is trained."""
    flags = {key: turn[key] for key in TRAINED_FLAGS if turn.get(key) is not None}
    invalid = any(not isinstance(value, int | float) or value not in (0, 1) for value in flags.values())
    contradictory = len(set(map(bool, flags.values()))) > 1
    trained_input = message["role"] != "assistant" and any(flags.values())
    if invalid or contradictory or trained_input:
        values = ", ".join(f"{key} {shorten(value)}" for key, value in flags.items())
        raise ValueError(f"a turn of role {message['role']} has {values}; expected 0 (not trained), or 1 in an answer")
    if message["role"] == "assistant" and flags and not any(flags.values()):
        message["weight"] = 0
