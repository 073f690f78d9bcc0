"""The words that the text generators draw from.

Everything here is written by hand or made of syllables, so that the text made of it is ours.
"""

import random


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ada Alan Alice Amir Anna Arun Bella Ben Bruno Carla Carlos Chen Clara Dana David Diego Dora "
    "Elena Elias Emma Erik Eva Farid Fatima Felix Finn Flora Frank Gina Grace Greta Hana Hugo Ida "
    "Igor Ines Ivan Jack Jane Jonas Julia Kai Karim Kate Keiko Lara Leila Leo Lena Liam Lily Luca "
    "Lucy Maria Marco Martin Maya Mia Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paula "
    "Pedro Peter Priya Ravi Rosa Ruth Sam Sara Simon Sofia Stella Tara Theo Tina Tom Uma Vera "
    "Victor Wanda Will Yara Yusuf Zoe"
)
PLACES = _words(
    "Athens Bergen Berlin Boston Cairo Chicago Cork Dakar Delhi Denver Dublin Florence Geneva "
    "Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Leeds Lima Lisbon London Lyon "
    "Madrid Malta Mexico Milan Mumbai Munich Nairobi Naples Oslo Ottawa Paris Perth Porto Prague "
    "Quito Riga Rome Santiago Seoul Seville Sofia Sydney Tokyo Toronto Tunis Turin Utrecht Venice "
    "Vienna Warsaw Zurich"
)
SPOTS = _words(
    "market park library station harbour school garden bakery museum office kitchen beach bridge "
    "castle farm forest hospital hotel island lake river theatre tower village workshop"
)
ANIMALS = _words(
    "ant bear bee bird cat cow crow deer dog duck eagle fish fox frog goat goose hare hawk hen "
    "horse lion mouse otter owl pig rabbit robin seal sheep snake swan tiger turtle whale wolf"
)
FOODS = _words(
    "apple banana bean biscuit bread butter cake carrot cheese cherry corn egg fig grape honey "
    "lemon melon nut olive onion orange pea peach pear pepper plum potato rice salad soup tomato"
)
THINGS = _words(
    "bag ball basket bell blanket book bottle bowl box brush bucket button camera candle card "
    "chair clock coat coin cup desk door drum envelope flag flute guitar hammer hat helmet jacket "
    "key kite knife ladder lamp letter map mirror needle notebook paper pen pencil phone picture "
    "pillow plate radio ring rope scarf shirt shoe shovel spoon stamp table tent ticket torch toy "
    "umbrella vase violin wallet watch wheel"
)
COLOURS = _words("black blue brown gold green grey orange pink purple red silver white yellow")
MATERIALS = [
    "brass",
    "clay",
    "copper",
    "cotton",
    "glass",
    "iron",
    "leather",
    "paper",
    "plastic",
    "silk",
    "steel",
    "stone",
    "wood",
    "wool",
]
JOBS = _words(
    "actor artist baker builder captain carpenter chef clerk cook dancer dentist designer doctor "
    "driver engineer farmer fisher gardener guide judge lawyer librarian mechanic musician nurse "
    "painter pilot plumber poet sailor scientist singer student tailor teacher waiter writer"
)
SUBJECTS = _words(
    "art biology chemistry drama economics geography history law maths medicine music physics "
    "poetry sport"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
ADJECTIVES = _words(
    "big bright broken calm cheap clean clever cold curious deep dry early empty fast friendly "
    "full gentle happy hard heavy honest hot huge kind large late lazy light long loud lucky new "
    "old plain polite proud quick quiet rare ready rich round sad sharp short shy simple slow "
    "small smooth soft strange strong sweet tall thin tired tiny warm weak wet wide wild wise young"
)
OPPOSITES = _words(
    "big/small hot/cold fast/slow old/new light/dark wet/dry full/empty high/low long/short "
    "rich/poor loud/quiet early/late hard/soft open/closed happy/sad strong/weak wide/narrow "
    "first/last up/down left/right day/night buy/sell give/take win/lose start/stop push/pull "
    "love/hate thick/thin heavy/light true/false inside/outside before/after above/below"
)
# base, past, present third person
VERBS = [
    tuple(entry.split("/"))
    for entry in _words(
        "admire/admired/admires bring/brought/brings build/built/builds buy/bought/buys "
        "carry/carried/carries catch/caught/catches choose/chose/chooses clean/cleaned/cleans "
        "count/counted/counts cut/cut/cuts draw/drew/draws drop/dropped/drops find/found/finds "
        "fix/fixed/fixes forget/forgot/forgets get/got/gets hide/hid/hides hold/held/holds "
        "keep/kept/keeps like/liked/likes lift/lifted/lifts lose/lost/loses make/made/makes "
        "mend/mended/mends move/moved/moves need/needed/needs notice/noticed/notices "
        "open/opened/opens paint/painted/paints pick/picked/picks pull/pulled/pulls "
        "push/pushed/pushes see/saw/sees sell/sold/sells send/sent/sends show/showed/shows "
        "steal/stole/steals take/took/takes throw/threw/throws touch/touched/touches "
        "try/tried/tries use/used/uses visit/visited/visits want/wanted/wants wash/washed/washes "
        "watch/watched/watches wear/wore/wears write/wrote/writes"
    )
]
IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer",
    "wolf": "wolves", "knife": "knives", "tomato": "tomatoes", "potato": "potatoes",
}  # fmt: skip
_ONSETS = _words("b br c ch d dr f fl g gr h j k kr l m n p pr r s sh st t th tr v w z")
_VOWELS = _words("a e i o u ai ea ee o a e")
_CODAS = ["", "", "", "l", "n", "r", "s", "t", "m", "nd", "x", "rk", "ck", "ll", "ng"]
_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


def plural(noun: str) -> str:
    """Return the plural of an English noun of the lists above."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def in_words(number: int) -> str:
    """Return a number from 0 to 999,999 in English words."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, unit)
    return f"{in_words(head)} {name}" + (f" {in_words(rest)}" if rest else "")


def invented(rng: random.Random) -> str:
    """Return a word of two or three syllables that no dictionary holds."""
    syllables = rng.choice((2, 2, 2, 3))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if i % 2 else "")
        for i in range(syllables)
    )


def person(rng: random.Random) -> str:
    """Return a first name, at times with a surname, at times an invented one."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(NAMES)
    if draw < 0.75:
        return f"{rng.choice(NAMES)} {invented(rng).capitalize()}"
    return invented(rng).capitalize()


def place(rng: random.Random) -> str:
    """Return the name of a town, half of the time an invented one."""
    return rng.choice(PLACES) if rng.random() < 0.5 else invented(rng).capitalize()


def number(rng: random.Random, *, most: int = 6) -> int:
    """Return a number of 1 to `most` digits, each length as likely as the others."""
    digits = rng.randint(1, most)
    value = rng.randrange(10**digits)
    return value if rng.random() < 0.6 or digits < 3 else value // 100 * 100


def code(rng: random.Random) -> str:
    """Return an identifier such as a ticket or a part would have."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(('-', '', '_'))}{rng.randrange(10 ** rng.randint(2, 5))}"
