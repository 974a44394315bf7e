"""Sources of text: who is held out, what is read, in which order, and how little of it is in memory."""

import hashlib
import itertools
import json
from collections import Counter

import numpy
import pandas
import psutil
import pytest
from datasets import Dataset

from m6rec.train.rows import corpus
from m6rec.train.rows.corpus import (
    Source,
    StreamedSource,
    held_out,
    history_source,
    item_source,
    raw_source,
    vocabulary_texts,
)

LINES = [f"line {number} 第{number}行" for number in range(300)]


def texts(source):
    return [source[place]["text"] for place in range(len(source))]


def streamed(lines, fraction=0.0):
    return StreamedSource("a stream", lambda: iter(lines), fraction)


# ------------------------------------------------------------------------------------------------------ the two parts


def test_the_hash_alone_decides_what_is_held_out():
    for text in ("", "a", "很长的标题", "x" * 5000, "\ud800"):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        share = int(digest[:16], 16) / 16**16
        assert not held_out(text, share - 1e-9) and held_out(text, share + 1e-9), text
    assert not any(held_out(line, 0.0) for line in LINES)
    assert 15 < sum(held_out(line, 0.1) for line in LINES) < 50


def test_both_ways_of_reading_hold_out_the_same_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*LINES, "", LINES[0], "   "]), encoding="utf-8")
    stored, stream = raw_source(str(path), 0.2), raw_source(str(path), 0.2, streaming=True)
    train = [line for line in LINES if not held_out(line, 0.2)]
    again = train + ([LINES[0]] if LINES[0] in train else [])
    assert texts(stored) == again
    walk = stream.walk(1)
    assert Counter(next(walk)["text"] for _ in again) == Counter(again)
    both = {entry["text"] for entry in stored.validation(1000, 0)}
    assert both == {entry["text"] for entry in stream.validation(1000, 0)} == {*LINES} - {*train}
    assert len(stored.validation(7, 0)) == len(stream.validation(7, 0)) == 7
    assert stored.validation(7, 0) == stored.validation(7, 0) != stored.validation(7, 1)


def test_items_go_by_their_texts_and_histories_by_their_users(run):
    items = item_source(run.log, run.writer, run.processor, 0.4)
    documents = [items.documents[place] for place in items.valid] + [items[place] for place in range(len(items))]
    assert sorted(each["item"]["item_id"] for each in documents) == sorted(run.writer.item_ids)
    for place in range(len(items)):
        item = items[place]["item"]
        assert not held_out(f"{item['title']} {item['year']}", 0.4)
        assert items[place]["text"] == f"{item['title']}, {item['year']}"
    events = history_source(run.writer, run.split.train, 4, 3, 0.4)
    users = {user for user, _ in events.documents.windows}
    assert {events.documents.windows[place][0] for place in events.valid} == {u for u in users if held_out(u, 0.4)}
    assert 0 < len(events.valid) < len(events.documents)


def test_histories_are_the_training_events_each_written_once(run):
    events = history_source(run.writer, run.split.train, 4, 3, 0.0)
    written = []
    for place in range(len(events)):
        user, window = events.documents.windows[place]
        own = run.split.train[run.split.train["user_id"] == user]
        request = events[place]["request"]
        done = [event["item"]["item_id"] for event in request["history"]]
        following = [item["item_id"] for item in request["candidates"]]
        assert done + following == own["item_id"].tolist()[window.start : window.stop]
        assert len(done) <= 4 and 1 <= len(following) <= 3
        assert request.get("user", {}) == run.writer.user(user)
        written += [(user, item) for item in following]
    pairs = zip(run.split.train["user_id"], run.split.train["item_id"])
    assert Counter(written) == Counter(pairs), "and no event that is held out"


# ------------------------------------------------------------------------------------------------------- what is read


def write(folder, kind):
    rows = {"review": ["one, two", "", "三个字", None], "stars": [1, 2, 3, 4]}
    if kind == "folder":
        Dataset.from_dict(rows).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    path = folder / f"texts.{kind}"
    if kind == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        lines = (json.dumps({"review": text, "stars": star}) for text, star in zip(*rows.values()))
        path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "folder"])
def test_tables_of_all_kinds_give_a_column(tmp_path, kind, streaming):
    source = raw_source(f"{write(tmp_path, kind)}#review", 0.0, streaming)
    assert sorted(each["text"] for each in itertools.islice(source.walk(0), 2)) == ["one, two", "三个字"]
    assert source.name.endswith("#review")


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_what_cannot_be_read_is_named(tmp_path, streaming):
    place = write(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"texts.parquet#stars: no column 'stars' of texts; .* one of review"):
        raw_source(f"{place}#stars", 0.0, streaming)
    with pytest.raises(ValueError, match="no column 'reviews' of texts"):
        raw_source(f"{place}#reviews", 0.0, streaming)
    pandas.DataFrame({"one": ["a"], "two": ["b"]}).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="no column of texts is named; write it behind a #, one of one, two"):
        raw_source(str(tmp_path / "two.parquet"), 0.0, streaming)
    pandas.DataFrame({"one": [1]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="there are no texts"):
        raw_source(str(tmp_path / "none.parquet"), 0.0, streaming)
    for missing in ("missing.txt", "missing.csv"):
        with pytest.raises(FileNotFoundError, match=missing):
            raw_source(str(tmp_path / missing), 0.0, streaming)


def test_the_only_column_of_texts_needs_no_name_and_text_comes_first(tmp_path):
    assert texts(raw_source(write(tmp_path, "parquet"), 0.0)) == ["one, two", "三个字"]
    pandas.DataFrame({"title": ["a"], "text": ["b"]}).to_parquet(tmp_path / "both.parquet")
    assert texts(raw_source(str(tmp_path / "both.parquet"), 0.0)) == ["b"]


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_source_without_texts_is_refused(tmp_path, streaming):
    (tmp_path / "blank.txt").write_text("\n  \n\n")
    with pytest.raises(ValueError, match=r"blank.txt holds no text to train on"):
        next(raw_source(str(tmp_path / "blank.txt"), 0.0, streaming).walk(0))


# ---------------------------------------------------------------------------------------------------- order and memory


@pytest.mark.parametrize("size", [1, 20, 299, 5000])
def test_a_stream_is_shuffled_and_each_text_comes_once_a_round(monkeypatch, size):
    monkeypatch.setattr(corpus, "SHUFFLED", size)
    walk = streamed(LINES).walk(3)
    rounds = [[next(walk)["text"] for _ in LINES] for _ in range(3)]
    for each in rounds:
        assert sorted(each) == sorted(LINES)
    assert rounds[0] != rounds[1]
    again = streamed(LINES).walk(3)
    assert [next(again)["text"] for _ in LINES] == rounds[0]
    moved = [abs(LINES.index(text) - place) for place, text in enumerate(rounds[0])]
    assert numpy.mean(moved) > min(size, 300) / 8, "the more are held, the further they go"


def test_stored_documents_come_once_a_round_in_a_new_order():
    source = Source("lines", [{"text": line} for line in LINES], LINES, 0.0)
    walk = source.walk(5)
    rounds = [[next(walk)["text"] for _ in LINES] for _ in range(2)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(LINES) and rounds[0] != rounds[1]


def test_a_stream_is_read_no_further_than_it_must():
    read = itertools.count()

    def endless():
        for number in read:
            yield f"text {number}"

    source = StreamedSource("endless", endless, 0.1)
    walk = source.walk(0)
    for _ in range(5):
        next(walk)
    assert next(read) < 1.3 * (corpus.SHUFFLED + 5)
    assert len(source.validation(10, 0)) == 10 and next(read) < 1.3 * (corpus.SHUFFLED + 5) + 400


def test_a_stream_of_more_than_the_allowed_memory(tmp_path, monkeypatch):
    """Of a file of 160 MB not all is ever held, and the last three quarters take no more than the first did."""
    monkeypatch.setattr(corpus, "SHUFFLED", 100)  # texts of 20 kB each
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        for number in range(8000):
            file.write(f"{number} " * (20_000 // (len(str(number)) + 1)) + "\n")
    assert path.stat().st_size > 150e6
    process = psutil.Process()
    before, used = process.memory_info().rss, []
    for number, _ in enumerate(itertools.islice(raw_source(str(path), 0.0, streaming=True).walk(0), 8000)):
        if number % 50 == 0:
            used.append(process.memory_info().rss)
    assert max(used) - max(used[:40]) < 30e6 and max(used) - before < 140e6


def test_a_vocabulary_comes_from_the_training_part_and_is_bounded(monkeypatch):
    monkeypatch.setattr(corpus, "VOCABULARY_TEXTS", 40)
    monkeypatch.setattr(corpus, "VOCABULARY_CHARACTERS", 6)
    train = [line for line in LINES if not held_out(line, 0.3)]
    stored = Source("lines", [{"text": line} for line in LINES], LINES, 0.3)
    drawn, first = list(vocabulary_texts(stored, 1)), list(vocabulary_texts(streamed(LINES, 0.3), 1))
    assert len(drawn) == len(first) == 40
    assert first == [line[:6] for line in train[:40]]
    assert not Counter(drawn) - Counter(line[:6] for line in train)
    assert drawn == list(vocabulary_texts(stored, 1)) != list(vocabulary_texts(stored, 2))
