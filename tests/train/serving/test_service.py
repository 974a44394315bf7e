"""A service answers as the pipeline does, contains every acknowledged write, and refuses what it cannot use."""

import asyncio
import json
import random
import re
import shutil
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from m6rec.train.answering.loading import load_pipeline
from m6rec.train.cli import main
from m6rec.train.serving import app, command
from m6rec.train.serving.app import make_app
from m6rec.train.serving.service import Settings, has_wide_joint_layers
from tests.fast import examples, some
from tests.train.serving.client import TOKEN, Client, serving


def click(user, item, **more):
    return {"user_id": user, "event": "clicked", "item": {"item_id": item}, **more}


def ids(answer):
    return [row["item_id"] for row in answer["items"]]


def check(served, tmp_path, test, **more):
    """Run a coroutine with the client of a service."""

    async def whole():
        async with serving(served, tmp_path / "events.sqlite", **more) as client:
            return await test(client)

    return asyncio.run(whole())


def test_answers_are_those_of_the_pipeline_of_the_same_events(served, tmp_path):
    recommend = load_pipeline(str(served))
    names = [item for item in recommend.catalogue]
    rng, requests = random.Random(0), []
    for number in range(24):
        own = {"user_id": f"u{number % 5}", "top_k": rng.randint(1, 12), "exclude_seen": rng.random() < 0.5}
        own |= rng.choice([{}, {"filter": {"brand": f"b{number % 5}"}}, {"block": rng.sample(names, 3)}])
        own |= rng.choice([{}, {"user": "a man"}, {"history": ["yoga mat"]}, {"task": "click", "top_k": 3}])
        requests.append(own)
    events = [click(f"u{rng.randrange(5)}", rng.choice(names), timestamp=1.7e9 + 10 * n) for n in range(40)]

    async def test(client):
        for event in events:
            await client.post("/events", event)
        return await asyncio.gather(*[client.post("/recommend", request) for request in requests])

    for request, answer in zip(requests, check(served, tmp_path, test)):
        own = {name: value for name, value in request.items() if name != "user_id"}
        past = [{**event} for event in events if event["user_id"] == request["user_id"]]
        history = [{name: value for name, value in event.items() if name != "user_id"} for event in past]
        expected = recommend({**own, "history": [*history, *own.get("history", [])]})
        for row, other in zip(answer["items"], expected, strict=True):
            assert row["score"] == pytest.approx(other["score"], abs=1e-5)
            assert {**row, "score": 0} == {**other, "score": 0}


def test_every_endpoint(served, tmp_path):
    async def test(client):
        assert (await client.call("GET", "/health"))[1]["status"] == "ok"
        ready = (await client.call("GET", "/ready"))[1]
        assert ready["items"] == 38 and len(ready["digest"]) == 64
        assert await client.post("/events", [click("ann", "p1"), click("ann", "p2")]) == {"written": 2}
        rows = (await client.post("/explain", {"user_id": "ann", "top_k": 2}))["items"]
        assert [reason["item_id"] for reason in rows[0]["because"]] in (["p1", "p2"], ["p2", "p1"])
        scored = await client.post("/score", {"user_id": "ann", "candidates": [{"item_id": "p3"}, "tent"]})
        assert {row.get("item_id") for row in scored["items"]} == {"p3", None}
        status, similar = await client.call("GET", "/similar/p3?top_k=4")
        catalogue = client.worker.service.loaded.recommend.catalogue
        near = catalogue.search(catalogue.vectors(["p3"]), 4, [["p3"]])[0]
        assert status == 200 and [(row["item_id"], row["score"]) for row in similar["items"]] == near
        assert await client.post("/items", {"item_id": 7, "title": "red tent"}) == {"item_ids": ["7"]}
        assert ids(await client.post("/recommend", {"user": "x", "filter": {"item_id": 7}})) == ["7"]
        status, removed = await client.call("DELETE", "/items/7", None, TOKEN)
        assert (status, removed) == (200, {"removed": "7"})
        assert ids(await client.post("/recommend", {"user": "x", "filter": {"item_id": 7}})) == []
        assert (await client.call("DELETE", "/users/ann", None, TOKEN))[1] == {"deleted_events": 2}
        status, _, text = await client.raw("GET", "/metrics")
        assert b'm6rec_requests_total{endpoint="events",status="200"} 1.0' in text
        assert b"m6rec_events_written_total 2.0" in text
        status, _, text = await client.raw("GET", "/openapi.json")
        paths = json.loads(text)["paths"]
        assert {"/recommend", "/similar/{item_id}", "/events", "/users/{user_id}"} <= set(paths)
        assert paths["/events"]["post"]["security"] and "422" in paths["/score"]["post"]["responses"]

    check(served, tmp_path, test)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "match"),
    [
        ("POST", "/recommend", b"{", 422, "no valid JSON"),
        ("POST", "/recommend", b"[" * 4000, 422, "deep"),
        ("POST", "/recommend", b"[]", 422, "expected a request"),
        ("POST", "/recommend", b'{"user_id": ""}', 422, "user_id"),
        ("POST", "/recommend", b'{"user_id": "a\\u0000"}', 422, "NUL"),
        ("POST", "/recommend", b'{"top_k": -1}', 422, "top_k=-1"),
        ("POST", "/recommend", b'{"history": 5}', 422, "history"),
        ("POST", "/recommend", b'{"histroy": []}', 422, "histroy"),
        ("POST", "/recommend", b'{"history": [' + b'"a",' * 11 + b'"a"]}', 422, "takes 10"),
        ("POST", "/recommend", b'"' + b"a" * 5000 + b'"', 413, "4,096"),
        ("POST", "/score", b'{"user": "a"}', 422, "candidates"),
        ("POST", "/score", b'{"candidates": [' + b'"a",' * 11 + b'"a"]}', 422, "takes 10"),
        ("POST", "/events", b'{"item": {"item_id": "p1"}}', 422, r"events\[0\]\.user_id"),
        ("POST", "/events", b'[{"user_id": "a", "item": {"item_id": "zz"}}]', 422, "'zz' is not in the catalogue"),
        ("POST", "/events", b'[{"user_id": "a", "event": 5, "item": "x"}]', 422, r"events\[0\]\.event"),
        ("POST", "/events", b'[{"user_id": "a", "item": "x", "timestamp": "soon"}]', 422, r"events\[0\]\.timestamp"),
        ("POST", "/events", b"[]", 422, "none"),
        ("POST", "/items", b'{"title": "x"}', 422, r"items\[0\]\.item_id"),
        ("POST", "/items", b'{"item_id": "x"}', 422, "no text"),
        ("DELETE", "/items/zz", b"", 404, "zz"),
        ("GET", "/similar/zz", b"", 404, "zz"),
        ("GET", "/similar/p1?top_k=0", b"", 422, "top_k"),
        ("POST", "/reload", b'{"path": "x"}', 422, "model"),
        ("POST", "/reload", b'{"model": "nowhere/at-all"}', 422, "nowhere/at-all"),
        ("POST", "/reload", b'{"digest": "0000"}', 409, "not 0000"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(client, method, path, body, status, match):
    found, _, content = client(method, path, body, TOKEN)
    assert found == status and re.search(match, json.loads(content)["error"])
    assert client("POST", "/recommend", b'{"user": "a man", "top_k": 1}')[0] == 200


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    """A function that sends one request to a service with small limits."""
    loop = asyncio.new_event_loop()
    limits = {"max_body": 4096, "max_events": 10, "max_candidates": 10}
    running = serving(served, tmp_path_factory.mktemp("store") / "events.sqlite", **limits)
    own = loop.run_until_complete(running.__aenter__())
    yield lambda *given: loop.run_until_complete(own.raw(*given))
    loop.run_until_complete(running.__aexit__(None, None, None))
    loop.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["user_id", "user", "history", "candidates", "now", "facts", "text", "task", "top_k", "filter", "explain", "pin"]
KEYS += ["block", "boost", "diversity", "exit_confidence", "exclude_seen", "item", "item_id", "event", "timestamp"]


@pytest.mark.parametrize("block", some(range(34), [0]))
def test_no_request_ends_in_an_error_of_the_server(client, block):
    """All blocks together send more than 10,000 requests; hypothesis becomes slower with each one of a block."""
    quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "database": None}

    @seed(block)
    @settings(max_examples=examples(250), **quiet)
    @given(
        st.sampled_from(["/recommend", "/score", "/explain", "/events", "/items", "/reload"]),
        st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON,
    )
    def bodies(path, body):
        status, _, content = client("POST", path, json.dumps(body).encode(), TOKEN)
        assert status in (200, 409, 413, 422) and json.loads(content)

    @seed(block)
    @settings(max_examples=examples(60), **quiet)
    @given(st.sampled_from(["/similar/", "/items/", "/users/"]), st.text(st.characters(exclude_categories=["Cs"])))
    def paths(path, name):
        method = "GET" if path == "/similar/" else "DELETE"
        assert client(method, path + name, b"", TOKEN)[0] in (200, 404, 405, 422)

    bodies()
    paths()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}])
def test_only_who_has_the_token_writes(client, headers):
    for method, path in [("POST", "/events"), ("POST", "/items"), ("DELETE", "/items/p1"), ("DELETE", "/users/a")]:
        assert client(method, path, b"{}", headers)[0] == 401
    assert client("POST", "/reload", b"{}", headers)[0] == 401
    assert client("POST", "/recommend", b'{"user": "x"}', headers)[0] == 200


def test_events_that_arrive_together_are_refused_by_themselves(served, tmp_path):
    async def test(client):
        looks, slow = [], client.worker.service.sync
        client.worker.service.sync = lambda: looks.append(1) or slow()
        given = [click("ann", f"p{number}") if number % 3 else {"user_id": "ann"} for number in range(30)]
        found = await asyncio.gather(*[client.call("POST", "/events", event, TOKEN) for event in given])
        assert [status for status, _ in found] == [200 if number % 3 else 422 for number in range(30)]
        assert all("events[0]" in content["error"] for status, content in found if status == 422)
        assert len(looks) < 10
        rows = (await client.post("/explain", {"user_id": "ann", "top_k": 1}))["items"]
        assert {own["item_id"] for own in rows[0]["because"]} == {f"p{n}" for n in range(30) if n % 3}

    check(served, tmp_path, test)


def test_two_workers_are_one_service(served, tmp_path):
    """Each write is in every answer that is asked for afterwards, whichever worker gives it."""

    async def test():
        store = tmp_path / "events.sqlite"
        async with serving(served, store) as first, serving(served, store) as second:
            rng = random.Random(0)
            for number in range(20):
                one, other = rng.sample([first, second], 2)
                item = {"item_id": f"new{number}", "title": f"lamp {number}"}
                await one.post("/items", item)
                await other.post("/events", click("ann", item["item_id"]))
                rows = (await one.post("/explain", {"user_id": "ann", "top_k": 1}))["items"]
                assert item["item_id"] in {reason.get("item_id") for reason in rows[0]["because"]}
                found = await other.post("/recommend", {"user": "x", "filter": {"item_id": item["item_id"]}})
                assert ids(found) == [item["item_id"]]
            await first.call("DELETE", "/items/new3", None, TOKEN)
            assert ids(await second.post("/recommend", {"user": "x", "filter": {"item_id": "new3"}})) == []
            # An event of a removed item is still read.
            rows = (await second.post("/explain", {"user_id": "ann", "top_k": 1}))["items"]
            assert any("lamp 3" in reason["event"] for reason in rows[0]["because"])
            await second.call("DELETE", "/users/ann", None, TOKEN)
            rows = (await first.post("/explain", {"user_id": "ann", "top_k": 1}))["items"]
            assert rows[0]["because"] == []

    asyncio.run(test())


def test_a_restart_knows_all_that_was_written(served, tmp_path):
    async def write(client):
        await client.post("/items", [{"item_id": "tent", "title": "red tent"}, {"item_id": "p1", "title": "changed"}])
        await client.post("/events", [click("ann", "tent"), click("ann", "p1")])
        await client.call("DELETE", "/items/p2", None, TOKEN)

    async def read(client):
        rows = (await client.post("/explain", {"user_id": "ann", "top_k": 50, "exclude_seen": False}))["items"]
        found = {row["item_id"] for row in rows}
        assert len(rows) == 38 and "tent" in found and "p2" not in found
        assert "changed" in {row["item"] for row in rows}
        assert {reason["item_id"] for reason in rows[0]["because"]} == {"tent", "p1"}

    check(served, tmp_path, write)
    check(served, tmp_path, read)


def test_a_model_is_replaced_while_requests_are_answered(served, another, tmp_path):
    async def test():
        store = tmp_path / "events.sqlite"
        async with serving(served, store) as first, serving(served, store) as second:
            await first.post("/items", {"item_id": "tent", "title": "red tent"})
            request = {"user": "a man", "history": ["yoga mat"], "top_k": 50, "exclude_seen": False}
            before = await first.post("/recommend", request)
            statuses, done = [], asyncio.Event()

            async def ask():
                while not done.is_set():
                    statuses.append((await first.call("POST", "/recommend", request))[0])

            asking = asyncio.create_task(ask())
            answer = await first.post("/reload", {"model": str(another)})
            done.set()
            await asking
            assert set(statuses) == {200} and answer["model"] == str(another)
            after = await first.post("/recommend", request)
            assert "tent" in ids(after) and len(after["items"]) == 39
            assert [row["score"] for row in after["items"]] != [row["score"] for row in before["items"]]
            until = time.monotonic() + 60  # the other worker follows
            while (await second.call("GET", "/ready"))[1]["digest"] != answer["digest"]:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            assert ids(await second.post("/recommend", request)) == ids(after)
        async with serving(served, store) as third:  # also after a restart
            assert (await third.call("GET", "/ready"))[1]["digest"] == answer["digest"]

    asyncio.run(test())


def test_nothing_of_a_deleted_user_stays(served, tmp_path):
    secret = "a text that only ann wrote"

    async def test(client):
        await client.post("/events", {"user_id": "ann", "query": secret})
        await client.post("/recommend", {"user_id": "ann", "user": "ann herself"})
        loaded = client.worker.service.loaded.recommend
        assert len(loaded.user_states) and secret in str(loaded.processor._texts)
        assert (await client.call("DELETE", "/users/ann", None, TOKEN))[0] == 200
        assert not len(loaded.user_states) and not len(loaded.segment_cache) and not len(loaded.segment_cache.table)
        assert secret not in str(loaded.processor._texts) and "ann herself" not in str(loaded.processor._texts)
        assert not [path for path in tmp_path.iterdir() if secret.encode() in path.read_bytes()]
        assert (await client.post("/recommend", {"user_id": "ann", "top_k": 3}))["items"]

    check(served, tmp_path, test, user_states=True)


@pytest.mark.parametrize(("words", "threads"), [([], 1), (["--threads", "3"], 3)])
def test_a_worker_computes_with_one_thread_unless_it_is_given_more(monkeypatch, words, threads):
    found = []
    monkeypatch.setattr(command, "serve", lambda settings, *_: found.append(settings.threads))
    assert main(["serve", "a-model", *words]) == 0
    assert found == [threads]


def test_states_of_histories_are_kept_where_joint_layers_are_wide_or_users_are_read_by_ids():
    def model(reads_sources, layers, width):
        return SimpleNamespace(
            reads_sources=reads_sources, config=SimpleNamespace(num_joint_layers=layers, hidden_size=width)
        )

    assert not has_wide_joint_layers(model(True, 1, 128)) and not has_wide_joint_layers(model(True, 1, 256))
    assert has_wide_joint_layers(model(True, 2, 384)) and has_wide_joint_layers(model(False, 1, 128))


@pytest.mark.parametrize("shared", [False, True])
def test_one_of_several_workers_closes_some_connections(served, tmp_path, monkeypatch, shared):
    async def test(client):
        client.worker.metrics.shared = shared
        found = []
        for number in (0.5, 0.0, 0.9):
            monkeypatch.setattr(app.random, "random", lambda number=number: number)
            status, headers, _ = await client.raw("POST", "/recommend", b'{"user": "x"}')
            assert status == 200
            found.append(headers.get("connection"))
        assert found == [None, "close" if shared else None, None]

    check(served, tmp_path, test)


def test_old_events_are_deleted(served, tmp_path):
    async def test(client):
        now = time.time()
        await client.post("/events", [click("ann", "p1", timestamp=now - 3 * 86400), click("ann", "p2")])
        assert client.worker.service.expire() == 1
        rows = (await client.post("/explain", {"user_id": "ann", "top_k": 1}))["items"]
        assert [reason["item_id"] for reason in rows[0]["because"]] == ["p2"]

    check(served, tmp_path, test, retention_days=2)


def test_a_service_that_loads_says_so_and_one_that_cannot_load_is_not_healthy(served, tmp_path):
    async def test():
        app = make_app(Settings(str(served), str(tmp_path / "a.sqlite")))
        async with app.router.lifespan_context(app):
            client = Client(app)
            status, headers, _ = await client.raw("POST", "/recommend", b'{"user": "x"}')
            assert status == 503 and headers["retry-after"] == "1"
            assert (await client.call("GET", "/ready"))[0] == 503
            assert (await client.call("GET", "/health"))[0] == 200
            await client.ready()
        app = make_app(Settings(str(tmp_path / "nothing"), str(tmp_path / "a.sqlite")))
        async with app.router.lifespan_context(app):
            client, until = Client(app), time.monotonic() + 60
            while (await client.call("GET", "/health"))[0] == 200:
                assert time.monotonic() < until
                await asyncio.sleep(0.02)
            assert "cannot be loaded" in (await client.call("GET", "/health"))[1]["error"]

    asyncio.run(test())


def test_more_requests_than_there_is_room_for_are_told_to_come_back(served, tmp_path):
    async def test(client):
        found = await asyncio.gather(*[client.raw("POST", "/recommend", b'{"user": "x"}') for _ in range(9)])
        statuses = [status for status, _, _ in found]
        assert sorted(statuses) == [200] * 4 + [429] * 5
        assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in found if status == 429)
        assert (await client.raw("POST", "/recommend", b'{"user": "x"}'))[0] == 200

    check(served, tmp_path, test, max_waiting=4)


def test_a_failing_database_is_said_and_passes(served, tmp_path):
    async def test(client):
        await client.post("/events", click("ann", "p1"))
        store = client.worker.service.store
        with store._writing() as connection:
            connection.exec_driver_sql("ALTER TABLE events RENAME TO gone")
        status, headers, _ = await client.raw("POST", "/recommend", b'{"user_id": "ann"}')
        assert status == 503 and "retry-after" in headers
        assert (await client.raw("POST", "/events", json.dumps(click("ann", "p2")).encode(), TOKEN))[0] == 503
        with store._writing() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO events")
        assert (await client.post("/recommend", {"user_id": "ann"}))["items"]

    check(served, tmp_path, test)


def test_settings_that_mean_nothing_are_refused():
    for name, value in [("batch_size", 0), ("timeout", -1), ("wait_ms", -1), ("retention_days", 0)]:
        with pytest.raises(ValueError, match=name):
            Settings("model", "store", **{name: value})


def test_a_model_without_a_catalogue_is_not_served(served, tmp_path):
    folder = shutil.copytree(served, tmp_path / "model")
    shutil.rmtree(folder / "catalogue")
    app = make_app(Settings(str(folder), str(tmp_path / "a.sqlite")))
    with pytest.raises(ValueError, match="no catalogue"):
        app.state.worker.service.load()
