"""Puts load on a service: closed loop, one event then one answer for each client, over keep-alive connections.

    python examples/load_test.py http://127.0.0.1:8000 --clients 64 --seconds 30 --token secret

With a token, each client writes an event and then asks whether its item would still be recommended, which it must not:
an answer that names it is stale. Without a token, clients ask only. Prints requests a second, latencies and statuses
as JSON. Only the standard library is used.
"""

import argparse
import asyncio
import json
import random
import time
import urllib.parse
from collections import Counter


class Connection:
    """One keep-alive connection; with `once`, a new one for each request, which any worker may take."""

    def __init__(self, address: str, token: str, once: bool = False) -> None:
        parts = urllib.parse.urlsplit(address)
        self._place = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"Host: {self._place[0]}\r\nContent-Type: application/json\r\n"
        self._head += "Connection: close\r\n" if once else ""
        self._token = f"Authorization: Bearer {token}\r\n" if token else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict) -> tuple[int, dict]:
        """Send a request; returns status and JSON."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\n{self._head}{self._token}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), json.loads(answer)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Load:
    """What the clients have seen."""

    def __init__(self, address: str, token: str, **more: float) -> None:
        self.address, self.token, self.seed = address, token, int(more.get("seed", 0))
        self.pairs = more.get("pairs", float("inf"))
        self.events, self.growth = int(more.get("events", 20)), max(1, int(more.get("growth", 1)))
        self.unread, self.reconnect = bool(more.get("unread", False)), bool(more.get("reconnect", False))
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.stale = 0
        self.items: list[str] = []

    async def find_items(self) -> None:
        """Ask for items of the catalogue."""
        connection = Connection(self.address, "")
        status, answer = await connection.post("/recommend", {"user": "somebody", "top_k": 1000})
        connection.close()
        if status != 200:
            raise SystemExit(f"{self.address} does not answer: {answer}")
        self.items = [row["item_id"] for row in answer["items"]]

    def event(self, rng: random.Random) -> dict:
        """Return an event of an item of the catalogue, or of a text that the service has never read."""
        item = rng.choice(self.items)
        return {"item": {"title": f"{item} {rng.getrandbits(64)}"} if self.unread else {"item_id": item}}

    async def client(self, number: int, until: float, rate: float) -> None:
        """Ask until the time is over.

        Args:
            number: Number of the client.
            until: Time of `time.monotonic` of the end.
            rate: Requests a second of this client; 0 = as many as are answered.
        """
        rng = random.Random(f"{self.seed} {number}")
        connection = Connection(self.address, self.token, self.reconnect)
        user = f"load-{self.seed}-{number}"
        history = [self.event(rng) for _ in range(self.events)]
        if self.token:
            await connection.post("/events", [{"user_id": user, **event} for event in history]) if history else None
        due = time.monotonic() + (rng.random() / rate if rate else 0)
        while time.monotonic() < until and self.pairs > 0:
            self.pairs -= 1
            if rate:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += 1 / rate
            event = self.event(rng)
            if self.token:
                if await self._timed(connection, "/events", {"user_id": user, **event}) is None:
                    continue
                # Only this item may be recommended, and the user has just seen it.
                wishes = {"filter": event["item"], "exclude_seen": True}
                answer = await self._timed(connection, "/recommend", {"user_id": user, **wishes})
                self.stale += answer is not None and bool(answer["items"])
            else:
                full = len(history) >= self.events + self.growth
                history = [*(history[len(history) - self.events :] if full else history), event]
                await self._timed(connection, "/recommend", {"history": history, "top_k": 10})
        connection.close()

    async def _timed(self, connection: Connection, path: str, body: dict) -> dict | None:
        """Send a request; returns the JSON of a success."""
        begin = time.perf_counter()
        try:
            status, answer = await connection.post(path, body)
        except (OSError, asyncio.IncompleteReadError):
            self.statuses[0] += 1
            connection.close()
            return None
        self.seconds.append(time.perf_counter() - begin)
        self.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(0.05)
        return answer if status == 200 else None

    def report(self, seconds: float) -> dict:
        """Summarise; latencies in milliseconds."""
        ordered = sorted(self.seconds)

        def quantile(share: float) -> float | None:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else None

        return {
            "requests": len(ordered),
            "requests_per_second": round(self.statuses[200] / seconds, 1),
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "stale": self.stale,
        }


async def run(address: str, clients: int, seconds: float, token: str, **more: float) -> dict:
    """Put load on a service; returns the report."""
    rate = more.pop("rate", 0.0) / clients
    load = Load(address, token, **more)
    await load.find_items()
    begin = time.monotonic()
    await asyncio.gather(*[load.client(number, begin + seconds, rate) for number in range(clients)])
    return load.report(time.monotonic() - begin)


def main() -> None:
    """Read the arguments and print the report."""
    parser = argparse.ArgumentParser(description="Put load on a service of m6rec.")
    parser.add_argument("address", help="such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--token", default="", help="write events, too, and count stale answers")
    parser.add_argument("--events", type=int, default=20, help="events of a history at the start")
    parser.add_argument("--growth", type=int, default=1, help="events by which a history grows before it loses as many")
    parser.add_argument("--unread", action="store_true", help="events are texts that the service has never read")
    parser.add_argument("--reconnect", action="store_true", help="each request by a connection of its own")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of all clients; 0: closed loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=float, default=float("inf"), help="end after so many rounds of all clients")
    given = parser.parse_args()
    if given.token and given.unread:
        parser.error("--unread with --token: whether an answer is stale is seen by the ids of items")
    print(json.dumps(asyncio.run(run(**vars(given))), indent=1))


if __name__ == "__main__":
    main()
