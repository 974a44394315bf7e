"""Lets people visit a demo at once: each adds events and invents a product, and must see no other's product.

    python examples/demo_visitors.py http://127.0.0.1:7860 --visitors 20 --clicks 20

A click asks for both lists of the page and then for their reasons; a person thinks for `--pause` seconds before it.
Prints the times of the lists in milliseconds and the statuses as JSON. Only the standard library is used.
"""

import argparse
import http.client
import json
import random
import statistics
import threading
import time
import urllib.parse
from collections import Counter


class Crowd:
    """What the visitors have seen."""

    def __init__(self, address: str, clicks: int, pause: float) -> None:
        self.place, self.clicks, self.pause = urllib.parse.urlsplit(address).netloc, clicks, pause
        self.milliseconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.strange = 0
        """Products of others that a visitor has seen."""
        self.errors: list[str] = []

    def visit(self, number: int) -> None:
        """Be one visitor, until an error."""
        try:
            self._visit(number)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            self.errors.append(f"visitor {number}: {error}")

    def _visit(self, number: int) -> None:
        draw, connection = random.Random(number), http.client.HTTPConnection(self.place, timeout=120)
        about = self.ask(connection, "/api/about")
        items = [item["item_id"] for item in about["starters"]]
        history: list[str] = []
        own = f"product of visitor {number}"
        for click in range(self.clicks):
            time.sleep(self.pause * draw.uniform(0.5, 1.5))
            history = [*(each for each in history if each != items[0]), items[0]][-10:]
            state = {"history": [{"item_id": item} for item in history], "weights": about["weights"]}
            state["products"] = [own] if click >= self.clicks // 2 else []
            began = time.monotonic()
            lists = self.ask(connection, "/api/lists", state)
            self.milliseconds.append(1000 * (time.monotonic() - began))
            rows = [row for reading in lists["readings"] for row in [*reading["rows"], *reading["products"]]]
            self.strange += sum(row["new"] and row["item"] != own for row in rows)
            self.ask(connection, "/api/reasons", {**state, "items": [row["item_id"] for row in rows[:20]]})
            items = [row["item_id"] for row in rows if not row["new"]]
            draw.shuffle(items)

    def ask(self, connection: http.client.HTTPConnection, path: str, body: dict | None = None) -> dict:
        """Send a request, again a second later if the demo is full; returns its JSON."""
        while True:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content)
            response = connection.getresponse()
            answer = json.loads(response.read())
            self.statuses[response.status] += 1
            if response.status != 503:
                break
            time.sleep(1)
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {answer}")
        return answer


def main() -> None:
    """Let them visit, and print what they saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--pause", type=float, default=5.0, metavar="S")
    given = parser.parse_args()
    crowd = Crowd(given.address, given.clicks, given.pause)
    visitors = [threading.Thread(target=crowd.visit, args=(number,)) for number in range(given.visitors)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    times = sorted(crowd.milliseconds)
    found = {"lists": len(times), "expected": given.visitors * given.clicks, "statuses": dict(crowd.statuses)}
    found |= {"median_ms": round(statistics.median(times), 1), "p95_ms": round(times[int(0.95 * len(times))], 1)}
    print(json.dumps({**found, "products_of_others": crowd.strange, "errors": crowd.errors}))


if __name__ == "__main__":
    main()
