"""Random sentences for the synthesiser: a small grammar over common words, and lines for other languages.

Meaning does not matter; every sound of the language in many neighbourhoods does. Training and unseen
sentences never share a noun or a verb.
"""

from __future__ import annotations

import numpy as np


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


_NOUNS = _words(
    "river mountain teacher window garden kitchen picture story engine market doctor morning evening "
    "winter summer bridge forest village island ocean tower castle farmer painter soldier singer baker "
    "pilot sailor judge neighbour brother sister mother father child puppy horse tiger zebra eagle owl "
    "fish whale spider thunder weather shower flower shadow mirror hammer ladder bottle basket blanket "
    "pillow candle lantern compass treasure journey chapter question answer problem measure pleasure "
    "vision beauty music rhythm voice choice noise house mouse cloud crowd field wheel cheese bread "
    "butter sugar pepper onion mango apple cherry peach grape melon lemon orange juice water"
)
_UNSEEN_NOUNS = _words(
    "library airport camera harbour valley festival uncle cousin lawyer student monkey rabbit beach "
    "station theatre violin hospital elbow thumb jacket umbrella carpet balcony chimney mushroom "
    "pancake yoghurt coffee chocolate"
)
_VERBS = _words(
    "watches follows carries remembers forgets paints opens closes builds breaks finds loses teaches "
    "learns chooses measures washes pushes pulls throws catches sings whispers describes discovers "
    "enjoys imagines visits welcomes"
)
_UNSEEN_VERBS = _words(
    "borrows admires repairs notices photographs cooks believes surprises exchanges delivers"
)
_ADJECTIVES = _words(
    "small big old young bright dark quiet loud gentle clever brave lazy happy gloomy smooth rough "
    "thin thick yellow purple blue green strange simple usual early late cheap precious shiny humble "
    "enormous beautiful wooden golden"
)
_PLACES = _words(
    "near the shore|over the hills|in the garden|behind the wall|under the bridge|on the roof|"
    "beyond the woods|through the fog|by the fire|along the road|at the corner|above the clouds|"
    "without a word|before noon|after dark",
    "|",
)
_OPENERS = _words(
    "well|you know|of course|perhaps|today|yesterday|every year|suddenly|as far as I know|honestly|"
    "by the way|in my view|for example|sooner or later|now and then",
    "|",
)
_PHRASES = _words(
    "thank you very much|how are you|nice to meet you|I do not think so|what a wonderful idea|"
    "please come in|could you say that again|we should go home now|that is five past four|"
    "my mama makes onion soup|who would have thought it|oh no, not you too|bob, pop, mom and papa|"
    "see the three green trees|she sells sea shells by the sea shore|few people knew the truth|"
    "zip, zap, zoom|father walked far in the dark|you choose two blue shoes|why would we worry",
    "|",
)
_NUMBERS = _words(
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred"
)

_CHINESE = _words(
    "今天天气很好|我们一起去公园吧|你叫什么名字|他昨天买了一本新书|谢谢你的帮助|这个问题很有意思|"
    "春天的花都开了|老师正在教我们唱歌|请把窗户打开|早上好，你吃饭了吗|火车八点钟从北京出发|"
    "我喜欢喝绿茶和吃苹果|妈妈在厨房做饭|孩子们在院子里跑步|山那边有一条大河|月亮又圆又亮|"
    "大家慢慢说，不要着急|我不知道他住在哪里",
    "|",
)
_UNSEEN_CHINESE = [
    "图书馆在学校的东边",
    "明年夏天我要去海边旅游",
    "这家饭店的鱼非常好吃",
    "朋友送给我一把红色的雨伞",
    "飞机晚点了两个小时",
]

_PSEUDO_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvwyz" for vowel in "aeiou"]


def _any(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _noun_phrase(rng: np.random.Generator, nouns: list[str]) -> str:
    article = _any(rng, ["the", "a", "this", "my", "our", "every", "their"])
    adjective = _any(rng, _ADJECTIVES) + " " if rng.uniform() < 0.6 else ""
    noun = _any(rng, nouns)
    if article == "a" and (adjective or noun)[0] in "aeiou":
        article = "an"
    return f"{article} {adjective}{noun}"


def draw_sentence(rng: np.random.Generator, language: str = "en-us", unseen: bool = False) -> str:
    """One sentence for an eSpeak language name; `unseen` draws from the words kept for evaluation."""
    if language == "cmn":
        return _any(rng, _UNSEEN_CHINESE if unseen else _CHINESE)
    nouns = _UNSEEN_NOUNS if unseen else _NOUNS
    verbs = _UNSEEN_VERBS if unseen else _VERBS
    if not language.startswith("en") and rng.uniform() < 0.5:
        # Nonsense words in another language's sounds.
        words = [
            "".join(_any(rng, _PSEUDO_SYLLABLES) for _ in range(int(rng.integers(1, 4)))) for _ in range(6)
        ]
        return " ".join(words) + "."
    kind = rng.uniform()
    if kind < 0.15 and not unseen:
        return _any(rng, _PHRASES) + "."
    if kind < 0.25:
        return ", ".join(_any(rng, _NUMBERS) for _ in range(4)) + "."
    sentence = f"{_noun_phrase(rng, nouns)} {_any(rng, verbs)} {_noun_phrase(rng, nouns)}"
    if rng.uniform() < 0.5:
        sentence += " " + _any(rng, _PLACES)
    if rng.uniform() < 0.3:
        sentence = f"{_any(rng, _OPENERS)}, {sentence}"
    return sentence + ("?" if rng.uniform() < 0.15 else ".")
