"""An invented world of 100 countries, in English and Chinese.

Invented, so that a tiny base model can know all of it and no licence applies. Everything follows
from `SEED`: instruction rows (instructions.py) and pre-training text (pretrain.py) read the same
world. Chinese names are transliterations, one character a syllable.
"""

import random
from dataclasses import dataclass
from typing import Literal

Lang = Literal["en", "zh"]
SEED = 20261132  # its country names put 11 of 100 countries in the test split, 5 in validation

# One distinct character a syllable, so two different names never share a transliteration.
_SYLLABLES = (
    "ba:巴 be:贝 bo:博 da:达 de:德 do:多 du:杜 fa:法 fe:费 ga:加 go:戈 ka:卡 ke:克 ki:基 ko:科 "
    "ku:库 la:拉 le:勒 li:利 lo:洛 lu:卢 ma:马 me:梅 mi:米 mo:莫 na:纳 ne:内 ni:尼 no:诺 pa:帕 "
    "pe:佩 pi:皮 po:波 ra:兰 re:雷 ri:里 ro:罗 ru:鲁 sa:萨 se:塞 si:西 so:索 su:苏 ta:塔 te:特 "
    "ti:蒂 to:托 tu:图 va:瓦 ve:韦 vi:维 vo:沃 za:扎 ze:泽 zi:齐 zu:祖"
)
SYLLABLES = dict(pair.split(":") for pair in _SYLLABLES.split())


@dataclass(frozen=True)
class Name:
    """One thing in both languages."""

    en: str
    zh: str

    def __getitem__(self, lang: Lang) -> str:
        return self.en if lang == "en" else self.zh


def _names(pairs: str) -> tuple[Name, ...]:
    return tuple(Name(*pair.split(":")) for pair in pairs.split())


REGIONS = _names("north:北部 south:南部 east:东部 west:西部 centre:中部")
EXPORTS = _names(
    "copper:铜 tea:茶叶 timber:木材 wool:羊毛 salt:盐 coffee:咖啡 silk:丝绸 rice:大米 honey:蜂蜜 "
    "cotton:棉花 iron:铁 glass:玻璃 fish:鱼 wheat:小麦 amber:琥珀 cocoa:可可 paper:纸张 "
    "leather:皮革 olives:橄榄 spices:香料"
)
ANIMALS = _names(
    "heron:苍鹭 lynx:猞猁 otter:水獭 falcon:猎鹰 bear:棕熊 stag:雄鹿 wolf:灰狼 crane:白鹤 fox:狐狸 "
    "owl:猫头鹰 eagle:雄鹰 tiger:老虎 seal:海豹 goat:山羊 horse:骏马 swan:天鹅 panther:黑豹 "
    "turtle:海龟 camel:骆驼 badger:狗獾"
)
CURRENCIES = _names(
    "crown:克朗 mark:马克 dinar:第纳尔 peso:比索 florin:弗罗林 ducat:杜卡特 franc:法郎 lira:里拉 "
    "rupee:卢比 shilling:先令 taler:塔勒 guilder:盾"
)
PRODUCTS = _names(
    "lamp:台灯 kettle:水壶 backpack:背包 chair:椅子 keyboard:键盘 camera:相机 blanket:毛毯 "
    "watch:手表 bicycle:自行车 umbrella:雨伞 radio:收音机 jacket:夹克 teapot:茶壶 printer:打印机 "
    "mirror:镜子 guitar:吉他 suitcase:行李箱 heater:取暖器 toaster:烤面包机 notebook:笔记本"
)
FIRST_NAMES = _names(
    "Anna:安娜 Boris:鲍里斯 Clara:克拉拉 David:大卫 Elena:叶莲娜 Felix:费利克斯 Greta:格蕾塔 "
    "Hugo:雨果 Irene:艾琳 Jonas:约纳斯 Karin:卡琳 Leon:莱昂 Marta:玛塔 Nils:尼尔斯 Olga:奥尔加 "
    "Peter:彼得 Rosa:罗莎 Simon:西蒙 Tara:塔拉 Victor:维克多"
)
LAST_NAMES = _names(
    "Berg:贝格 Costa:科斯塔 Duval:杜瓦尔 Engel:恩格尔 Frost:弗罗斯特 Gray:格雷 Hart:哈特 "
    "Ivers:艾弗斯 Jensen:延森 Keller:凯勒 Lind:林德 Moreau:莫罗 Novak:诺瓦克 Olsen:奥尔森 "
    "Perez:佩雷斯 Quinn:奎因 Rossi:罗西 Stone:斯通 Turner:特纳 Weber:韦伯"
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

# What is known of a country, and what each attribute is called.
ATTRIBUTES = {
    "capital": Name("capital", "首都"),
    "river": Name("main river", "主要河流"),
    "export": Name("main export", "主要出口品"),
    "animal": Name("national animal", "国兽"),
    "currency": Name("currency", "货币"),
    "region": Name("region", "地区"),
}


@dataclass(frozen=True)
class Country:
    """A country and its value for each of ATTRIBUTES."""

    name: Name
    facts: dict[str, Name]


@dataclass(frozen=True)
class Event:
    """Somebody bought something somewhere: the fields of one event, already worded."""

    id: str
    lang: Lang
    person: str
    city: str
    date: str
    item: str
    price: str


@dataclass(frozen=True)
class Review:
    """A customer review; `text` never contains the words of its label."""

    id: str
    lang: Lang
    product: str
    positive: bool
    text: str


def _proper_names(rng: random.Random, count: int) -> list[Name]:
    """`count` names of three syllables, no two of which share their first two."""
    found: dict[tuple[str, str], Name] = {}
    keys = list(SYLLABLES)
    while len(found) < count:
        parts = rng.sample(keys, 3)
        name = Name("".join(parts).capitalize(), "".join(SYLLABLES[part] for part in parts))
        found.setdefault((parts[0], parts[1]), name)
    return list(found.values())


def _build() -> tuple[tuple[Country, ...], tuple[Name, ...]]:
    rng = random.Random(SEED)
    names = _proper_names(rng, 340)
    countries = tuple(
        Country(
            name,
            {
                "capital": capital,
                "river": river,
                "export": rng.choice(EXPORTS),
                "animal": rng.choice(ANIMALS),
                "currency": rng.choice(CURRENCIES),
                "region": rng.choice(REGIONS),
            },
        )
        for name, capital, river in zip(names[:100], names[100:200], names[200:300], strict=True)
    )
    return countries, tuple(names[300:])


# Towns belong to no country: a sentence about a purchase never mentions a capital.
COUNTRIES, TOWNS = _build()


def event(rng: random.Random, lang: Lang, id: str) -> Event:
    """A purchase with random fields."""
    month, day = rng.randrange(12), rng.randint(1, 28)
    first, last = rng.choice(FIRST_NAMES)[lang], rng.choice(LAST_NAMES)[lang]
    amount = rng.randint(5, 99)
    return Event(
        id=id,
        lang=lang,
        person=f"{first} {last}" if lang == "en" else f"{first}·{last}",
        city=rng.choice(TOWNS)[lang],
        date=f"{day} {MONTHS[month]}" if lang == "en" else f"{month + 1}月{day}日",
        item=rng.choice(PRODUCTS)[lang],
        price=f"{amount} dollars" if lang == "en" else f"{amount}元",
    )


EVENT_SENTENCES: dict[Lang, tuple[str, ...]] = {
    "en": (
        "On {date}, {person} bought a {item} in {city} for {price}.",
        "{person} paid {price} for a {item} in {city} on {date}.",
        "In {city}, {person} found a {item} for {price} on {date}.",
        "A {item} was sold to {person} in {city} on {date} for {price}.",
        "{city}, {date}: {person} takes home a {item} for {price}.",
        "For {price}, {person} ordered a {item} from a shop in {city} on {date}.",
    ),
    "zh": (
        "{date}，{person}在{city}花{price}买了一件{item}。",
        "{person}于{date}在{city}以{price}购买了{item}。",
        "在{city}，{person}{date}看中一件{item}，价格是{price}。",
        "{city}的商店在{date}把{item}卖给了{person}，收费{price}。",
        "{person}花了{price}，{date}从{city}带回一件{item}。",
        "这件{item}是{person}{date}在{city}买的，一共{price}。",
    ),
}

_OPENINGS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "I bought this {p} last week.",
        "My new {p} came on Monday.",
        "We have used the {p} for a month.",
        "My sister gave me this {p}.",
        "This is my second {p} from the shop.",
        "I ordered the {p} for the office.",
    ),
    "zh": (
        "上周买了这款{p}。",
        "新的{p}周一到了。",
        "这款{p}用了一个月。",
        "妹妹送了我这款{p}。",
        "这是在店里买的第二件{p}。",
        "给办公室订了这款{p}。",
    ),
}
_GOOD: dict[Lang, tuple[str, ...]] = {
    "en": (
        "It works perfectly.", "The quality is excellent.", "It looks beautiful.",
        "I love it.", "Delivery was fast.", "It is worth every cent.", "I am very happy.",
        "It feels solid and well made.", "The colour is lovely.", "I would buy it again.",
    ),
    "zh": (
        "非常好用。", "质量很棒。", "外观很漂亮。", "我很喜欢。", "送货很快。", "物超所值。",
        "十分满意。", "做工扎实。", "颜色很好看。", "下次还会买。",
    ),
}  # fmt: skip
_BAD: dict[Lang, tuple[str, ...]] = {
    "en": (
        "It broke after a day.", "The quality is terrible.", "It looks ugly.", "I hate it.",
        "Delivery was slow.", "It is a waste of money.", "I am very disappointed.",
        "It feels cheap and weak.", "The colour is awful.", "I would never buy it again.",
    ),
    "zh": (
        "一天就坏了。", "质量很差。", "外观很难看。", "我很讨厌。", "送货太慢。", "纯属浪费钱。",
        "十分失望。", "做工粗糙。", "颜色很糟糕。", "再也不会买了。",
    ),
}  # fmt: skip


def review(rng: random.Random, lang: Lang, id: str) -> Review:
    """A review of one mood: an opening and two or three remarks."""
    positive = rng.random() < 0.5
    product = rng.choice(PRODUCTS)[lang]
    remarks = rng.sample((_GOOD if positive else _BAD)[lang], rng.choice((2, 2, 3)))
    opening = rng.choice(_OPENINGS[lang]).format(p=product)
    text = (" " if lang == "en" else "").join([opening, *remarks])
    return Review(id, lang, product, positive, text)
