"""The live page at `/`: queue, level and latency as they change. Needs nothing from elsewhere."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>dsla serve</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem }
figcaption { display: flex; justify-content: space-between }
figcaption b { font-variant-numeric: tabular-nums }
svg { width: 100%; height: 6rem; display: block }
polyline { fill: none; stroke: #2463b4; stroke-width: 1.5; vector-effect: non-scaling-stroke }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; font-variant-numeric: tabular-nums }
small { color: #666 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } figure { border-color: #444 } polyline { stroke: #7db3ff } }
</style>
<h1>dsla serve</h1>
<p id="state" role="status">waiting for the first figures</p>
<section id="charts"></section>
<h2>Changes of the level</h2>
<table id="changes"></table>
<p><small>The last five minutes, a point a second. Times are averages of the last ten seconds.</small></p>
<script>
const kept = 300, charts = [
  ["level", s => s.level, (v, s) => v + (s.unit === "head" ? " KV heads, " + s.kept + " kept" : " layers")],
  ["waiting", s => s.waiting, v => v + " requests"],
  ["running", s => s.running, v => v + " requests"],
  ["time to first token", s => s.seconds_to_first_token, v => v.toFixed(2) + " s"],
  ["time per token", s => s.seconds_per_token, v => (1000 * v).toFixed(1) + " ms"],
  ["memory in use", s => 1 - s.free_blocks / s.blocks, v => (100 * v).toFixed(0) + " %"],
].map(([name, read, show]) => {
  const figure = document.createElement("figure");
  figure.innerHTML = '<figcaption><span></span><b></b></figcaption><svg viewBox="0 0 299 100" preserveAspectRatio="none"></svg>';
  figure.querySelector("span").textContent = name;
  document.getElementById("charts").append(figure);
  return { read, show, figure, values: [] };
});
function draw(chart) {
  const top = Math.max(...chart.values.filter(v => v !== null), 1e-9);
  let line = [], lines = [line];
  chart.values.forEach((v, i) => {
    if (v === null) { line = []; lines.push(line); }
    else line.push((kept - chart.values.length + i) + "," + (97 - 94 * v / top));
  });
  chart.figure.querySelector("svg").innerHTML = lines.filter(l => l.length).map(l => '<polyline points="' + l.join(" ") + '"/>').join("");
}
async function ask() {
  try {
    const s = await (await fetch("status")).json();
    for (const chart of charts) {
      const value = chart.read(s) ?? null;
      chart.values = [...chart.values, value].slice(-kept);
      chart.figure.querySelector("b").textContent = value === null ? "none" : chart.show(value, s);
      draw(chart);
    }
    document.getElementById("state").textContent = (s.draining ? "draining; " : "") + s.model + ": level " + s.level + " of " +
      s.max_level + " (" + s.units + (s.unit === "head" ? " KV heads, " + s.kept + " kept" : " layers") + ")" +
      (s.old_level === null ? "" : ", older texts at level " + s.old_level) + "; " +
      s.generated_tokens + " tokens generated, " + s.finished.error + " errors";
    document.getElementById("changes").replaceChildren(...s.changes.reverse().map(change => {
      const row = document.createElement("tr");
      for (const text of [(s.now - change.seconds).toFixed(0) + " s ago", change.old + " \\u2192 " + change.new, change.reason])
        row.insertCell().textContent = text;
      return row;
    }));
  } catch (error) {
    document.getElementById("state").textContent = "the server does not answer";
  }
}
ask();
setInterval(ask, 1000);
</script>
</html>
"""
