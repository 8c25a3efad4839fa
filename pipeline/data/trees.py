"""OpenAssistant's flat files: one message a record, each naming its parent, as the best conversation of each tree.

The best one follows, from the first message on, the answer with the lowest rank. All messages of a file are held in
memory at once: those of a tree may stand anywhere in it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.readers import Unreadable


def best_paths(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(source, {path, left_out}) for each tree: the messages of one conversation, and how many are not in it.

    A message that no first message leads to is an `Unreadable`: none is left out silently.
    """
    messages: list[tuple[str, dict[str, Any]]] = []
    children: dict[str, list[int]] = defaultdict(list)
    for source, record in records:
        if not isinstance(record, dict):
            yield source, record
            continue
        children[str(record.get("parent_id") or "")].append(len(messages))
        messages.append((source, record))
    reached: set[int] = set()
    for root in children.pop("", []):
        tree: set[int] = set()
        todo = [root]
        while todo:
            number = todo.pop()
            if number not in tree:
                tree.add(number)
                todo += children[str(messages[number][1].get("message_id"))]
        reached |= tree
        path = _best(root, messages, children)
        yield messages[root][0], {"path": path, "left_out": len(tree) - len(path)}
    for number, (source, record) in enumerate(messages):
        if number not in reached:
            text = json.dumps(record, ensure_ascii=False, default=str)
            yield source, Unreadable("answers a message that is not in the file", text)


def _best(
    root: int, messages: list[tuple[str, dict[str, Any]]], children: dict[str, list[int]]
) -> list[dict[str, Any]]:
    path: list[dict[str, Any]] = []
    seen: set[int] = set()
    answers = [root]
    while usable := [number for number in answers if number not in seen and _is_usable(messages[number][1])]:
        best = min(usable, key=lambda number: (_rank(messages[number][1]), number))
        seen.add(best)
        path.append(messages[best][1])
        answers = children[str(path[-1].get("message_id"))]
    return path


def _is_usable(message: dict[str, Any]) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")
