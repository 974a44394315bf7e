"""One catalogue that many use at once: threads, processes that read while another saves, processes that die."""

import copy
import itertools
import os
import pickle
import random
import signal
import threading
from pathlib import Path

import pytest
import torch

from m6rec import Catalogue, M6RecForRecommendation, RecommendationPipeline, catalogue_m6rec
from m6rec.segment_cache_m6rec import SegmentCache
from tests.fast import some
from tests.modeling_m6rec.faults import finish, fork
from tests.modeling_m6rec.shop import ITEMS, SOURCE, build, processor

MODEL, PROCESSOR = build(), processor()
SLOW = pytest.mark.slow


def make(items=ITEMS):
    return Catalogue.from_dataset(items, MODEL, PROCESSOR, progress=False)


def at_once(count, work):
    """Run `work(number)` in threads that start together; returns what they raised."""
    raised, start = [], threading.Barrier(count)

    def thread(number):
        start.wait()
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 - the test reports whatever a thread raised
            raised.append(repr(error))

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return raised


# ------------------------------------------------------------------------------------------------------------- threads


def pair(thread, number):
    return [{"item_id": f"{side}-{thread}-{number}", "title": f"tent {thread} {number} {side}"} for side in "ab"]


def check_moment(found):
    """Make sure of an answer that it is of one moment: all items that never leave, pairs together, best first."""
    names = {name for name, _ in found}
    assert {item["item_id"] for item in ITEMS} <= names
    assert len(names) == len(found), "an item is there twice"
    assert {name[1:] for name in names if name[0] == "a"} == {name[1:] for name in names if name[0] == "b"}
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    return names


@pytest.mark.parametrize(("index", "calls"), some(itertools.product([None, "hnsw", "ivf"], [20, 500]), [("hnsw", 20)]))
def test_a_pipeline_in_eight_threads(monkeypatch, index, calls):
    """Each answer is of one moment, and a thread sees what it has done itself, whatever the others do meanwhile."""
    if index:
        pytest.importorskip("faiss")
        monkeypatch.setattr(catalogue_m6rec, "EXACT_SHARE", 1.0)
        monkeypatch.setattr(catalogue_m6rec, "EXTRA", 1)
    monkeypatch.setattr(catalogue_m6rec, "REBUILD_ROWS", 12)
    catalogue = make()
    catalogue.build_index(index)
    recommend = RecommendationPipeline(
        model=MODEL, processor=PROCESSOR, catalogue=catalogue, device="cpu", user_states=True
    )
    expected = {row["item_id"]: row["score"] for row in recommend(SOURCE, top_k=99, exclude_seen=False)}

    def work(thread):
        chance, own = random.Random(thread), {}
        for number in range(calls):
            action = chance.random()
            if action < 0.2:
                items = pair(thread, number)
                catalogue.add(items, MODEL, PROCESSOR, progress=False)
                own.update({item["item_id"]: item for item in items})
            elif action < 0.35 and own:
                gone = sorted(own)[0][1:]
                catalogue.remove([f"a{gone}", f"b{gone}"])
                del own[f"a{gone}"], own[f"b{gone}"]
            elif action < 0.5:
                snapshot = catalogue.snapshot()
                assert len(snapshot) == len(list(snapshot)) == len(snapshot.vectors(list(snapshot)))
                check_moment([(name, 0.0) for name in snapshot])
            else:
                named = [{"item": {"item_id": name}} for name in chance.sample(sorted(own), min(len(own), 2))]
                request = {**SOURCE, "history": [*SOURCE["history"], *named]} if action < 0.75 else SOURCE
                answer = recommend(request, top_k=999, exclude_seen=False)
                names = check_moment([(row["item_id"], row["score"]) for row in answer])
                assert {name for name in names if name.split("-")[1:2] == [str(thread)]} == set(own)
                if request is SOURCE:
                    found = {row["item_id"]: row["score"] for row in answer if row["item_id"] in expected}
                    assert found == pytest.approx(expected, abs=1e-5)

    assert at_once(8, work) == []
    again = make([catalogue.item(name) for name in catalogue])
    users = torch.nn.functional.normalize(torch.randn(3, catalogue.dimension), dim=-1)
    for found, own in zip(catalogue.search(users, 9999), again.search(users, 9999)):
        assert dict(found) == pytest.approx(dict(own), abs=1e-5)


def test_the_words_of_items_are_of_one_moment_too():
    catalogue = make()

    def work(thread):
        for number in range(10):
            items = pair(thread, number)
            catalogue.add(items, MODEL, PROCESSOR, progress=False)
            text = items[0]["title"]
            assert catalogue.worded([text], PROCESSOR) == [items[0]["item_id"]]
            catalogue.remove([item["item_id"] for item in items])
            assert catalogue.worded([text], PROCESSOR) == []

    assert at_once(4, work) == []
    catalogue.add([{"item_id": "i2", "title": "a red tent"}], MODEL, PROCESSOR, replace=True)
    assert catalogue.worded(["yoga mat, sport, 21", "a red tent"], PROCESSOR) == ["i2"]


def test_a_catalogue_is_loaded_once_and_what_is_added_meanwhile_stays(tmp_path, monkeypatch):
    MODEL.save_pretrained(tmp_path)
    make().save(tmp_path / "catalogue")
    loads, load = [], Catalogue.load
    monkeypatch.setattr(Catalogue, "load", lambda folder, **more: loads.append(folder) or load(folder, **more))
    for attempt in range(3):
        model = M6RecForRecommendation.from_pretrained(tmp_path)
        recommend = RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu")

        def work(thread, recommend=recommend, model=model):
            recommend.catalogue.add(pair(thread, 0), model, PROCESSOR, progress=False)

        assert at_once(8, work) == []
        assert len(loads) == attempt + 1
        assert len(recommend.catalogue) == len(ITEMS) + 16


def test_a_snapshot_stays_as_it_is():
    catalogue = make()
    before = catalogue.snapshot()
    users = before.vectors(["i2"])
    expected = before.search(users, 99), list(before), before.fields("i0")
    catalogue.remove(["i0"])
    catalogue.add([{"item_id": "i1", "title": "another"}], MODEL, PROCESSOR, replace=True, progress=False)
    catalogue.add(["a text"], MODEL, PROCESSOR, progress=False)
    assert (before.search(users, 99), list(before), before.fields("i0")) == expected
    assert "i0" in before and "i0" not in catalogue
    assert before.fields("i1")["title"] == "men's hooded jacket" and catalogue.fields("i1")["title"] == "another"
    assert len(before) == len(ITEMS) and len(catalogue) == len(ITEMS)
    assert not hasattr(before, "add")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_copies_go_their_own_ways(duplicate):
    catalogue = make()
    other = duplicate(catalogue)
    catalogue.add([{"item_id": "x", "title": "tent"}], MODEL, PROCESSOR, progress=False)
    other.add([{"item_id": "y", "title": "stove"}], MODEL, PROCESSOR, progress=False)
    assert "x" in catalogue and "y" not in catalogue and catalogue.fields("x")["title"] == "tent"
    assert "y" in other and "x" not in other and other.fields("y")["title"] == "stove"


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_has_an_index_of_its_own(kind, duplicate, monkeypatch):
    pytest.importorskip("faiss")
    catalogue = make()
    catalogue.build_index(kind)
    monkeypatch.setattr(catalogue_m6rec, "EXACT_SHARE", 9)
    users = catalogue.vectors(list(catalogue))
    other = duplicate(catalogue)
    assert other.search(users, 2) == catalogue.search(users, 2)
    own, copied = ((each.index.kind, each.index.settings, each.index.given) for each in (catalogue, other))
    assert own == copied and other.index is not catalogue.index
    other.remove(["i0"])
    other.build_index(kind)
    assert "i0" in dict(catalogue.search(users[:1], 1)[0]) and "i0" not in dict(other.search(users[:1], 1)[0])


def test_seen_items_are_recommended_if_the_catalogue_says_so(tmp_path):
    MODEL.save_pretrained(tmp_path)
    catalogue = make()
    assert catalogue.exclude_seen
    catalogue.save(tmp_path / "catalogue")
    assert '"exclude_seen"' not in (tmp_path / "catalogue" / "catalogue.json").read_text()
    catalogue.set_exclude_seen(False)
    catalogue.encode(MODEL, PROCESSOR, progress=False)
    catalogue.save(tmp_path / "catalogue")
    model = M6RecForRecommendation.from_pretrained(tmp_path)
    recommend = RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu")
    assert not recommend.catalogue.exclude_seen and not copy.deepcopy(recommend.catalogue).exclude_seen
    request = {"history": [{"item": {"item_id": "i0"}}]}
    assert len(recommend(request, top_k=99)) == len(ITEMS)
    assert len(recommend(request, top_k=99, exclude_seen=True)) == len(ITEMS) - 1
    with pytest.raises(TypeError, match="exclude_seen='no': give True or False"):
        recommend.catalogue.set_exclude_seen("no")
    path = tmp_path / "catalogue" / "catalogue.json"
    path.write_text(path.read_text().replace('"exclude_seen": false', '"exclude_seen": 0'))
    with pytest.raises(ValueError, match=r"catalogue\.json is damaged: exclude_seen is 0"):
        Catalogue.load(tmp_path / "catalogue")


def test_an_item_that_cannot_be_embedded_changes_nothing(monkeypatch):
    catalogue = make()
    state = catalogue._state
    monkeypatch.setattr(catalogue_m6rec, "_compacted", lambda state: 1 / 0)
    monkeypatch.setattr(catalogue_m6rec, "REBUILD_ROWS", 0)
    with pytest.raises(ZeroDivisionError):
        catalogue.add([{"item_id": "x", "title": "tent"}, {"item_id": "y", "title": "tent"}], MODEL, PROCESSOR)
    monkeypatch.undo()
    assert catalogue._state is state and "x" not in catalogue and list(catalogue) == [item["item_id"] for item in ITEMS]
    catalogue.add([{"item_id": "z", "title": "stove"}], MODEL, PROCESSOR, progress=False)
    assert "x" not in catalogue and catalogue.fields("z")["title"] == "stove"


# ----------------------------------------------------------------------------------------------------------- processes


def die_between_the_renames(catalogue, folder):
    real = os.replace

    def replace(source, target):
        if Path(target) == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    catalogue.save(folder)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=SLOW)])
def test_kills_between_the_renames_of_a_save(tmp_path, kills):
    folder = tmp_path / "catalogue"
    catalogues = [make(ITEMS[:count]) for count in (3, 5)]
    for number in range(kills):
        old, new = catalogues[number % 2], catalogues[(number + 1) % 2]
        old.save(folder)
        assert os.listdir(tmp_path) == ["catalogue"], "the last kill left something behind"
        assert finish(fork(die_between_the_renames, new, folder)) == -signal.SIGKILL
        assert not folder.exists()
        assert list(Catalogue.load(folder, MODEL)) == list(old)
    catalogues[0].save(folder)
    assert os.listdir(tmp_path) == ["catalogue"]
    assert list(Catalogue.load(folder, MODEL)) == list(catalogues[0])


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_pipeline_finds_the_catalogue_of_a_killed_save(tmp_path):
    MODEL.save_pretrained(tmp_path)
    make().save(tmp_path / "catalogue")
    assert finish(fork(die_between_the_renames, make(ITEMS[:2]), tmp_path / "catalogue")) == -signal.SIGKILL
    model = M6RecForRecommendation.from_pretrained(tmp_path)
    recommend = RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu")
    assert len(recommend(SOURCE, top_k=99, exclude_seen=False)) == len(ITEMS)


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("saves", [30, pytest.param(200, marks=SLOW)])
def test_readers_in_other_processes_never_see_half_a_catalogue(tmp_path, saves):
    folder, done = tmp_path / "catalogue", tmp_path / "done"
    catalogues = [make(ITEMS[:count]) for count in (3, 5)]
    known = {tuple(catalogue): catalogue.vectors(list(catalogue)) for catalogue in catalogues}
    catalogues[0].save(folder)

    def read():
        while not done.exists():
            found = Catalogue.load(folder)
            assert torch.equal(found.vectors(list(found)), known[tuple(found)])

    readers = [fork(read) for _ in range(2)]
    for number in range(saves):
        catalogues[number % 2].save(folder)
    done.touch()
    assert [finish(reader) for reader in readers] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["catalogue", "done"]


def test_a_segment_cache_in_eight_threads():
    """States that several threads read at once are those of one thread."""
    cache, ids = SegmentCache(max_bytes=4000), [tuple(each) for each in PROCESSOR.encode_items(ITEMS)]
    expected = [MODEL.item_states(torch.tensor([own]), segment_cache=None) for own in ids]

    def work(thread):
        chance = random.Random(thread)
        for _ in range(30):
            number = chance.randrange(len(ids))
            with torch.no_grad():
                found = MODEL.item_states(torch.tensor([ids[number]]), segment_cache=cache)
            torch.testing.assert_close(found, expected[number].detach())

    assert at_once(8, work) == []
