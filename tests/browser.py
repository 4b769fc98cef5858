"""A headless Chromium for tests, driven through its DevTools protocol over two pipes."""
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BOUND = 120            # seconds for one answer


def find():
    """The path of an installed browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `problems` are errors and warnings of the console, `requests` the addresses that
    were fetched."""

    def __init__(self, profile):
        """profile: a folder for the browser's own files."""
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        # It reads commands from descriptor 3 and answers on 4: bash puts the pipes there.
        command = (f"exec 8<&{to_browser} 9>&{from_browser} 3<&8 4>&9; exec {find()} --headless "
                   "--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
                   f"--disable-extensions --user-data-dir={profile} --remote-debugging-pipe "
                   "about:blank")
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.buffer, self.session = 0, b"", None
        self.problems, self.requests = [], []
        [target] = [x for x in self.wait_for_targets() if x["type"] == "page"]
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)      # as if in front

    def wait_for_targets(self):
        deadline = time.monotonic() + BOUND
        while time.monotonic() < deadline:
            targets = self.send("Target.getTargets")["targetInfos"]
            if any(target["type"] == "page" for target in targets):
                return targets
            time.sleep(0.1)
        raise TimeoutError("the browser opened no tab")

    def send(self, method, **parameters):
        """A command of the protocol. -> its result. Raises RuntimeError if it is refused."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.note(answer)

    def read(self):
        while b"\0" not in self.buffer:
            if not select.select([self.read_end], [], [], BOUND)[0]:
                raise TimeoutError(f"no answer from the browser within {BOUND} s")
            received = os.read(self.read_end, 1 << 16)
            if not received:
                raise RuntimeError("the browser has ended")
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event):
        what, about = event.get("method"), event.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"])
        elif what == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(about["args"])
        elif what == "Log.entryAdded":
            self.problems.append(about["entry"])
        elif what == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, path, width=1280, height=900, dark=False):
        """Show a file in a window of this many CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=f"file://{path}")
        deadline = time.monotonic() + BOUND
        while self.run("document.readyState + location.href") != f"completefile://{path}":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} was not loaded within {BOUND} s")
            time.sleep(0.02)

    def run(self, script):
        """The value of a JavaScript expression in the page. Raises RuntimeError if it throws."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def key(self, name):
        """Press a key, "ArrowRight" for example."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def point(self, x, y, click=False):
        """Move the mouse to a point of the window, and click there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.send("Browser.close")
        self.process.wait(BOUND)
        os.close(self.write_end)
        os.close(self.read_end)
