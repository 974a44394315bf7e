"""Reviews: repeated texts and texts of the same second are left out, and no text of one part is read in another."""

import gzip
import json

import pandas
import pytest

from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.reviews import CARDS, CLOTHES
from tests.conftest import real_data


def write_clothes(folder, articles=10, each=4):
    rows = [
        {
            "Clothing ID": article,
            "Age": 30 + number,
            "Review Text": f"I like {article}\r\r{number}. It fits well" if number else f"too small {article}",
            "Rating": 5 if number else 2,
            "Class Name": "Dresses",
            "Department Name": "Dresses",
        }
        for article in range(articles)
        for number in range(each)
    ]
    rows += [{**rows[1], "Clothing ID": 1}, {**rows[1], "Review Text": None}, {**rows[1], "Class Name": None}]
    pandas.DataFrame(rows).to_parquet(folder / CLOTHES, compression="brotli")
    return folder


def write_cards(folder):
    texts = ("Nice gift &amp; fast.", "For my niece", "nice gift & FAST", "", "Good")
    rows = [
        {"reviewerID": f"u{user}", "asin": f"c{place % 3}", "unixReviewTime": 10**9 + place, "reviewText": text}
        for user in range(10)
        for place, text in enumerate(texts)
    ]
    rows += [{**rows[0], "asin": "c2", "reviewText": "pasted"}]
    rows = [{**row, "overall": 5.0} for row in rows]
    cards = [{"asin": "c0", "title": "Card &amp; box", "brand": "B", "description": ["A card. " + "long " * 40]}]
    for name, lines in zip(CARDS, (rows, cards)):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(map(json.dumps, lines)))
    return folder


def test_clothes(tmp_path):
    log = read_log(DataArguments(source="clothing-reviews", directory=str(write_clothes(tmp_path))))
    events = log.interactions
    assert len(events) == 30 and events["user_id"].nunique() == 30 and (events["rating"] == 5).all()
    assert events["text"].iloc[0] == "I like 0 1. It fits well"
    parts = events.groupby("item_id", observed=True)["part"].agg(["first", "nunique"])
    assert (parts["nunique"] == 1).all() and sorted(parts["first"]) == ["test"] + ["train"] * 8 + ["valid"]
    for user, item, text in zip(events["user_id"], events["item_id"], events["text"]):
        facts = log.user_fields(user)["facts"].splitlines()
        assert len(facts) == 2 and all(item in fact.split(".")[0].split() for fact in facts), "of the same article"
        assert not any(text.startswith(fact) for fact in facts), "of other reviews"
    assert log.item_fields("3") == {"category": "dresses", "department": "dresses"}


def test_gift_cards(tmp_path):
    log = read_log(DataArguments(source="gift-cards", directory=str(write_cards(tmp_path))))
    events = log.interactions
    own = events[events["user_id"] == "u0"]
    assert own["text"].tolist() == ["Nice gift & fast.", "For my niece", "Good"]
    assert (events.groupby("user_id", observed=True)["part"].nunique() == 1).all()
    assert set(events["part"]) == {"train", "valid", "test"}
    assert log.item_fields("c0") == {"title": "Card & box", "brand": "B", "description": "A card."}
    assert log.item_fields("c1") == {"title": "gift card"}


def test_the_real_reviews():
    for source in ("clothing-reviews", "gift-cards"):
        log = read_log(DataArguments(source=source, directory=str(real_data(source))))
        events = log.interactions
        assert len(events) > 1000 and (events["text"] != "").all()
        if source == "gift-cards":
            texts = events["user_id"].astype(str) + events["text"].str.lower()
            assert texts.is_unique


def test_missing_files(tmp_path):
    for source, name in (("clothing-reviews", CLOTHES), ("gift-cards", CARDS[0])):
        with pytest.raises(FileNotFoundError, match=f"{name}.*expected the folder of {source}"):
            read_log(DataArguments(source=source, directory=str(tmp_path)))
