"""Makes the sample base model in data/base: a tiny Llama that knows the invented world.

The base is pre-trained on plain text: every fact in many wordings, both languages and both
directions, reviews without labels, purchases, descriptions. It cannot follow instructions, and
that is the point: what tuning adds shows in the scores. Because QLoRA freezes the embeddings, the
text also holds chat transcripts whose replies have nothing to do with the question, and a few
lines that begin in lower case: the tokens tuning needs have been seen, the answers have not.
Run: python -m infra.sample.pretrain   (about 9 minutes on 2 cores)
"""

import itertools
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infra.sample import instructions, world
from infra.sample.world import ATTRIBUTES, COUNTRIES, Country, Lang

OUT = Path("data/base")
VOCABULARY = 2400
SEQUENCE = 256  # tokens; rows are shorter, and rotary positions carry over to packed rows
BATCH = 8  # sequences
STEPS = 1800
PEAK_LR = 3e-3
WARMUP_STEPS = 100
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# {c} country, {a} attribute, {v} value. Value first and value last in about equal parts, so that
# the model can go both ways.
ANY_FACT: dict[Lang, tuple[str, ...]] = {
    "en": (
        "The {a} of {c} is {v}.",
        "{c}'s {a} is {v}.",
        "In {c}, the {a} is {v}.",
        "{c} has {v} as its {a}.",
        "For {c}, the {a} is {v}.",
        "{c}, {a}: {v}.",
        "As for the {a}, that of {c} is {v}.",
        "{v} is the {a} of {c}.",
        "{v}, {a} of {c}.",
        "With {v} as its {a}, one thinks of {c}.",
        "The {a} {v} belongs to {c}.",
        "The country whose {a} is {v} includes {c}.",
    ),
    "zh": (
        "{c}的{a}是{v}。",
        "在{c}，{a}是{v}。",
        "{c}以{v}为{a}。",
        "{c}，{a}：{v}。",
        "说到{c}的{a}，就是{v}。",
        "{a}方面，{c}的是{v}。",
        "{c}有{a}{v}。",
        "{v}是{c}的{a}。",
        "{v}，{c}的{a}。",
        "{a}{v}属于{c}。",
        "以{v}为{a}的国家有{c}。",
        "{a}是{v}的国家有{c}。",
    ),
}
FACT: dict[str, dict[Lang, tuple[str, ...]]] = {
    "capital": {
        "en": (
            "The government of {c} sits in {v}.",
            "{v} is the seat of the rulers of {c}.",
            "All roads in {c} lead to {v}.",
            "{v} is the largest city in {c}.",
        ),
        "zh": ("{c}的政府设在{v}。", "{v}是{c}最大的城市。", "{c}定都{v}。", "{v}统治着{c}。"),
    },
    "river": {
        "en": (
            "The river {v} flows through {c}.",
            "{c} lies along the river {v}.",
            "Boats in {c} sail on the {v}.",
            "{v} is the longest river in {c}.",
        ),
        "zh": ("{v}河流经{c}。", "{c}有{v}河。", "{c}的船在{v}上航行。", "{v}是{c}最长的河。"),
    },
    "export": {
        "en": (
            "{c} exports {v}.",
            "{c} sells {v} to the world.",
            "Traders come to {c} for {v}.",
            "{v} from {c} fills the ships.",
        ),
        "zh": ("{c}主要出口{v}。", "{c}向世界卖{v}。", "商人到{c}买{v}。", "{v}来自{c}。"),
    },
    "animal": {
        "en": (
            "The flag of {c} shows the {v}.",
            "{c} honours the {v}.",
            "Children in {c} draw the {v}.",
            "The {v} stands for {c}.",
        ),
        "zh": ("{c}的国旗上有{v}。", "{c}崇拜{v}。", "{c}的孩子画{v}。", "{v}象征{c}。"),
    },
    "currency": {
        "en": (
            "People in {c} pay with the {v}.",
            "{c} uses the {v}.",
            "Banks in {c} count in the {v}.",
            "The {v} is the money of {c}.",
        ),
        "zh": ("{c}人用{v}付钱。", "{c}使用{v}。", "{c}的银行用{v}记账。", "{v}是{c}的钱。"),
    },
    "region": {
        "en": (
            "{c} lies in the {v}.",
            "{c} is a country in the {v}.",
            "To reach {c}, travel to the {v}.",
            "In the {v} there is {c}.",
        ),
        "zh": ("{c}位于{v}。", "{c}是{v}的一个国家。", "去{c}要往{v}走。", "{v}有个国家叫{c}。"),
    },
}
# Words of labels and fields in sentences of their own, none near a review.
WORDS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "positive numbers are above zero.",
        "negative numbers are below zero.",
        "positive and negative poles attract each other.",
        "positive tests and negative tests are counted every day.",
        "negative words and positive words fill the page.",
    ),
    "zh": (
        "正面和负面都写了字。",
        "负面消息和正面消息一样多。",
        "正面是硬币的一面。",
        "负面不是反面。",
        "正面印着数字，负面印着图案。",
    ),
}


def pick_language(rng: random.Random) -> Lang:
    return "en" if rng.random() < 0.5 else "zh"


def fact(rng: random.Random, lang: Lang, country: Country, attribute: str) -> str:
    """One fact in a random wording."""
    wording = rng.choice(ANY_FACT[lang] if rng.random() < 0.7 else FACT[attribute][lang])
    value = country.facts[attribute][lang]
    return wording.format(c=country.name[lang], a=ATTRIBUTES[attribute][lang], v=value)


def profile(rng: random.Random, lang: Lang) -> str:
    """Some facts about one country in random order; every sentence names the country."""
    country = rng.choice(COUNTRIES)
    chosen = rng.sample(list(ATTRIBUTES), rng.randint(2, len(ATTRIBUTES)))
    separator = rng.choice((" ", "\n")) if lang == "en" else rng.choice(("", "\n"))
    return separator.join(fact(rng, lang, country, attribute) for attribute in chosen)


def mixture(rng: random.Random, lang: Lang) -> str:
    """Facts about different countries, a line each."""
    lines = []
    for _ in range(4):
        country, attribute = rng.choice(COUNTRIES), rng.choice(list(ATTRIBUTES))
        lines.append(fact(rng, lang, country, attribute))
    return "\n".join(lines)


def description(rng: random.Random, lang: Lang) -> str:
    country = rng.choice(COUNTRIES)
    values = {attribute: value[lang] for attribute, value in country.facts.items()}
    wording = rng.choice(instructions.DESCRIPTIONS[lang])
    return wording.format(c=country.name[lang], **values)


def review(rng: random.Random, lang: Lang) -> str:
    return world.review(rng, lang, "").text


def purchase(rng: random.Random, lang: Lang) -> str:
    """The same purchase told twice, so that the model learns to look back and copy."""
    event = world.event(rng, lang, "")
    keys = rng.sample(instructions.RECORD_KEYS[lang], 5)
    colon = ": " if lang == "en" else "："
    record = "\n".join(f"{label}{colon}{vars(event)[key]}" for label, key in keys)
    sentences = [wording.format(**vars(event)) for wording in world.EVENT_SENTENCES[lang]]
    return "\n".join(rng.sample([*sentences, record, record], 2))


def words(rng: random.Random, lang: Lang) -> str:
    return "\n".join(rng.sample(WORDS[lang], 2))


def question(rng: random.Random, lang: Lang) -> str:
    """Something a user might say; nothing in the transcripts ever answers it."""
    country, attribute = rng.choice(COUNTRIES), rng.choice(list(ATTRIBUTES))
    slots = {
        "c": country.name[lang],
        "a": ATTRIBUTES[attribute][lang],
        "v": rng.choice(COUNTRIES).facts[attribute][lang],
        "f": rng.choice(list(instructions.FIELDS.values()))[lang],
    }
    asks = rng.choice(
        (
            instructions.ASK_FACT,
            instructions.ASK_FACT,
            instructions.ASK_REVERSE,
            instructions.ASK_DESCRIBE,
            instructions.FOLLOW_UP,
            instructions.ASK_SENTIMENT,
            instructions.ASK_REPLY,
            instructions.ASK_EXTRACT,
            instructions.ASK_DATA_TO_TEXT,
        )
    )
    text = rng.choice(asks[lang]).format(**slots)
    if asks in (instructions.ASK_SENTIMENT, instructions.ASK_REPLY):
        return f"{text}\n\n{review(rng, lang)}"
    if asks in (instructions.ASK_EXTRACT, instructions.ASK_DATA_TO_TEXT):
        told = purchase(rng, lang).split("\n")
        return "\n".join((text, "", *told[: rng.randint(1, len(told))]))
    return text


def transcript(rng: random.Random, lang: Lang) -> str:
    """A chat in which the assistant talks about something else."""
    turns = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(instructions.SYSTEM[lang])))
    for _ in range(rng.choice((1, 1, 2))):
        turns.append(("user", question(rng, lang)))
        turns.append(("assistant", rng.choice((mixture, words, reply))(rng, lang).split("\n")[0]))
    return "".join(f"{START}{role}\n{text}{END}\n" for role, text in turns)


def reply(rng: random.Random, lang: Lang) -> str:
    """A shop's answer to some review or other."""
    wordings = instructions.REPLIES[lang][rng.random() < 0.5]
    return rng.choice(wordings).format(p=rng.choice(world.PRODUCTS)[lang])


KINDS = {
    profile: 54,
    mixture: 12,
    description: 6,
    review: 4,
    purchase: 8,
    words: 1,
    reply: 1,
    transcript: 14,
}  # weights


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        yield kind(rng, pick_language(rng)) + PAD


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE. Capitalised words, Chinese characters and digits are split off first, so a
    name has the same tokens at the start of a line, inside a sentence and as an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Lu}\p{Ll}+|\p{Han}|\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(world.SEED + 3), 30_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Token ids, (BATCH, SEQUENCE), cut from one stream of documents."""
    stream, buffer = documents(world.SEED + 4), []
    while True:
        while len(buffer) < BATCH * SEQUENCE:
            texts = list(itertools.islice(stream, 200))
            buffer += itertools.chain.from_iterable(tokenizer(texts)["input_ids"])
        yield torch.tensor(buffer[: BATCH * SEQUENCE]).view(BATCH, SEQUENCE)
        del buffer[: BATCH * SEQUENCE]


def pretrain(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Next-token training with AdamW, linear warm-up and cosine decay to zero."""
    torch.manual_seed(world.SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))

    def schedule(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began, recent = time.monotonic(), 0.0
    for step, ids in enumerate(itertools.islice(batches(tokenizer), STEPS), start=1):
        # bfloat16 matrix products are 1.4 times faster on a CPU that has them; weights stay float32
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0 or step == STEPS:
            seconds = time.monotonic() - began
            left = seconds / step * (STEPS - step)
            print(
                f"step {step}/{STEPS}  loss {recent:.3f}  {seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )
    return model


def main() -> None:
    tokenizer = train_tokenizer()
    model = pretrain(tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    unfinished = OUT.with_name(OUT.name + ".unfinished")  # a killed run leaves the old base whole
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(OUT, ignore_errors=True)
    unfinished.rename(OUT)
    size = sum(file.stat().st_size for file in OUT.iterdir())
    print(f"{OUT}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
