"""Last.fm: people as users and as items, and nothing that gives held-out events away."""

from collections import defaultdict

import pytest

from m6rec.train.data.lastfm import DESCRIBED_BY, lastfm_tables
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import hold_out
from tests.conftest import real_data


def write_lastfm(folder, listening, friends, artists=15):
    names = "".join(f"{row}\tArtist {row}\thttp://x\t\n" for row in range(artists))
    (folder / "artists.dat").write_text("id\tname\turl\tpictureURL\n" + names, encoding="utf-8")
    plays = "".join(f"{user}\t{artist}\t{weight}\n" for user, artist, weight in listening)
    (folder / "user_artists.dat").write_text("userID\tartistID\tweight\n" + plays)
    pairs = "".join(f"{one}\t{other}\n" for a, b in friends for one, other in ((a, b), (b, a)))
    (folder / "user_friends.dat").write_text("userID\tfriendID\n" + pairs)
    return folder


@pytest.fixture
def folder(tmp_path):
    listening = [(user, artist, 100 * artist + user) for user in (1, 2) for artist in range(user, user + 12)]
    listening += [(3, 1, 9), (4, 5, 8), (4, 6, 800)]
    return write_lastfm(tmp_path, listening, [(1, 2), (1, 3), (2, 3), (3, 4), (4, 5)])


def read(folder, seed=0):
    events, items, users = lastfm_tables(folder, seed)
    assert users is None
    return events, items.set_index("item_id")


def test_people_are_described_by_what_they_play_most(folder):
    _, items = read(folder)
    assert items["name"]["artist:4"] == "Artist 4"
    assert items["text"]["artist:4"] == ""
    assert items["text"]["user:1"] == "a listener of Artist 12, Artist 11, Artist 10, Artist 9, Artist 8"
    assert items["text"]["user:4"] == "a listener of Artist 6"  # half of two
    assert items["text"]["user:3"] == "a listener of Artist 1"  # all there is
    assert items["text"]["user:5"] == "a listener"
    assert (items["name"].str.cat(items["text"]) != "").all()


def test_every_artist_played_and_every_friendship_is_one_event(folder):
    events, items = read(folder)
    labelled = events[events["event"] == "listen"]
    assert len(labelled) == 27
    assert set(labelled["item_id"]) <= set(items.index)
    assert set(labelled["user_id"][labelled["item_id"] == "artist:1"]) == {"user:1", "user:3"}
    pairs = [{user, friend} for user, friend, event in events.itertuples(index=False) if event == "follow"]
    expected = [{f"user:{one}", f"user:{other}"} for one, other in ((1, 2), (1, 3), (2, 3), (3, 4), (4, 5))]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, expected))


def check_nothing_leaks(log, seed):
    split = hold_out(log.interactions, "shuffled", "fresh", seed)
    told = {}
    for person, text in log.items["text"].items():
        if text:
            told[person] = set(text.removeprefix("a listener of ").split(", "))
    held_out = [*split.valid.itertuples(), *split.test.itertuples()]
    assert held_out
    for event in held_out:
        if event.event == "listen":
            assert log.items["name"][event.item_id] not in told[event.user_id]
    train = {(event.user_id, event.item_id) for event in split.train.itertuples()}
    assert not {(event.item_id, event.user_id) for event in held_out} & train


@pytest.mark.parametrize("seed", range(5))
def test_no_description_and_no_friend_gives_a_held_out_event_away(folder, seed):
    check_nothing_leaks(read_log(DataArguments(source="lastfm", directory=str(folder), seed=seed)), seed)


def test_the_seed_decides_the_order_but_not_what_comes_first(folder):
    first, second = (read(folder, seed)[0] for seed in (0, 1))
    assert read(folder, 0)[0].equals(first)
    assert not first.equals(second)
    for events in (first, second):
        own = events[events["user_id"] == "user:2"]["item_id"]
        assert own.head(DESCRIBED_BY).tolist() == [f"artist:{artist}" for artist in (13, 12, 11, 10, 9)]
        assert own.tolist() != sorted(own)


def test_who_follows_whom_is_a_toss(tmp_path):
    friends = [(user, user + 1000) for user in range(1000, 1400)]
    events, _ = read(write_lastfm(tmp_path, [(1000, 1, 1)], friends))
    counts = defaultdict(int)
    for user in events["user_id"][events["event"] == "follow"]:
        counts[int(user.removeprefix("user:")) < 2000] += 1
    assert 150 < counts[True] < 250  # 200 expected, 10 the standard deviation


def test_missing_columns_are_named(folder):
    (folder / "user_friends.dat").write_text("userID\tother\n1\t2\n")
    with pytest.raises(ValueError, match=r"user_friends\.dat: no column friendID; the columns are userID, other"):
        lastfm_tables(folder, 0)


@pytest.mark.real_data
def test_lastfm_is_complete():
    log = read_log(DataArguments(source="lastfm", directory=str(real_data("lastfm"))))
    assert log.interactions["event"].value_counts().to_dict() == {"listen": 92_834, "follow": 12_717}
    assert (len(log.items), log.interactions["user_id"].nunique()) == (17_632 + 1892, 1892)
    check_nothing_leaks(log, 0)
