"""Random requests in English and Chinese, valid ones and invalid ones, of every form that JSON can hold."""

import random

ENGLISH = [
    *("hooded", "rain", "jacket", "waterproof", "hiking", "shoes", "wool", "socks", "for", "men", "café", "naïve"),
    *("O'Neill's", "we'll", "don't", "4K", "HDR-10", "x86"),
]
CHINESE = [
    "防水登山鞋",
    "连帽雨衣",
    "羊毛袜",
    "男士",
    "北京",
    "冲锋衣",
    "，",
    "。",
    "的",
    "动作片",
    "喜剧",
    "10月",
    "３Ｄ",
]
ODD = [
    *(
        "\u00e9",
        "e\u0301",
        "👩‍👩‍👧",
        "🇨🇳",
        "[SEG]",
        "[BOS']",
        "[OPT_0]",
        "\u0130stanbul",
        "ﬁne",
        "Ａ１",
        "مرحبا",
        "שלום",
        "ไทย",
    ),
    *(
        "a\u00a0b",
        "a\u2003b",
        "\ufeffx",
        "x\u0085y",
        "tab\there",
        "two  spaces",
        "line\nbreak",
        "{value}",
        "}{",
        "𝔘𝔫𝔦",
        "１２",
        "٣٤",
    ),
    *(
        "日本語テキスト",
        "한국어",
        "—",
        "…",
        "\u200b",
        "'s",
        "''",
        "___",
        "#1",
        "100%",
        "$5.99",
        "ΟΔΟΣ",
        "ǅ",
        "\U00010600",
    ),
]
SPACES = [" ", "  ", "\t", "\u3000", "\u2028", "\ufeff", "\x1c", "\x85"]
VERBS = [
    "clicked",
    "click",
    "Add_to-list",
    "rate",
    "watch",
    "bought",
    "search",
    "点击",
    "购买",
    "收藏",
    "PURCHASE",
    "hum",
]
TIMES = [
    *(
        "2024-01-05",
        "2024-1-5",
        "2024/01/05 8:30",
        "2024-01-05T08:30:15.25+08:00",
        "2024-01-05 08:30 UTC",
        "20240105T0830",
    ),
    *(
        "2024-W01-5",
        "1704412800",
        " 1704412800000 ",
        "2024-02-30",
        "yesterday",
        "20240105",
        "2024",
        "1e9",
        "2024-01-05T24:00",
    ),
    *("2024-01-05T08:30:15Z", "2024-01-05X08", "0001-01-01", "9999-12-31T23:59:59", "2024-01-05T08:30-0530"),
]
DATES = [*TIMES, "December", "十二月", "2024-12-03", "20241203", "2024-W52", " 2023-07-09 "]
FIELDS = [
    "title",
    "name",
    "year",
    "genres",
    "category",
    "brand",
    "price",
    "color",
    "text",
    "description",
    "x_y",
    "中文",
    "𝔘",
    "ｚ",
]


class Requests:
    """Draws requests; the same seed draws the same ones."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def chance(self, share):
        return self.draw.random() < share

    def either(self, usual, odd, share=0.03):
        """Mostly one of the usual values, sometimes one of the odd ones, of which many are refused."""
        return self.draw.choice(odd if self.chance(share) else usual)

    def text(self, most=6):
        words = []
        for _ in range(self.draw.randint(1, most)):
            source = self.draw.choices([ENGLISH, CHINESE, ODD], [5, 5, 1])[0]
            words.append(self.draw.choice(source))
        text = self.draw.choice(["", " "] if self.chance(0.3) else [" "]).join(words)
        return self.draw.choice(SPACES) + text + self.draw.choice(SPACES) if self.chance(0.1) else text

    def number(self):
        return self.draw.choice(
            [
                0,
                1,
                7,
                -3,
                4.5,
                4.0,
                0.1,
                1e-5,
                2.5e-7,
                123456789,
                99.99,
                1e14,
                0.0001,
                1 / 3,
                1995,
                -0.5,
                5e-324,
                12345.678,
            ]
        )

    def value(self, depth=0):
        draw = self.draw.random()
        if draw < 0.6:
            return self.text()
        if draw < 0.78:
            return self.number()
        if draw < 0.84:
            return self.draw.choice([True, False])
        if draw < 0.9:
            return self.draw.choice([None, "", " ", [], "\ufeff"])
        if depth < 3:
            return [self.value(depth + 1) or 7 for _ in range(self.draw.randint(1, 4))]
        return self.draw.choice([{"a": 1}, [[]], "x"]) if self.chance(0.1) else "deep"

    def item(self):
        if self.chance(0.25):
            return self.text(12)
        names = self.draw.sample(FIELDS, self.draw.randint(1, 5))
        item = {"title": self.text(20 if self.chance(0.1) else 6), **{name: self.value() for name in names}}
        if self.chance(0.7):
            item["item_id"] = self.either(["i1", " i2 ", 3, "03", 4.0, None, "i7"], ["", 1.5, True], 0.02)
        return item

    def moment(self, start):
        draw = self.draw.random()
        if draw < 0.7:
            return start
        if draw < 0.8:
            return float(start) + self.draw.choice([0.5, 0.25])
        return self.draw.choice(TIMES) if draw < 0.81 else start * 1000

    def event(self, start):
        if self.chance(0.15):
            return self.item() if self.chance(0.02) else self.text(10)
        event = {}
        if self.chance(0.8):
            event["event"] = self.draw.choice(VERBS) if self.chance(0.9) else self.text(2)
        if self.chance(0.93) or "event" not in event:
            event["item"] = self.item()
        if self.chance(0.15):
            event[self.draw.choice(["query", "text"])] = self.text()
        if self.chance(0.3):
            event["rating"] = self.either([5, 4.5, 1, "5 stars", 3.0, None], [" ", True])
        if start is not None and self.chance(0.9):
            event["timestamp"] = self.moment(start)
        return event

    def user(self):
        if self.chance(0.2):
            return self.text(8)
        user = {"user_id": 5} if self.chance(0.3) else {}
        if self.chance(0.7):
            user["gender"] = self.draw.choice(["female", " M ", "男", "女", "f", "Woman", "other", 1, ""])
        if self.chance(0.7):
            user["age"] = self.either(
                [34, "34", 0, 150, 8.9, "３４", "٣٤", "old", "", " 61 ", 27.0], [151, -1, True, [30], {"a": 1}]
            )
        for name in self.draw.sample(
            ["occupation", "city", "interests", "text", "zodiac", "职业"], self.draw.randint(0, 3)
        ):
            user[name] = self.value()
        return user

    def now(self, start):
        if self.chance(0.2):
            return self.text()
        now = {"date": self.draw.choice(DATES)} if self.chance(0.6) else {}
        for name in self.draw.sample(["place", "weather", "text", "mood"], self.draw.randint(0, 2)):
            now[name] = self.value()
        if start is not None and self.chance(0.7):
            now["timestamp"] = start + self.draw.choice([0, 30, 4000, 90000, 10**7, 10**8])
        return now

    def stats(self):
        named = [
            {"genre_watched": {"times": self.draw.randint(0, 60), "years": 2}},
            {"views": {"top_percent": self.draw.choice([0.5, 1, 7, 100]), "days": 7}},
            {"ratings": {"top_percent": 3}},
            {"ratings": 12},
            {"item_likes": 40},
            {"sold_this_week": self.value(), "b": "x"},
        ]
        if self.chance(0.05):
            return self.draw.choice([{"views": {"days": 7}}, {"unheard": {"of": 1}}, 5, [None]])
        return self.draw.choice([self.text(), [self.text(), self.draw.choice(named)], self.draw.choice(named)])

    def candidate(self):
        item = self.item()
        return {**item, "stats": self.stats()} if isinstance(item, dict) and self.chance(0.3) else item

    def request(self):
        if self.chance(0.02):
            return self.text()
        start = 1_600_000_000 + self.draw.randint(0, 10**7) if self.chance(0.8) else None
        request = {}
        if self.chance(0.7):
            request["user"] = self.user()
        events = []
        for _ in range(self.draw.choice([0, 1, 2, 3, 5, 9, 14])):
            events.append(self.event(start))
            start = start and start + self.draw.choice([0, 20, 500, 2000, 7000, 10**5, 10**6, 10**7])
        request["history"] = events
        if self.chance(0.5):
            request["now"] = self.now(start)
        if self.chance(0.2):
            request["facts"] = [self.text(10) for _ in range(self.draw.randint(1, 4))]
        if self.chance(0.95):
            request["candidates"] = [self.candidate() for _ in range(self.draw.randint(1, 4))]
        if self.chance(0.01):
            request[self.draw.choice(["text", "histroy"])] = "x"
        return request
