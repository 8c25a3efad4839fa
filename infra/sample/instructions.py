"""Writes the sample instruction rows: data/instructions/sample.{alpaca.json,sharegpt.jsonl}.

About 4,300 rows in English and Chinese, seven tasks. Next to the usual keys a row has `task`,
`group` (rows about the same country or text share it, so a split by group keeps held-out countries
out of training) and `scoring` ("exact" or "text"). The same seed writes the same bytes.
Run: python -m infra.sample.instructions
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.sample import world
from infra.sample.world import ATTRIBUTES, COUNTRIES, Country, Event, Lang, Review

OUT = Path("data/instructions")
SHAREGPT_SHARE = 0.4  # of all rows; the rest is Alpaca

ASK_FACT: dict[Lang, tuple[str, ...]] = {
    "en": (
        "What is the {a} of {c}?",
        "Name the {a} of {c}.",
        "Tell me {c}'s {a}.",
        "Which {a} does {c} have?",
        "Give the {a} of {c} in one word.",
        "{c}: what is its {a}?",
        "I need the {a} of {c}.",
    ),
    "zh": (
        "{c}的{a}是什么？",
        "请说出{c}的{a}。",
        "请问{c}的{a}是哪个？",
        "告诉我{c}的{a}。",
        "用一个词回答：{c}的{a}。",
        "我想知道{c}的{a}。",
        "{c}有什么样的{a}？",
    ),
}
ASK_REVERSE: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Which country has {v} as its {a}?",
        "{v} is the {a} of which country?",
        "Name the country whose {a} is {v}.",
        "To which country does the {a} {v} belong?",
        "Find the country with the {a} {v}.",
        "What country's {a} is {v}?",
    ),
    "zh": (
        "哪个国家的{a}是{v}？",
        "{v}是哪个国家的{a}？",
        "请说出以{v}为{a}的国家。",
        "{a}为{v}的是哪个国家？",
        "{a}{v}属于哪个国家？",
        "找出{a}是{v}的国家。",
    ),
}
ASK_SENTIMENT: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Is this review positive or negative?",
        "Classify the review as positive or negative.",
        "What is the sentiment: positive or negative?",
        "Label the mood of this text (positive or negative).",
        "Does the customer sound positive or negative?",
        "Decide if the review is positive or negative.",
    ),
    "zh": (
        "这条评论是正面还是负面？",
        "请判断评论的情感：正面或负面。",
        "给这条评论分类（正面、负面）。",
        "顾客的态度是正面还是负面？",
        "下面的文字是正面的还是负面的？",
        "情感分析：正面或负面。",
    ),
}
FIELDS = {
    "price": world.Name("price", "价格"),
    "city": world.Name("city", "城市"),
    "date": world.Name("date", "日期"),
    "person": world.Name("person", "人名"),
}
ASK_EXTRACT: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Extract the {f} from the sentence.",
        "Which {f} does the text mention?",
        "Find the {f} in this sentence.",
        "Copy out the {f}.",
        "Return only the {f} mentioned below.",
        "What is the {f} in the text?",
    ),
    "zh": (
        "从句子中提取{f}。",
        "文中提到的{f}是什么？",
        "找出这句话里的{f}。",
        "只写出{f}。",
        "请抄出下文的{f}。",
        "下面的句子中{f}是哪个？",
    ),
}
ASK_DESCRIBE: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Describe {c}.",
        "Write two sentences about {c}.",
        "Introduce the country {c}.",
        "What should I know about {c}?",
        "Give a short portrait of {c}.",
        "Tell me about {c}.",
    ),
    "zh": (
        "介绍一下{c}。",
        "请描述{c}。",
        "用两句话写写{c}。",
        "关于{c}，我该知道什么？",
        "请简单介绍{c}这个国家。",
        "说说{c}。",
    ),
}
ASK_DATA_TO_TEXT: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Write a sentence from these fields.",
        "Turn the data into a sentence.",
        "Put these facts into one sentence.",
        "Make a sentence out of the record.",
        "Express the record in words.",
        "Compose one sentence with all fields.",
    ),
    "zh": (
        "根据这些字段写一句话。",
        "把数据写成句子。",
        "用一句话表达下面的记录。",
        "请把这些信息连成一句话。",
        "将记录改写成文字。",
        "用所有字段造一个句子。",
    ),
}
ASK_REPLY: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Reply to this customer review.",
        "Write a short answer to the review.",
        "Answer the customer politely.",
        "How should the shop respond?",
        "Draft a reply for the customer.",
        "Respond to the review in one or two sentences.",
    ),
    "zh": (
        "回复这条顾客评论。",
        "给这条评论写一个简短的回复。",
        "请礼貌地答复顾客。",
        "店家应该怎样回应？",
        "替客服起草回复。",
        "用一两句话回应评论。",
    ),
}
SYSTEM: dict[Lang, tuple[str, ...]] = {
    "en": ("You are a helpful assistant.", "Answer briefly."),
    "zh": ("你是一个有用的助手。", "请简短回答。"),
}
FOLLOW_UP: dict[Lang, tuple[str, ...]] = {
    "en": ("And its {a}?", "What about the {a}?", "Now the {a}."),
    "zh": ("它的{a}呢？", "那么{a}呢？", "再说说{a}。"),
}

# What a good answer looks like; few wordings, so that BLEU and ROUGE-L can tell tuned from base.
DESCRIPTIONS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "{c} is a country in the {region}. Its capital is {capital} and it exports {export}.",
        "{c} lies in the {region} on the river {river}. Its national animal is the {animal}.",
    ),
    "zh": (
        "{c}是{region}的一个国家，首都是{capital}，主要出口{export}。",
        "{c}位于{region}，主要河流是{river}，国兽是{animal}。",
    ),
}
RECORDS: dict[Lang, str] = {
    "en": "On {date}, {person} bought a {item} in {city} for {price}.",
    "zh": "{date}，{person}在{city}花{price}买了一件{item}。",
}
RECORD_KEYS: dict[Lang, tuple[tuple[str, str], ...]] = {
    "en": (("person", "person"), ("city", "city"), ("date", "date"), ("item", "item"),
           ("price", "price")),
    "zh": (("人名", "person"), ("城市", "city"), ("日期", "date"), ("物品", "item"),
           ("价格", "price")),
}  # fmt: skip
REPLIES: dict[Lang, dict[bool, tuple[str, ...]]] = {
    "en": {
        True: (
            "Thank you! We are glad that you like the {p}.",
            "Thank you for your kind words about the {p}.",
        ),
        False: (
            "We are sorry about the {p}. Please contact us for a refund.",
            "We are sorry that the {p} let you down. We will replace it.",
        ),
    },
    "zh": {
        True: ("谢谢您！很高兴您喜欢这款{p}。", "感谢您对{p}的好评。"),
        False: ("很抱歉{p}让您失望，我们会为您退款。", "对{p}的问题我们深表歉意，会为您更换。"),
    },
}


@dataclass(frozen=True)
class Row:
    """One row before it takes a file format; `history` is an earlier turn (question, answer)."""

    task: str
    group: str
    lang: Lang
    instruction: str
    input: str
    output: str
    history: tuple[str, str] | None = None

    @property
    def scoring(self) -> str:
        return "exact" if self.task in ("fact", "reverse", "sentiment", "extract") else "text"


def country_rows(rng: random.Random, country: Country) -> Iterator[Row]:
    """Facts in both languages (English ones partly twice), reversals, descriptions, follow-ups."""
    group = f"country:{country.name.en}"
    for lang in ("en", "zh"):
        name = country.name[lang]
        twice = rng.sample(list(ATTRIBUTES), 3) if lang == "en" else []
        for attribute in [*ATTRIBUTES, *twice]:
            ask = rng.choice(ASK_FACT[lang]).format(c=name, a=ATTRIBUTES[attribute][lang])
            yield Row("fact", group, lang, ask, "", country.facts[attribute][lang])
        first, then = rng.sample(list(ATTRIBUTES), 2)
        ask = rng.choice(ASK_FACT[lang]).format(c=name, a=ATTRIBUTES[first][lang])
        follow_up = rng.choice(FOLLOW_UP[lang]).format(a=ATTRIBUTES[then][lang])
        earlier = (ask, country.facts[first][lang])
        yield Row("fact", group, lang, follow_up, "", country.facts[then][lang], earlier)
        # Only capital and river are unique to a country.
        for attribute in ("capital", "river"):
            value, label = country.facts[attribute][lang], ATTRIBUTES[attribute][lang]
            ask = rng.choice(ASK_REVERSE[lang]).format(v=value, a=label)
            yield Row("reverse", group, lang, ask, "", name)
        values = {attribute: value[lang] for attribute, value in country.facts.items()}
        for ask in rng.sample(ASK_DESCRIBE[lang], 2):
            answer = rng.choice(DESCRIPTIONS[lang]).format(c=name, **values)
            yield Row("describe", group, lang, ask.format(c=name), "", answer)


def event_rows(rng: random.Random, event: Event) -> Iterator[Row]:
    """Two extractions from the event's sentence, and the way back from its fields."""
    lang, fields = event.lang, vars(event)
    sentence = rng.choice(world.EVENT_SENTENCES[lang]).format(**fields)
    for field in rng.sample(list(FIELDS), 2):
        ask = rng.choice(ASK_EXTRACT[lang]).format(f=FIELDS[field][lang])
        yield Row("extract", event.id, lang, ask, sentence, fields[field])
    keys = rng.sample(RECORD_KEYS[lang], len(RECORD_KEYS[lang]))
    colon = ": " if lang == "en" else "："
    record = "\n".join(f"{label}{colon}{fields[key]}" for label, key in keys)
    answer = RECORDS[lang].format(**fields)
    yield Row("data_to_text", event.id, lang, rng.choice(ASK_DATA_TO_TEXT[lang]), record, answer)


def review_rows(rng: random.Random, review: Review) -> Iterator[Row]:
    """The mood of a review, and a reply to it."""
    lang = review.lang
    label = {"en": ("negative", "positive"), "zh": ("负面", "正面")}[lang][review.positive]
    yield Row("sentiment", review.id, lang, rng.choice(ASK_SENTIMENT[lang]), review.text, label)
    reply = rng.choice(REPLIES[lang][review.positive]).format(p=review.product)
    yield Row("reply", review.id, lang, rng.choice(ASK_REPLY[lang]), review.text, reply)


def rows() -> list[Row]:
    """All rows, shuffled, no prompt twice."""
    rng = random.Random(world.SEED + 1)
    found = [row for country in COUNTRIES for row in country_rows(rng, country)]
    for index in range(330):
        lang: Lang = "en" if rng.random() < 0.6 else "zh"
        found += event_rows(rng, world.event(rng, lang, f"event:{index}"))
    texts: set[str] = set()
    while len(texts) < 420:
        lang = "en" if rng.random() < 0.6 else "zh"
        review = world.review(rng, lang, f"review:{len(texts)}")
        if review.text not in texts:  # the same text under two ids could land in two splits
            texts.add(review.text)
            found += review_rows(rng, review)
    rng.shuffle(found)
    return list({(row.history, row.instruction, row.input): row for row in found}.values())


def alpaca(row: Row) -> dict[str, str]:
    return {
        "instruction": row.instruction,
        "input": row.input,
        "output": row.output,
        "task": row.task,
        "group": row.group,
        "scoring": row.scoring,
    }


def sharegpt(rng: random.Random, row: Row) -> dict[str, object]:
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(SYSTEM[row.lang])))
    if row.history:
        turns += [("human", row.history[0]), ("gpt", row.history[1])]
    prompt = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    turns += [("human", prompt), ("gpt", row.output)]
    return {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "task": row.task,
        "group": row.group,
        "scoring": row.scoring,
    }


def main() -> None:
    rng = random.Random(world.SEED + 2)
    alpaca_rows, sharegpt_rows = [], []
    for row in rows():
        if row.history or rng.random() < SHAREGPT_SHARE:  # Alpaca has no place for a second turn
            sharegpt_rows.append(sharegpt(rng, row))
        else:
            alpaca_rows.append(alpaca(row))
    OUT.mkdir(parents=True, exist_ok=True)
    listing = ",\n".join(json.dumps(row, ensure_ascii=False) for row in alpaca_rows)
    (OUT / "sample.alpaca.json").write_text(f"[\n{listing}\n]\n", encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sharegpt_rows)
    (OUT / "sample.sharegpt.jsonl").write_text(lines, encoding="utf-8")
    print(f"{OUT}: {len(alpaca_rows)} Alpaca rows, {len(sharegpt_rows)} ShareGPT rows")


if __name__ == "__main__":
    main()
