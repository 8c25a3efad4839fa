"""Two-turn answers to open questions in, a judge's ratings and preferences with intervals out (Zheng et al. 2023).

Each answer is rated alone from 1 to 10; two systems are also shown together, in both orders, and a system wins only
where it wins in both. An answer that is empty or cut off is shown to no judge: it has the lowest rating and loses.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ruamel.yaml import YAML

from pipeline.scoring.generation import Answer
from pipeline.scoring.judge.endpoint import JudgeError
from pipeline.scoring.resampling import Groups, bootstrap

FOLDER = Path(__file__).parent
LOWEST, HIGHEST = 1.0, 10.0
MAX_UNREADABLE = 0.1  # a judge that gives more verdicts than this in another form does not understand its task
_RATING = re.compile(r"\[\[\s*(\d{1,2}(?:\.\d+)?)\s*\]\]")
_PREFERENCE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
COLUMNS = ("question", "language", "category", "system", "kind", "turn", "shown", "verdict", "reply")
_SCHEMA = pa.schema((name, pa.string()) for name in COLUMNS)
Complete = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Question:
    id: str
    language: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


@dataclass(frozen=True)
class Judged:
    summary: dict[str, Any]
    verdicts: pa.Table  # every reply, with COLUMNS; a verdict of null could not be read


def questions(languages: Sequence[str]) -> list[Question]:
    result = []
    for language in languages:
        for line in (FOLDER / f"questions.{language}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            reference = tuple(row["reference"]) if "reference" in row else None
            result.append(Question(row["id"], language, row["category"], tuple(row["turns"]), reference))
    return result


def signature(model: str, languages: Sequence[str]) -> str:
    """What two ratings must share to be compared."""
    texts = "".join((FOLDER / f"questions.{language}.jsonl").read_text(encoding="utf-8") for language in languages)
    wording = (FOLDER / "prompts.yaml").read_bytes()
    return (
        f"judge:{model}|prompts:{_prompts()['version']}-{sha256(wording).hexdigest()[:8]}"
        f"|questions:{'+'.join(languages)}-{sha256(texts.encode()).hexdigest()[:8]}"
    )


def answer_turns(
    open_questions: list[Question], generate: Callable[[list[list[dict[str, str]]]], list[Answer]]
) -> list[tuple[Answer, Answer]]:
    """Both answers to each question; the second turn sees the first answer, whatever it is."""
    opened = [[{"role": "user", "content": question.turns[0]}] for question in open_questions]
    first = generate(opened)
    followed = [
        [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": question.turns[1]}]
        for messages, answer, question in zip(opened, first, open_questions, strict=True)
    ]
    return list(zip(first, generate(followed), strict=True))


def judge(
    complete: Complete,
    open_questions: list[Question],
    answers: dict[str, list[tuple[Answer, Answer]]],
    max_concurrency: int,
    resamples: int,
    seed: int,
) -> Judged:
    """Ratings of each system, and of the first two systems the preferences.

    Raises:
        JudgeError: the judge cannot be asked, or more than `MAX_UNREADABLE` of its verdicts cannot be read.
    """
    jobs = [
        job
        for i, question in enumerate(open_questions)
        for job in (
            *(_rating_job(question, system, turn, answers[system][i]) for system in answers for turn in (0, 1)),
            *_preference_jobs(question, {system: answers[system][i] for system in list(answers)[:2]}),
        )
    ]
    sent = [job for job in jobs if job["messages"] is not None]
    for job in sent[:1]:  # alone: a wrong key or address shows before a hundred requests are on their way
        job["reply"] = complete(job["messages"])
    with ThreadPoolExecutor(max_concurrency) as pool:
        for job, reply in zip(sent[1:], pool.map(lambda job: complete(job["messages"]), sent[1:]), strict=True):
            job["reply"] = reply
    for job in sent:
        job["verdict"] = _rating(job["reply"]) if job["kind"] == "rating" else _winner(job["reply"], job["shown"])
    unreadable = sum(job["verdict"] is None for job in sent)
    if unreadable > MAX_UNREADABLE * len(sent):
        one = next(job["reply"] for job in sent if job["verdict"] is None)
        raise JudgeError(
            f"{unreadable} of the judge's {len(sent)} verdicts have not the form that was asked for, for example: "
            f"{one[-200:]!r}. Take a stronger judge, or raise evaluate.judge.max_tokens if its replies are cut off"
        )
    verdicts = pa.Table.from_pylist([{name: _text(job[name]) for name in COLUMNS} for job in jobs], _SCHEMA)
    summary: dict[str, Any] = {"questions": len(open_questions), "replies": len(sent), "unreadable": unreadable}
    for system in answers:
        ratings = [job for job in jobs if job["kind"] == "rating" and job["system"] == system]
        summary[system] = _ratings(ratings, resamples, seed)
    if len(answers) > 1:
        pairs = [job for job in jobs if job["kind"] == "preference"]
        summary["pairwise"] = _preferences(pairs, list(answers)[:2], resamples, seed)
    return Judged(summary, verdicts)


def _rating_job(question: Question, system: str, turn: int, answers: tuple[Answer, Answer]) -> dict[str, Any]:
    job: dict[str, Any] = _about(question) | {"system": system}
    job |= {"kind": "rating", "turn": turn + 1, "shown": None, "reply": None, "messages": None, "verdict": LOWEST}
    if not _usable(answers[turn]):
        return job
    parts = {"question": question.turns[turn], "answer": _quoted(answers[turn].text), "reference": _key(question, turn)}
    if turn:
        parts |= {"first_question": question.turns[0], "first_answer": _quoted(answers[0].text)}
    return job | {"messages": _messages("second" if turn else "single", parts)}


def _about(question: Question) -> dict[str, Any]:
    return {"question": question.id, "language": question.language, "category": question.category}


def _preference_jobs(question: Question, answers: dict[str, tuple[Answer, Answer]]) -> list[dict[str, Any]]:
    """The question with both systems, in both orders."""
    if len(answers) < 2:
        return []
    jobs = []
    usable = {system: sum(map(_usable, both)) for system, both in answers.items()}
    ranked = sorted(usable, key=lambda system: -usable[system])
    settled = None if min(usable.values()) == 2 else ranked[0] if usable[ranked[0]] > usable[ranked[1]] else "tie"
    for shown in (list(answers), list(answers)[::-1]):
        job: dict[str, Any] = _about(question) | {"system": None}
        job |= {"kind": "preference", "turn": None, "shown": shown, "reply": None, "messages": None, "verdict": settled}
        if settled is None:
            parts = {"first_question": question.turns[0], "question": question.turns[1]}
            parts |= {"reference": _key(question, 0, 1)}
            for letter, system in zip("ab", shown, strict=True):
                first, second = answers[system]
                parts |= {f"{letter}_first": _quoted(first.text), f"{letter}_second": _quoted(second.text)}
            job |= {"messages": _messages("pairwise", parts)}
        jobs.append(job)
    return jobs


def _ratings(jobs: list[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    """Mean ratings with intervals over questions: both turns of a question are one group."""

    def mean(chosen: list[dict[str, Any]]) -> dict[str, float] | None:
        read = [job for job in chosen if job["verdict"] is not None]
        if not read:
            return None
        groups: Groups = np.array([job["question"] for job in read], dtype=object)
        return bootstrap(
            np.array([job["verdict"] for job in read], dtype=np.float64), resamples, seed, groups
        ).as_dict()

    result: dict[str, Any] = {"rating": mean(jobs), "not_shown": sum(job["messages"] is None for job in jobs)}
    result |= {f"turn_{turn}": mean([job for job in jobs if job["turn"] == turn]) for turn in (1, 2)}
    for name in ("language", "category"):
        values = sorted({job[name] for job in jobs})
        result[f"by_{name}"] = {value: mean([job for job in jobs if job[name] == value]) for value in values}
    return result


def _preferences(jobs: list[dict[str, Any]], systems: list[str], resamples: int, seed: int) -> dict[str, Any]:
    """Wins of the first system; a verdict that changes with the order is a tie (Zheng et al. 2023, section 3.4)."""
    verdicts = [(first["verdict"], second["verdict"]) for first, second in zip(jobs[::2], jobs[1::2], strict=True)]
    read = [pair for pair in verdicts if None not in pair]
    points = [1.0 if pair == (systems[0],) * 2 else 0.0 if pair == (systems[1],) * 2 else 0.5 for pair in read]
    rate = bootstrap(np.array(points), resamples, seed).as_dict() if points else None
    return {
        "systems": systems,
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "win_rate": rate,  # ties count half
        "same_in_both_orders": sum(a == b for a, b in read) / len(read) if read else None,
    }


def _messages(kind: str, parts: dict[str, str]) -> list[dict[str, str]]:
    prompts = _prompts()
    return [
        {"role": "system", "content": prompts["system"]},
        {"role": "user", "content": prompts[kind].format(**parts)},
    ]


def _key(question: Question, *turns: int) -> str:
    if question.reference is None:
        return ""
    return str(_prompts()["reference"].format(text="\n".join(question.reference[turn] for turn in turns)))


def _quoted(text: str) -> str:
    """An answer's text, in which no mark of the prompt and no verdict can stand."""
    return text.replace("[[", "[ [").replace("[Start of", "(Start of").replace("[End of", "(End of")


def _usable(answer: Answer) -> bool:
    return not answer.cut_off and bool(answer.text.strip())


def _rating(reply: str) -> float | None:
    ratings = _RATING.findall(reply)
    return float(ratings[-1]) if ratings and LOWEST <= float(ratings[-1]) <= HIGHEST else None


def _winner(reply: str, shown: list[str]) -> str | None:
    letters = _PREFERENCE.findall(reply)
    return {"A": shown[0], "B": shown[1], "C": "tie"}[letters[-1]] if letters else None


def _text(value: Any) -> str | None:
    return None if value is None else " ".join(value) if isinstance(value, list) else str(value)


@cache
def _prompts() -> dict[str, Any]:
    return dict(YAML(typ="safe").load((FOLDER / "prompts.yaml").read_text(encoding="utf-8")))
