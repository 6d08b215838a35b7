"""A real browser for tests, without a screen: Chromium, if there is one, spoken to in its own protocol (CDP) over tornado's WebSocket."""

import asyncio
import base64
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tornado.websocket import websocket_connect

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium found; apt-get install chromium")
PATIENCE_SECONDS = 60


def visit(
    url: str,
    ready: str,
    wanted: str,
    folder: Path,
    size: str = "1300,1000",
    scheme: str = "light",
    expected: str = "",
    mouse: Sequence[tuple[str, float, float]] = (),
) -> tuple[object, Path]:
    """Open a page, wait until the JavaScript `ready` is true; return the value of `wanted`, and a screenshot as PNG in the folder.

    `mouse`: what it does in between, (Pressed, Moved or Released, x, y). `scheme`: light or dark, as the reader's system has it. Whatever
    the page writes to the console as an error fails the test, unless the pattern `expected` is in it.
    """
    value, picture, errors = asyncio.run(_visit(url, ready, wanted, folder, size, scheme, mouse))
    unexpected = [error for error in errors if not expected or not re.search(expected, error)]
    assert not unexpected, unexpected
    return value, picture


async def _visit(url: str, ready: str, wanted: str, folder: Path, size: str, scheme: str, mouse) -> tuple[object, Path, list[str]]:
    profile = Path(tempfile.mkdtemp(dir=folder))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen([BROWSER, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE_SECONDS
    try:
        port_file = profile / "DevToolsActivePort"
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert time.monotonic() < end, "the browser does not start"
            await asyncio.sleep(0.05)
        port, path = port_file.read_text().split()
        connection = await websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=1 << 28)
        numbers, errors = itertools.count(1), []

        async def call(method: str, session: str | None = None, **parameters):
            number = next(numbers)
            message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
            await connection.write_message(json.dumps(message))
            while True:
                answer = json.loads(await asyncio.wait_for(connection.read_message(), PATIENCE_SECONDS))
                kind, event = answer.get("method"), answer.get("params", {})
                if kind == "Runtime.exceptionThrown" or "error" in (event.get("type"), event.get("entry", {}).get("level")):
                    errors.append(json.dumps(event))
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return answer["result"]

        target = (await call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        await call("Runtime.enable", session)
        await call("Log.enable", session)
        width, height = map(int, size.split(","))
        await call("Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        await call("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
        await call("Page.navigate", session, url=url)

        async def evaluate(expression: str):
            answer = await call("Runtime.evaluate", session, expression=expression, returnByValue=True)
            return answer["result"].get("value")

        while not await evaluate(ready):
            assert time.monotonic() < end, f"{url}: waited {PATIENCE_SECONDS} s for {ready}"
            await asyncio.sleep(0.2)
        for kind, x, y in mouse:
            button = {"button": "left", "buttons": int(kind != "Released"), "clickCount": 1}
            await call("Input.dispatchMouseEvent", session, type=f"mouse{kind}", x=x, y=y, **button)
        value = await evaluate(wanted)
        picture = folder / "picture.png"
        picture.write_bytes(base64.b64decode((await call("Page.captureScreenshot", session))["data"]))
        connection.close()
        while await connection.read_message() is not None:  # until the other side has closed too
            pass
        return value, picture, errors
    finally:
        process.kill()
        process.wait()
