"""OpenAssistant's flat files: one message a record, each naming its parent, as the best conversation of each tree.

The best one follows, from the first message on, the answer with the lowest rank. All messages of a file are held in
memory at once: those of a tree may stand anywhere in it.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.containers import BLOCK_ROWS, Block, records_of
from pipeline.data.json_text import Unreadable

KEYS = frozenset(("message_id", "parent_id", "text", "role", "message_tree_id"))
READ = KEYS | {"rank", "deleted", "review_result"}


def best_paths(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks of records {path, left_out}: the messages of one conversation, and how many of its tree are not in it.

    A message that no first message leads to is an `Unreadable`: none is left out without a word.
    """
    messages: list[tuple[str, Any]] = []
    first: Block | None = None
    for block in blocks:
        first = first or block
        messages += [(source.removeprefix(f"{block.name}:"), record) for source, record in records_of(block)]
    if first is None:
        return
    records = list(_conversations(messages))
    for start in range(0, len(records), BLOCK_ROWS):
        yield Block(first.path, first.name, start, records=records[start : start + BLOCK_ROWS], position=first.position)


def _conversations(messages: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    children: dict[Any, list[int]] = {}
    for number, (_, record) in enumerate(messages):
        if isinstance(record, dict):
            children.setdefault(str(record.get("parent_id") or ""), []).append(number)
    reached: set[int] = set()
    for number, (place, record) in enumerate(messages):
        if not isinstance(record, dict):
            yield place, record
        elif not record.get("parent_id"):
            tree, todo = {number}, [number]
            while todo:
                of = str(messages[todo.pop()][1].get("message_id"))
                new = [child for child in children.get(of, ()) if child not in tree]
                tree.update(new)
                todo += new
            reached |= tree
            path = _best(number, messages, children)
            yield place, {"path": path, "left_out": len(tree) - len(path)}
    for number, (place, record) in enumerate(messages):
        if isinstance(record, dict) and number not in reached:
            text = json.dumps(record, ensure_ascii=False, default=str)
            yield place, Unreadable("answers a message that is not in the file", text)


def _best(root: int, messages: list[tuple[str, Any]], children: dict[Any, list[int]]) -> list[dict[str, Any]]:
    path: list[dict[str, Any]] = []
    usable, seen = [root], set()
    while usable := [
        child
        for child in usable
        if not messages[child][1].get("deleted") and messages[child][1].get("review_result") is not False
    ]:
        best = min(usable, key=lambda child: (_rank(messages[child][1]), child))
        if best in seen:
            break
        seen.add(best)
        path.append(messages[best][1])
        usable = children.get(str(path[-1].get("message_id")), [])
    return path


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")
