"""The live page in a real browser: figures for people, axes with numbers, rows of one line, no errors, wide and narrow."""

import html
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dsla_hf.serving.http.page import PAGE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REASON = "Load: queue_depth 61 ≥ 50 (61 waiting, 48123 prompt tokens unread, longest prompt 3910, 32 running, 4% of blocks free)"
STATUS = {
    "model": "my-model",
    "now": 1000.0,
    "level": 8,
    "old_level": None,
    "max_level": 16,
    "layers": 32,
    "unit": "layer",
    "units": 32,
    "kept": 24,
    "waiting": 0,
    "running": 3,
    "slots": 32,
    "oldest_wait": None,
    "free_blocks": 750,
    "blocks": 1000,
    "seconds_to_first_token": 1.4,
    "seconds_per_token": 0.0213,
    "generated_tokens": 12345,
    "finished": {"stop": 1, "length": 2, "cancelled": 0, "error": 0},
    "draining": False,
    "problem": None,
    "changes": [{"seconds": 995.0 - 400 * i, "old": 4, "new": 8, "reason": REASON} for i in range(2)],
}
# What the page is asked after some looks at the server: its figures, sizes of rows, and errors of its script.
MEASURE = """<script>
window.errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("unhandledrejection", e => errors.push(String(e.reason)));
setTimeout(() => {
  const all = (where, what) => [...where.querySelectorAll(what)], text = e => e.textContent;
  const found = document.createElement("pre");
  found.id = "found";
  const line = parseFloat(getComputedStyle(document.body).lineHeight);
  found.textContent = JSON.stringify({
    errors,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    state: text(document.getElementById("state")),
    problem: document.getElementById("problem").hidden ? null : text(document.getElementById("problem")),
    charts: Object.fromEntries(all(document, "figure").map(f => [text(f.querySelector("span")), {
      value: text(f.querySelector("b")), y: all(f, "text.y").map(text), x: all(f, "text.x").map(text),
      lines: all(f, "polyline").map(l => [l.className.baseVal, l.getAttribute("points")]),
      cut: f.querySelector("b").scrollWidth > f.querySelector("b").clientWidth,
      lines_of_caption: Math.round(f.querySelector("figcaption").offsetHeight / line),
    }])),
    rows: all(document, "tr").map(r => [r.offsetHeight / line, text(r.cells[0]), text(r.cells[1]), text(r.cells[2])]),
  });
  document.body.append(found);
}, 3500);
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


@contextmanager
def shown(statuses):
    """A server of the page that measures itself, and of one status after the other: yields its address."""
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            is_status = self.path == "/status"
            content = json.dumps(left.pop(0) if len(left) > 1 else left[0]) if is_status else PAGE.replace("<script>", f"{MEASURE}<script>")
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if is_status else "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def look(folder, *changes, width=1200):
    """What the page shows when it has seen the status with each of these changes, and the last one ever after."""
    statuses = [{**STATUS, "now": STATUS["now"] + i, **change} for i, change in enumerate(changes)]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom"]
    with shown(statuses) as address:
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    found = json.loads(html.unescape(found[1]))
    assert found["errors"] == []
    for chart in found["charts"].values():
        assert chart["y"][0] in ("0", "0 s", "0 %") and len(chart["y"]) >= 2, "axes begin at zero and have numbers"
        assert chart["x"] == ["5 min ago", "2.5 min", "now"] and chart["lines_of_caption"] == 1
        assert not chart["cut"], f"{chart['value']} does not fit"
    assert not re.search(r"\de[+-]\d|NaN|undefined|null|Infinity", json.dumps({**found, "problem": ""}).replace('"problem": ""', ""))
    assert not found["wide"], "the page has to be moved sidewise"
    assert found["rows"] and all(height < 1.5 for height, *_ in found["rows"]), "a row takes more than one line"
    return found


def test_layers_under_load_on_a_wide_page(tmp_path):
    looks = [{"generated_tokens": 12345 + 120 * i} for i in range(9)]
    found = look(tmp_path, *looks, {"generated_tokens": 12345 + 120 * 9})
    charts = found["charts"]
    assert charts["level"]["value"] == "8 of 32 layers" and charts["level"]["y"] == ["0", "8", "16"]
    kept = charts["KV memory kept"]
    assert kept["value"] == "75 % of full cache" and kept["y"] == ["0 %", "50 %", "100 %"]
    assert charts["cache memory in use"]["value"] == "25 %"
    assert charts["waiting"]["value"] == "0" and charts["running"]["value"] == "3 of 32"
    assert charts["to first token"]["value"] == "1.4 s" and charts["to first token"]["y"] == ["0 s", "1 s", "2 s"]
    assert charts["per token"]["value"] == "21.3 ms" and charts["per token"]["y"] == ["0 s", "25 ms", "50 ms"]
    assert charts["generated"]["value"] == "120 tokens a second" and charts["generated"]["y"] == ["0", "100", "200"]
    assert [name for name, _ in charts["to first token"]["lines"]] == [""]
    last = charts["level"]["lines"][0][1].split()[-1]
    assert last == "318.0,50.0", "the newest point is at the right end, at half the height"
    assert found["state"] == "my-model: 8 of 32 layers are DSLA, at most 16; " + found["state"].split("; ")[1]
    assert [row[2:] for row in found["rows"]] == [["4 \u2192 8", REASON]] * 2
    assert re.fullmatch(r"6 min \d+ s ago", found["rows"][0][1]) and re.fullmatch(r"\d+ s ago", found["rows"][1][1])


def test_heads_and_a_wait_without_a_first_token_on_a_narrow_page(tmp_path):
    heads = {"unit": "head", "units": 1024, "level": 256, "kept": 768, "max_level": 512, "old_level": 128}
    waiting = {**heads, "waiting": 1400, "oldest_wait": 1400.0, "seconds_to_first_token": None, "seconds_per_token": None}
    problem = "decode failed 3 times in a row: RuntimeError: broken"
    found = look(tmp_path, {**heads}, {**waiting, "problem": problem}, width=500)
    charts = found["charts"]
    assert charts["level"]["value"] == "256 of 1,024 KV heads" and charts["KV memory kept"]["value"] == "75 % of full cache"
    assert charts["waiting"]["value"] == "1,400, the oldest for 23 min 20 s" and charts["waiting"]["y"] == ["0", "1,000", "2,000"]
    assert charts["to first token"]["value"] == "none for 23 min 20 s" and charts["to first token"]["y"] == ["0 s", "25 min", "50 min"]
    assert [name for name, _ in charts["to first token"]["lines"]] == ["", "wait"], "a wait is dashed"
    assert charts["per token"]["value"] == "none" and len(charts["per token"]["lines"]) == 1
    assert found["problem"] == problem
    assert "256 of 1,024 KV heads are DSLA, at most 512, older texts have 128" in found["state"]
