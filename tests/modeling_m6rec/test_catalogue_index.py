"""A catalogue with an index finds what exact search finds, or nearly so, whatever was done to it."""

import functools
import json
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from m6rec import Catalogue, M6RecConfig, catalogue_m6rec
from tests.fast import examples, some

faiss = pytest.importorskip("faiss")

WIDTH, KINDS = 8, ("flat", "hnsw", "ivf")
MODEL = SimpleNamespace(fingerprint=lambda: "f" * 64, config=M6RecConfig.preset("tiny", embedding_dim=WIDTH))


@pytest.fixture(scope="module", autouse=True)
def known_vectors():
    """An item's vector is a function of its title, which the twins below know as well."""
    embed = catalogue_m6rec.embed

    def fake(items, model, *rest, **more):
        if model is not MODEL:
            return embed(items, model, *rest, **more)
        return torch.from_numpy(np.array([vector(item["title"]) for item in items], np.float32).reshape(-1, WIDTH))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue_m6rec, "embed", fake)
        yield


@functools.cache
def vector(title):
    """Titles are "cluster/number": clusters lie apart, their members around them."""
    cluster = title.partition("/")[0]
    center, around = (np.random.default_rng(zlib.crc32(name.encode())) for name in (cluster, title))
    mixed = center.standard_normal(WIDTH) + 0.5 * around.standard_normal(WIDTH)
    return (mixed / np.linalg.norm(mixed)).astype(np.float32)


def item(name, title):
    return {"item_id": str(name), "title": title, "parity": int(name) % 2}


def items(count, start=0, titles=10**9, clusters=20):
    """Items of clusters; with few titles, many are equal."""
    return [item(number, f"{number % titles % clusters}/{number % titles}") for number in range(start, start + count)]


def make(rows, kind=None, **given):
    catalogue = Catalogue(MODEL.fingerprint(), WIDTH)
    add(catalogue, rows)
    catalogue.build_index(kind, **given)
    return catalogue


def add(catalogue, rows, **more):
    catalogue.add(rows, MODEL, None, progress=False, **more)


def users(count, seed=0, clusters=20):
    draw = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([vector(f"{draw.integers(clusters)}/user {number}") for number in range(count)]))


def slow_search(rows, user, top_k, left_out=(), allowed=lambda fields: True):
    """All scores, sorted; `rows` are items in the order of insertion."""
    kept = [row for row in rows if row["item_id"] not in left_out and allowed(row)]
    rows = np.array([vector(row["title"]) for row in kept], float).reshape(-1, WIDTH)
    scores = (rows * user.double().numpy()).sum(1).astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [(kept[place]["item_id"], scores[place]) for place in order]


def same(found, expected):
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)


def recall(found, expected):
    hits = [len({name for name, _ in own} & {name for name, _ in other}) for own, other in zip(found, expected)]
    return sum(hits) / sum(map(len, expected))


@pytest.fixture
def by_index_alone(monkeypatch):
    """Let a test fail whose answers come from searching all rows."""

    def refuse(*arguments):
        raise AssertionError("all rows were searched")

    monkeypatch.setattr(catalogue_m6rec, "_search_all", refuse)


# ------------------------------------------------------------------------------------------------------ flat is exact


class Shop(RuleBasedStateMachine):
    """A catalogue with a flat index, and a dictionary of items beside it."""

    @initialize(count=st.integers(0, 500), kind=st.sampled_from(["flat", "flat", None]))
    def begin(self, count, kind):
        self.rows = {row["item_id"]: row for row in items(count, titles=150)}
        self.catalogue, self.next = make(self.rows.values(), kind), count

    @rule(count=st.integers(1, 40))
    def add(self, count):
        fresh = items(count, self.next, titles=150)
        self.next += count
        add(self.catalogue, fresh)
        self.rows |= {row["item_id"]: row for row in fresh}

    @rule(seed=st.integers(0, 99), count=st.integers(1, 5))
    def change(self, seed, count):
        names = self.some(seed, count)
        changed = [item(name, f"{seed % 20}/changed {seed}") for name in names]
        add(self.catalogue, changed, replace=True)
        for row in changed:
            del self.rows[row["item_id"]]
            self.rows[row["item_id"]] = row

    @rule(seed=st.integers(0, 99), count=st.integers(1, 60))
    def remove(self, seed, count):
        names = self.some(seed, count)
        self.catalogue.remove(names)
        for name in names:
            del self.rows[name]

    @rule(kind=st.sampled_from(["flat", None]))
    def index(self, kind):
        self.catalogue.build_index(kind)

    @rule(seed=st.integers(0, 99), top_k=st.integers(1, 12), left_out=st.integers(0, 12), odd=st.booleans())
    def search(self, seed, top_k, left_out, odd):
        asked = users(3, seed)
        # The nearest ones are left out, which hurts most.
        exclude = [[name for name, _ in slow_search(self.rows.values(), user, left_out)] for user in asked[:2]] + [None]
        allowed = (lambda fields: fields["parity"] == 1) if odd else (lambda fields: True)
        found = self.catalogue.search(asked, top_k, exclude, allowed if odd else None)
        for user, own, names in zip(asked, found, exclude):
            same(own, slow_search(self.rows.values(), user, top_k, names or (), allowed))
        assert list(self.catalogue) == list(self.rows)

    def some(self, seed, count):
        names = list(self.rows)
        return [names[place] for place in np.random.default_rng(seed).permutation(len(names))[:count]]


class TestShop(Shop.TestCase):
    settings = settings(
        max_examples=examples(40), stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        """Small catalogues are asked more widely, and rebuilt, as large ones are."""
        monkeypatch.setattr(catalogue_m6rec, "REBUILD_ROWS", 50)
        monkeypatch.setattr(catalogue_m6rec, "EXACT_SHARE", 0.5)
        monkeypatch.setattr(catalogue_m6rec, "EXTRA", 4)


@pytest.mark.usefixtures("by_index_alone")
def test_flat_by_the_index_alone():
    rows = items(1000)
    catalogue = make(rows, "flat")
    for user, own in zip(users(20), catalogue.search(users(20), 10)):
        same(own, slow_search(rows, user, 10))


# ------------------------------------------------------------------------------------------- the others are nearly so


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize(("kind", "least"), some([("hnsw", 0.98), ("ivf", 0.9)], [("hnsw", 0.98)]))
def test_recall(kind, least):
    rows = items(3000)
    catalogue, asked = make(rows, kind), users(40)
    expected = [slow_search(rows, user, 10) for user in asked]
    found = catalogue.search(asked, 10)
    assert recall(found, expected) >= least
    titles = {row["item_id"]: row["title"] for row in rows}
    for own, user in zip(found, asked):
        scores = [np.dot(vector(titles[name]), user.numpy()) for name, _ in own]
        assert [score for _, score in own] == pytest.approx(scores, abs=1e-6)
        assert own == sorted(own, key=lambda pair: -pair[1])


@pytest.mark.parametrize(
    ("kind", "narrow", "wide"),
    [
        ("ivf", {"nlist": 64, "nprobe": 1}, {"nlist": 64, "nprobe": 64}),
        ("hnsw", {"M": 4, "efConstruction": 4, "efSearch": 1}, {"M": 4, "efConstruction": 4, "efSearch": 2000}),
    ],
)
def test_settings_trade_recall_for_time(kind, narrow, wide):
    rows = items(3000, clusters=500)
    asked = users(40, clusters=500)
    expected = [slow_search(rows, user, 10) for user in asked]
    little, much = (
        recall([[(str(row), 0) for row in own.rows.tolist()] for own in index.search(asked, 10)], expected)
        for index in (make(rows, kind, **given).index for given in (narrow, wide))
    )
    assert little < 0.9 and much >= 0.999


def test_settings_in_force():
    assert make(items(400), "ivf").index.settings == {"nlist": 10, "nprobe": 8, "seed": 1234}
    assert make(items(2500), "ivf", nprobe=3, seed=5).index.settings == {"nlist": 64, "nprobe": 3, "seed": 5}
    assert make(items(9), "hnsw", M=5).index.settings == {"M": 5, "efConstruction": 80, "efSearch": 64}
    graph = make(items(400), "hnsw", M=5, efConstruction=17).index._index
    assert graph.hnsw.nb_neighbors(1) == 5 and graph.hnsw.efConstruction == 17


def test_ivf_is_seeded():
    rows, asked = items(2000, clusters=500), users(30, clusters=500)
    first, again, other = (make(rows, "ivf", nprobe=1, seed=seed).index.search(asked, 10) for seed in (1, 1, 2))
    assert all(torch.equal(own.rows, twin.rows) for own, twin in zip(first, again))
    assert not all(torch.equal(own.rows, twin.rows) for own, twin in zip(first, other))


# -------------------------------------------------------------------------------------- never fewer than there are


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_that_leaves_little_is_answered_in_full(kind):
    rows = items(1500)
    catalogue, rare = make(rows, kind), {"3", "700", "1444", "1445"}
    for user, own in zip(users(5), catalogue.search(users(5), 3, filter=lambda fields: fields["item_id"] in rare)):
        same(own, slow_search([row for row in rows if row["item_id"] in rare], user, 3))
    assert len(catalogue.search(users(1), 9, filter=lambda fields: fields["item_id"] in rare)[0]) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["removed", "excluded", "filtered"])
def test_the_nearest_may_all_be_gone(kind, way):
    rows = items(2000)
    catalogue, user = make(rows, kind), users(1)
    gone = [name for name, _ in slow_search(rows, user[0], 300)]
    left = [row for row in rows if row["item_id"] not in {*gone}]
    more = {}
    if way == "removed":
        catalogue.remove(gone)
        assert catalogue.index is not None and len(catalogue.index._index.reconstruct_n(0, 2000)) == 2000  # not rebuilt
    elif way == "excluded":
        more["exclude"] = [gone]
    else:
        more["filter"] = lambda fields: fields["item_id"] not in gone
    found = catalogue.search(user, 20, **more)[0]
    assert len(found) == 20 and {name for name, _ in found}.isdisjoint(gone)
    assert recall([found], [slow_search(left, user[0], 20)]) >= 0.9


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_sees_few_items(kind):
    catalogue, seen = make(items(3000), kind), []

    def odd(fields):
        seen.append(fields["item_id"])
        return fields["parity"] == 1

    found = catalogue.search(users(1), 5, filter=odd)[0]
    assert len(found) == 5 and all(int(name) % 2 for name, _ in found)
    assert len(seen) == len({*seen}) < 200


@pytest.mark.parametrize(("kind", "titles"), [("flat", 20), ("ivf", 20), ("hnsw", 100)])
def test_equal_items_keep_their_order(kind, titles):
    """Up to sixty equal ones, of which an index finds any."""
    rows = items(1200, titles=titles)
    catalogue = make(rows[:1000], kind)
    add(catalogue, rows[1000:])
    for user in users(5):
        found = catalogue.search(user[None], 7)[0]
        assert [name for name, _ in found] == [name for name, _ in slow_search(rows, user, 7)]
        assert len({score for _, score in found}) == 1


# ------------------------------------------------------------------------------------------------------------ changes


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_seen_at_once(kind):
    catalogue, user = make(items(1000), kind), torch.from_numpy(vector("99/new"))[None]

    def first():
        return catalogue.search(user, 1)[0][0]

    add(catalogue, [item(5000, "99/new")])
    assert first() == ("5000", pytest.approx(1))
    catalogue.remove(["5000"])
    assert first()[0] != "5000"
    add(catalogue, [item(7, "99/new")], replace=True)
    assert first() == ("7", pytest.approx(1)) and catalogue.fields("7")["title"] == "99/new"
    add(catalogue, [item(7, "3/else")], replace=True)
    assert first()[0] != "7" and len(catalogue) == 1000


def test_the_index_is_rebuilt_once_enough_has_changed():
    catalogue = make(items(20_000), "flat")
    index = catalogue.index
    add(catalogue, items(1500, 20_000))
    catalogue.remove([str(number) for number in range(500)])
    assert catalogue.index is index and index._index.ntotal == 20_000
    catalogue.remove(["500"])
    assert catalogue.index is not index and catalogue.index._index.ntotal == len(catalogue) == 20_999
    small = make(items(100), "flat")
    index = small.index
    add(small, items(1024, 100))
    assert small.index is index
    add(small, items(1, 2000))
    assert small.index is not index


def test_nothing_changes_where_rebuilding_fails(monkeypatch):
    rows = items(1500)
    catalogue = make(rows[:400], "flat")

    def fail(*arguments):
        raise MemoryError("no memory left")

    monkeypatch.setattr(catalogue_m6rec, "VectorIndex", fail)
    with pytest.raises(MemoryError):
        add(catalogue, rows[400:])
    monkeypatch.undo()
    for expected in (rows[:400], rows):
        assert catalogue.index.kind == "flat" and list(catalogue) == [row["item_id"] for row in expected]
        same(catalogue.search(users(1), 9)[0], slow_search(expected, users(1)[0], 9))
        if len(expected) == 400:
            add(catalogue, rows[400:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 30])
def test_small_and_empty_catalogues(kind, count, tmp_path):
    rows = items(count)
    catalogue = make(rows, kind)
    same(catalogue.search(users(1), 5)[0], slow_search(rows, users(1)[0], 5))
    catalogue.save(tmp_path / "kept")
    catalogue = Catalogue.load(tmp_path / "kept")
    more = items(600, count)
    add(catalogue, more)
    same(catalogue.search(users(1), 5)[0], slow_search(rows + more, users(1)[0], 5))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_may_be_searched_for_more_than_it_has(kind):
    for count in (0, 3):
        index = catalogue_m6rec.VectorIndex(kind, {}, users(count) if count else users(1)[:0])
        (found,) = index.search(users(1), 10)
        assert sorted(found.rows.tolist()) == list(range(count)) and found.floor == -torch.inf


def test_fewer_items_than_lists(capfd):
    catalogue = make(items(500), "ivf", nlist=1000, nprobe=1000)
    assert catalogue.index.settings["nlist"] == 500 // 39
    same(catalogue.search(users(1), 5)[0], slow_search(items(500), users(1)[0], 5))
    assert "WARNING clustering" not in capfd.readouterr().err  # FAISS's own, which leaves the user helpless


# ------------------------------------------------------------------------------------------------------------ keeping


def test_what_is_saved_comes_back_with_its_index(tmp_path):
    catalogue = make(items(1000), "ivf", nprobe=3)
    add(catalogue, items(50, 1000))
    catalogue.remove(["4"])
    catalogue.save(tmp_path / "kept")
    assert catalogue.index._index.ntotal == 1049
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "catalogue.json", "items.parquet", "vectors.safetensors",
    ]  # fmt: skip
    again = Catalogue.load(tmp_path / "kept")
    assert (again.index.kind, again.index.given) == ("ivf", {"nprobe": 3})
    assert again.search(users(9), 7) == catalogue.search(users(9), 7)
    index = catalogue.index
    catalogue.save(tmp_path / "kept")
    assert catalogue.index is index  # nothing had changed
    assert Catalogue.load(tmp_path / "kept", index=None).index is None
    assert Catalogue.load(tmp_path / "kept", index="flat").index.kind == "flat"
    again.build_index(None)
    again.save(tmp_path / "kept")
    assert Catalogue.load(tmp_path / "kept").index is None


def test_a_manifest_from_before_there_were_indexes(tmp_path):
    make(items(5)).save(tmp_path / "kept")
    path = tmp_path / "kept" / "catalogue.json"
    manifest = json.loads(path.read_text())
    del manifest["index"]
    path.write_text(json.dumps(manifest))
    assert Catalogue.load(tmp_path / "kept").index is None


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("hnsw", r"catalogue\.json is damaged: index is 'hnsw'"),
        ({"kind": "hnsw"}, "damaged"),
        ({"settings": {}}, "damaged"),
        ({"kind": None, "settings": {}}, "no index None"),
        ({"kind": ["hnsw"], "settings": {}}, r"no index \['hnsw'\]"),
        ({"kind": "hnsw", "settings": 7}, "got 7"),
        ({"kind": "lsh", "settings": {}}, "'lsh'"),
        ({"kind": "hnsw", "settings": {"M": 10**12}}, "M=1000000000000"),
    ],
)
def test_strange_indexes_in_a_manifest(tmp_path, index, match):
    make(items(5)).save(tmp_path / "kept")
    path = tmp_path / "kept" / "catalogue.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "index": index}))
    with pytest.raises(ValueError, match=match):
        Catalogue.load(tmp_path / "kept")


def test_without_faiss(tmp_path, monkeypatch):
    make(items(900), "hnsw", M=7).save(tmp_path / "kept")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        make(items(5)).build_index("flat")
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        Catalogue.load(tmp_path / "kept", index="hnsw")
    warned = []
    monkeypatch.setattr(catalogue_m6rec.logger, "warning_once", warned.append)
    catalogue = Catalogue.load(tmp_path / "kept")
    assert catalogue.index is None and "pip install faiss-cpu" in warned[0]
    same(catalogue.search(users(1), 5)[0], slow_search(items(900), users(1)[0], 5))
    catalogue.save(tmp_path / "kept")
    monkeypatch.undo()
    again = Catalogue.load(tmp_path / "kept")  # the wish was kept
    assert (again.index.kind, again.index.given) == ("hnsw", {"M": 7})


@pytest.mark.parametrize(
    ("kind", "given", "match"),
    [
        ("lsh", {}, "no index 'lsh'"),
        ("flat", {"nlist": 3}, "'nlist': it takes none"),
        ("hnsw", {"nlist": 3}, "'nlist': it takes M, efConstruction, efSearch"),
        ("ivf", {"nprobe": 0}, "nprobe=0"),
        ("ivf", {"nlist": 2.5}, r"nlist=2\.5"),
        ("hnsw", {"M": True}, "M=True"),
        ("hnsw", {"M": 1}, "M=1"),
        (None, {"M": 8}, "leave out M"),
    ],
)
def test_bad_indexes(kind, given, match):
    catalogue = make(items(5), "flat")
    with pytest.raises(ValueError, match=match):
        catalogue.build_index(kind, **given)
    assert catalogue.index.kind == "flat"


# ------------------------------------------------------------------------------------------------- beside torch, above


def test_faiss_has_as_many_threads_as_torch(monkeypatch):
    catalogue, counts = make(items(1000), "flat"), []
    search = catalogue.index._index.search
    monkeypatch.setattr(
        catalogue.index,
        "_index",
        SimpleNamespace(
            ntotal=1000, search=lambda *asked: (counts.append(faiss.omp_get_max_threads()), search(*asked))[1]
        ),
    )
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    try:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(2)
        own = faiss.omp_get_max_threads()  # torch's as well, if FAISS was imported after it
        catalogue.search(users(1), 3)
        assert counts == [2] and faiss.omp_get_max_threads() == own and torch.get_num_threads() == 2
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def test_encoding_again_builds_the_index_again():
    catalogue = make(items(400), "flat")
    index = catalogue.index
    catalogue.encode(MODEL, None, progress=False)
    assert catalogue.index is not index and catalogue.index.kind == "flat"
