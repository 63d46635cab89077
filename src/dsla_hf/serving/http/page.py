"""The live page at `/`: queue, level and latency as they change. Needs nothing from elsewhere."""

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>dsla serve</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --faint: #666; --curve: #2463b4; --bad: #b00020 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #181818; --line: #444; --faint: #999; --curve: #7db3ff; --bad: #ff7b8a }
}
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
body { color: var(--ink); background: var(--paper) }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem }
figcaption { display: flex; justify-content: space-between; gap: .6rem; white-space: nowrap }
figcaption b { font-variant-numeric: tabular-nums; overflow: hidden; text-overflow: ellipsis }
svg { width: 100%; display: block }
svg text { font-size: 9px; fill: var(--faint) }
svg line { stroke: var(--line); stroke-width: .7 }
polyline { fill: none; stroke: var(--curve); stroke-width: 1.5 }
polyline.wait { stroke-dasharray: 3 2 }
table { table-layout: fixed; width: 100%; border-collapse: collapse }
td { padding: .1rem .8rem .1rem 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-variant-numeric: tabular-nums }
td:nth-child(1) { width: 7rem }
td:nth-child(2) { width: 8rem }
#problem { color: var(--bad); font-weight: bold }
small { color: var(--faint) }
</style>
<h1>dsla serve</h1>
<p id="problem" role="alert" hidden></p>
<p id="state" role="status">waiting for the first figures</p>
<section id="charts"></section>
<h2>Changes of the level</h2>
<table id="changes"></table>
<p><small>The last five minutes, a point a second. Times are averages of the last ten seconds; dashed: there was no first token in them, and
the oldest request has waited so long.</small></p>
<script>
const points = 300, plot = { left: 42, right: 318, top: 8, bottom: 92 };
const share = v => Math.round(100 * v) + " %";
const count = v => Math.round(v).toLocaleString("en");
const units = s => s.unit === "head" ? "KV heads" : "layers";
function figures(v) { return v >= 100 ? v.toFixed(0) : v >= 10 ? String(+v.toFixed(1)) : String(+v.toFixed(2)); }
function time(v) {
  if (v >= 3600) return Math.floor(v / 3600) + " h " + Math.floor(v % 3600 / 60) + " min";
  if (v >= 60) return Math.floor(v / 60) + " min " + Math.floor(v % 60) + " s";
  if (v >= 1) return (v < 10 ? v.toFixed(1) : v.toFixed(0)) + " s";
  return figures(1000 * v) + " ms";
}
const ago = v => v < 60 ? Math.max(Math.floor(v), 0) + " s ago" : time(v) + " ago";
const ticks = {
  time: v => v === 0 ? "0 s" : v < 1 ? figures(1000 * v) + " ms" : v < 60 ? figures(v) + " s" : figures(v / 60) + " min",
  count, share,
};
let before = null;
function rate(s) {  // tokens a second, since the last look
  const last = before;
  before = s;
  return last && s.now > last.now ? Math.max(s.generated_tokens - last.generated_tokens, 0) / (s.now - last.now) : null;
}
const charts = [
  { name: "level", read: s => s.level, kind: "count", most: s => s.max_level,
    show: (v, s) => count(v) + " of " + count(s.units) + " " + units(s) },
  { name: "KV memory kept", read: s => s.kept / s.units, show: v => share(v) + " of full cache", kind: "share", most: () => 1 },
  { name: "cache memory in use", read: s => 1 - s.free_blocks / s.blocks, show: share, kind: "share", most: () => 1 },
  { name: "waiting", read: s => s.waiting, kind: "count",
    show: (v, s) => count(v) + (s.oldest_wait === null ? "" : ", the oldest for " + time(s.oldest_wait)) },
  { name: "running", read: s => s.running, show: (v, s) => count(v) + " of " + count(s.slots), kind: "count", most: s => s.slots },
  { name: "generated", read: rate, show: v => count(v) + " tokens a second", kind: "count" },
  { name: "to first token", read: s => s.seconds_to_first_token ?? s.oldest_wait, kind: "time",
    waits: s => s.seconds_to_first_token === null, show: (v, s) => (s.seconds_to_first_token === null ? "none for " : "") + time(v) },
  { name: "per token", read: s => s.seconds_per_token, show: time, kind: "time" },
];
for (const chart of charts) {
  chart.figure = document.createElement("figure");
  chart.figure.innerHTML = '<figcaption><span></span><b></b></figcaption><svg viewBox="0 0 320 108" role="img"></svg>';
  chart.figure.querySelector("span").textContent = chart.name;
  chart.figure.querySelector("svg").setAttribute("aria-label", chart.name + " over time");
  document.getElementById("charts").append(chart.figure);
  chart.values = [];
}
function roundUp(v, kind) {  // the least of 1, 2, 5, 10, 20, ... that is not below v; of long times in minutes
  if (kind === "time" && v > 50) return 60 * roundUp(v / 60);
  const ten = 10 ** Math.floor(Math.log10(v));
  return [1, 2, 5, 10].map(m => m * ten).find(top => top >= v * (1 - 1e-9));
}
function draw(chart, s) {
  const largest = Math.max(0, ...chart.values.map(p => p.value ?? 0));
  const top = (chart.most ? Math.max(chart.most(s), largest) : largest > 0 ? roundUp(largest, chart.kind) : 0) || 1;
  const y = v => plot.bottom - (plot.bottom - plot.top) * v / top;
  const x = i => plot.left + (plot.right - plot.left) * i / (points - 1);
  const middle = chart.kind !== "count" || top % 2 === 0 ? [top / 2] : [];
  let drawn = "";
  for (const v of [0, ...middle, top])
    drawn += `<line x1="${plot.left}" x2="${plot.right}" y1="${y(v)}" y2="${y(v)}"/>` +
      `<text class="y" x="${plot.left - 4}" y="${y(v) + 3}" text-anchor="end">${ticks[chart.kind](v)}</text>`;
  for (const [i, text, anchor] of [[0, "5 min ago", "start"], [(points - 1) / 2, "2.5 min", "middle"], [points - 1, "now", "end"]])
    drawn += `<text class="x" x="${x(i)}" y="104" text-anchor="${anchor}">${text}</text>`;
  let line = [], dashed = false;
  const end = () => { if (line.length) drawn += `<polyline class="${dashed ? "wait" : ""}" points="${line.join(" ")}"/>`; line = []; };
  chart.values.forEach((p, i) => {
    if (p.value === null || p.waits !== dashed) end();
    if (p.value === null) return;
    dashed = p.waits;
    line.push(x(points - chart.values.length + i).toFixed(1) + "," + y(p.value).toFixed(1));
  });
  end();
  chart.figure.querySelector("svg").innerHTML = drawn;
}
async function ask() {
  const problem = document.getElementById("problem"), state = document.getElementById("state");
  try {
    const s = await (await fetch("status")).json();
    for (const chart of charts) {
      const value = chart.read(s) ?? null, label = chart.figure.querySelector("b");
      chart.values = [...chart.values, { value, waits: chart.waits?.(s) ?? false }].slice(-points);
      label.textContent = value === null ? "none" : chart.show(value, s);
      label.title = label.textContent;
      draw(chart, s);
    }
    problem.hidden = s.problem === null && !s.draining;
    problem.textContent = s.problem ?? "no more requests are taken: the server ends when the running ones have";
    state.textContent = s.model + ": " + count(s.level) + " of " + count(s.units) + " " + units(s) + " are DSLA, at most " +
      count(s.max_level) + (s.old_level === null ? "" : ", older texts have " + count(s.old_level)) + "; " +
      count(s.generated_tokens) + " tokens generated, " +
      count(s.finished.error) + " errors";
    document.getElementById("changes").replaceChildren(...s.changes.reverse().map(change => {
      const row = document.createElement("tr");
      for (const text of [ago(s.now - change.seconds), count(change.old) + " \u2192 " + count(change.new), change.reason]) {
        const cell = row.insertCell();
        cell.textContent = cell.title = text;
      }
      return row;
    }));
  } catch (error) {
    state.textContent = "the server does not answer";
  }
}
ask();
setInterval(ask, 1000);
</script>
</html>
"""
