"""Long play: memory and time per step over many steps, and the page beside clients that misbehave.

    python tests/soak/soak.py play --steps 20000       # writes outputs/soak_play.png and .json
    python tests/soak/soak.py page --minutes 10        # writes outputs/soak_page.png and .json

`play` walks by random keys and turns, and goes to the next start place now and then; Ctrl-C ends it early.
`page` serves the page to a player that sends input and never reads, then to one that reads, while others
send half of a request. Both end with status 1 if the memory grows by more than LIMIT.
"""

import argparse
import asyncio
import json
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import live_inference
from dataset.actions import encode, from_keys
from playing import web
from playing.controls import Controls, StepClock
from playing.session import Session
from runtime import provenance
from runtime.outputs import replacing

LIMIT = 0.05  # growth of the memory after the warm-up, as a share
WARM_UP = 0.05  # share of the run
SAMPLES = 400  # rows of a measurement
NEXT_STEPS = 2_500  # steps at one start place
KEYS = ((), ("forward",), ("forward",), ("forward", "jump"), ("forward", "left"), ("back",), ("right",))
HALF_SENT = 100  # connections with half of a request at a time


def memory_mb() -> float:
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss / 2**20


def random_walk(seed: int = 0):
    """Yields action vectors [5]: keys held for some steps, with smooth turns."""
    rng = np.random.default_rng(seed)
    yaw, pitch = 0.0, 0.0
    while True:
        keys = KEYS[rng.integers(len(KEYS))]
        speed, still = rng.normal(0, 4, 2) * (rng.random() < 0.7), rng.random() < 0.1
        for _ in range(rng.integers(4, 40)):
            yaw, pitch = 0.7 * yaw + 0.3 * speed[0], 0.7 * pitch + 0.1 * speed[1]
            yield np.zeros(5, np.float32) if still else encode(yaw, pitch, *from_keys(set(keys)))


def growth(rows: list[dict]) -> float:
    """Largest memory after the warm-up over that at its end, less 1."""
    memory = [row["memory_mb"] for row in rows]
    first = max(1, int(WARM_UP * len(memory)))
    return max(memory[first:]) / float(np.median(memory[first : 2 * first + 1])) - 1


def play(session: Session, steps: int, next_steps: int = NEXT_STEPS) -> list[dict]:
    """Plays; -> a row per SAMPLES-th of the steps: step, memory, mean and longest time of its steps in ms."""
    rows, every, actions = [], max(1, steps // SAMPLES), random_walk()
    with suppress(KeyboardInterrupt):
        for step in tqdm(range(1, steps + 1), unit="step", desc="play", mininterval=10):
            session.step(next(actions))
            if step % every == 0:
                ms = np.array(session.seconds)[-every:].sum(1) * 1000
                row = {"step": step, "memory_mb": memory_mb(), "mean_ms": ms.mean(), "max_ms": ms.max()}
                rows.append({name: round(float(value), 2) for name, value in row.items()})
            if step % next_steps == 0:
                session.command("next")
    return rows


# ---------------------------------------------------------------- the page


async def never_read(port: int, until: float) -> tuple[int, int]:
    """A player that sends input and commands and reads nothing, and comes back when the server ends it.

    -> numbers of connections and messages.
    """
    origin, connections, sent = f"127.0.0.1:{port}", 0, 0
    texts = ('{"press": "forward"}', '{"look": [9, 0]}', '{"command": "greedy"}')
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.transport.pause_reading()
        connections += 1
        writer.write(
            f"GET /play HTTP/1.1\r\nHost: {origin}\r\nOrigin: http://{origin}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        await asyncio.sleep(0.5)
        with suppress(ConnectionError):
            while time.monotonic() < until:
                text, mask = texts[sent % 3].encode(), b"\0\0\0\0"  # leaves the bytes as they are
                writer.write(struct.pack("!BB", 0x81, 0x80 | len(text)) + mask + text)
                await writer.drain()
                sent += 1
                await asyncio.sleep(0.02)
        writer.transport.abort()
    return connections, sent


async def half_send(port: int, until: float) -> int:
    """Holds connections with half of a request, and opens one for each that is ended; -> their number."""
    opened = 0

    async def one() -> None:
        nonlocal opened
        while time.monotonic() < until:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                opened += 1
                writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(reader.read(), max(0.1, until - time.monotonic()))
                writer.close()
            await asyncio.sleep(min(5.0, max(0.1, until - time.monotonic())))

    await asyncio.gather(*(one() for _ in range(HALF_SENT)))
    return opened


async def read(port: int, until: float) -> int:
    """A player that reads and acts; -> the number of frames."""
    url, count, frames, actions = f"http://127.0.0.1:{port}", 0, 0, random_walk(1)
    async with aiohttp.ClientSession() as client:
        async with client.ws_connect(f"{url}/play", headers={"Origin": url}) as connection:
            while time.monotonic() < until:
                message = await connection.receive(30)
                if message.type != aiohttp.WSMsgType.BINARY:
                    assert message.type == aiohttp.WSMsgType.TEXT, message
                    continue
                count += 1
                await connection.send_json({"shown": count})
                (length,) = struct.unpack_from("<I", message.data)
                frames += json.loads(message.data[4 : 4 + length])["kind"] == "frame"
                yaw, pitch = next(actions)[:2] * 100
                await connection.send_json({"look": [float(yaw), float(pitch)]})
                await connection.send_json({"press" if frames % 50 < 40 else "release": "forward"})
    return frames


async def page(session: Session, fps: float, seconds: float) -> tuple[list[dict], dict]:
    """Serves the page; -> rows as of `play` by second, and what the clients did."""
    controls = Controls(fps, session.world.degrees_per_unit)
    server = web.Server(session, controls, StepClock(fps), "127.0.0.1", None)
    port = 8000 + int(time.time()) % 1000
    serving = asyncio.create_task(server.serve("127.0.0.1", port))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    half, end = began + seconds / 2, began + seconds
    rows: list[dict] = []

    async def sample() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(seconds / SAMPLES)
            row = {"second": time.monotonic() - began, "memory_mb": memory_mb(), "step": session.steps}
            rows.append({name: round(float(value), 2) for name, value in row.items()})

    async def players() -> dict:
        connections, sent = await never_read(port, half)
        steps = session.steps
        while server.player is not None:
            await asyncio.sleep(0.05)
        start = time.monotonic()
        frames = await read(port, end)
        return {
            "connections of the player that never reads": connections,
            "its messages": sent,
            "steps for it": steps,
            "frames of the player that reads": frames,
            "frames a second": round(frames / (time.monotonic() - start), 2),
        }

    found, opened, _ = await asyncio.gather(players(), half_send(port, end), sample())
    assert not serving.done(), "the server ended"
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return rows, {**found, "half-sent requests": opened}


# ---------------------------------------------------------------- results


def plot(path: Path, rows: list[dict], x: str, title: str) -> None:
    """Memory over the run, and the time per step where it is known."""
    from matplotlib.figure import Figure

    timed = "mean_ms" in rows[0]
    figure = Figure(figsize=(8, 5 if timed else 3), layout="constrained")
    axes = figure.subplots(1 + timed, 1, squeeze=False)[:, 0]
    at = [row[x] for row in rows]
    memory = [row["memory_mb"] for row in rows]
    axes[0].plot(at, memory)
    axes[0].set(title=title, ylabel="resident memory, MB", ylim=(0, 1.2 * max(memory)), xlabel=x)
    if timed:
        axes[1].plot(at, [row["max_ms"] for row in rows], color="tab:gray", lw=0.8, label="longest")
        axes[1].plot(at, [row["mean_ms"] for row in rows], label="mean")
        axes[1].set(ylabel="ms per step", xlabel=x, ylim=(0, None))
        axes[1].legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def report(stem: Path, rows: list[dict], x: str, about: dict) -> int:
    """Writes the plot and the JSON file, prints the result -> 0, or 1 if the memory grew too much."""
    found = growth(rows)
    flat = found <= LIMIT
    title = f"{about['what']}: memory {found:+.1%} after the first {WARM_UP:.0%}"
    plot(stem.with_suffix(".png"), rows, x, title)
    provenance.write_json(stem.with_suffix(".json"), {**about, "growth": round(found, 4), "rows": rows})
    print(f"{title}; {'flat' if flat else 'it grows'} (limit {LIMIT:.0%}); wrote {stem}.png and {stem}.json")
    return 0 if flat else 1


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=("play", "page"))
    parser.add_argument("--steps", type=int, default=20_000, help="of play (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of the page (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="stem of the files (default: outputs/soak_play or _page)")
    args, flags = parser.parse_known_args(arguments)  # the rest is for live_inference.py, e.g. --precision
    config = live_inference.parse_config(flags)
    session = live_inference.load_session(config, only_first=False)
    stem = args.out or Path(f"outputs/soak_{args.what}")
    about = {
        "precision": str(session.world.dtype).removeprefix("torch."),
        "machine": provenance.machine(session.world.device),
        "commit": provenance.commit(),
    }
    if args.what == "play":
        rows = play(session, args.steps)
        seconds = np.array(session.seconds).sum(1) * 1000
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).round(1).tolist()
        about |= {
            "what": f"{len(session.seconds)} steps of play",
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
        }
        print(f"step p50 {p50} ms, p95 {p95} ms, p99 {p99} ms")
        return report(stem, rows, "step", about)
    fps = config.fps or session.world.fps
    rows, found = asyncio.run(page(session, fps, args.minutes * 60))
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return report(stem, rows, "second", {"what": f"{args.minutes:g} minutes of the page", **about, **found})


if __name__ == "__main__":
    raise SystemExit(main())
