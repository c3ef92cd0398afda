"use strict";
// Draws the plots of page.html from the JSON in it. Every name goes through `escaped`: plotly reads some tags in texts.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = 6, DASHES = ["solid", "dash", "dot", "dashdot"], FEW_POINTS = 30;
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shortened = (text) => (text.length > 24 ? text.slice(0, 23) + "…" : text);
  const faded = (colour) => colour + "70"; // #rrggbbaa; an opacity of the trace darkens what is behind it in Chromium
  const armColour = (arm) => colour("--c" + (arm % COLOURS));
  const armDash = (arm) => DASHES[Math.floor(arm / COLOURS) % DASHES.length];

  function axis(title, more) {
    const lines = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false };
    return { title: { text: escaped(title), standoff: 8 }, automargin: true, ...lines, ...more };
  }

  function layout(more) {
    const family = getComputedStyle(document.body).fontFamily;
    return {
      paper_bgcolor: colour("--card"), plot_bgcolor: colour("--card"), showlegend: false, hovermode: "closest", hoverdistance: 40,
      font: { family, size: 13, color: colour("--faint") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { family, color: colour("--ink"), size: 13 }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--ink") },
      margin: { l: 56, r: 18, t: 30, b: 46 },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...more,
    };
  }

  function runTrace([index, x, y], faint) {
    const run = data.runs[index], seed = run.seed === null ? "" : "<br>seed " + run.seed;
    const color = faint ? faded(armColour(run.arm)) : armColour(run.arm);
    return {
      type: "scatter", x, y, mode: x.length <= FEW_POINTS ? "lines+markers" : "lines",
      line: { color, dash: armDash(run.arm), width: 1.6 }, marker: { color, size: 5 },
      meta: [`<b>${escaped(run.id)}</b>${run.state === "finished" ? "" : " (" + escaped(run.state) + ")"}<br>${escaped(data.arms[run.arm])}${seed}`],
      hovertemplate: "%{meta[0]}<br>step %{x:,}: <b>%{y:.6~g}</b><extra></extra>",
    };
  }

  function meanTrace([arm, x, y]) {
    return {
      type: "scatter", x, y, mode: "lines", line: { color: armColour(arm), dash: armDash(arm), width: 3.5 },
      meta: [`<b>mean over seeds</b><br>${escaped(data.arms[arm])}`],
      hovertemplate: "%{meta[0]}<br>step %{x:,}: <b>%{y:.6~g}</b><extra></extra>",
    };
  }

  function drawCurves() {
    const metric = document.getElementById("metric").value, withMeans = document.getElementById("means").checked;
    const ticked = new Set(all("[data-run]:checked").map((box) => Number(box.dataset.run)));
    const arms = new Set([...ticked].map((index) => data.runs[index].arm));
    const { runs, means } = data.curves.find((found) => found.metric === metric);
    const shown = runs.filter(([index]) => ticked.has(index));
    const thick = withMeans ? means.filter(([arm]) => arms.has(arm)) : [];
    const traces = [...shown.map((run) => runTrace(run, thick.length > 0)), ...thick.map(meanTrace)];
    const axes = { xaxis: axis("step", { rangemode: "tozero" }), yaxis: axis(metric, {}) };
    Plotly.react("plot", traces, layout({ ...axes, uirevision: metric }), config);
    document.getElementById("count").textContent = `${shown.length} of ${runs.length} runs with ${metric} shown`;
    for (const box of all("[data-arm]")) {
      const own = [...box.closest(".arm").querySelectorAll("[data-run]")];
      box.checked = own.every((run) => run.checked);
      box.indeterminate = !box.checked && own.some((run) => run.checked);
    }
  }

  function seedTrace(effect, [seed, y]) {
    return {
      type: "scatter", x: effect.x, y, mode: "lines+markers", connectgaps: true,
      line: { color: faded(colour("--faint")), width: 1 }, marker: { color: faded(colour("--faint")), size: 5 }, text: effect.names.map(escaped),
      hovertemplate: `seed ${seed === null ? "none" : seed}<br>%{text}: <b>%{y:.6~g}</b><extra></extra>`,
    };
  }

  function drawEffect(effect, index) {
    const { x, names, means, lows, highs } = effect, isName = effect.scale === "category";
    const above = highs.map((high, i) => (high === null ? 0 : high - means[i]));
    const below = lows.map((low, i) => (low === null ? 0 : means[i] - low));
    const mean = {
      type: "scatter", x, y: means, mode: isName ? "markers" : "lines+markers", text: names.map(escaped),
      line: { color: colour("--c0"), width: 2.5 }, marker: { size: 10 },
      error_y: { type: "data", symmetric: false, array: above, arrayminus: below, thickness: 2, width: 5 },
      customdata: lows.map((low, i) => (low === null ? "" : `<br>${data.confidence} interval ${low.toPrecision(6)} to ${highs[i].toPrecision(6)}`)),
      hovertemplate: "%{text}: <b>%{y:.6~g}</b>%{customdata}<extra></extra>",
    };
    const ticks = { tickvals: x, ticktext: names.map((name) => escaped(shortened(name))) };
    const type = { type: effect.scale === "log" ? "log" : "linear", ...(isName ? { range: [-0.5, x.length - 0.5] } : {}) };
    const title = effect.variable + (effect.scale === "log" ? " (log scale)" : "");
    const axes = { xaxis: axis(title, { ...type, ...ticks }), yaxis: axis(data.metric, { nticks: 6 }) };
    const traces = [...effect.seeds.map((seed) => seedTrace(effect, seed)), mean];
    Plotly.react("effect-" + index, traces, layout({ ...axes, margin: { l: 56, r: 18, t: 12, b: 46 } }), { ...config, displayModeBar: false });
  }

  function draw() {
    data.effects.forEach(drawEffect);
    if (data.curves.length) drawCurves();
  }

  function tick(boxes, value) {
    for (const box of boxes) box.checked = value;
    drawCurves();
  }

  if (data.curves.length) {
    for (const box of all("[data-run], #metric, #means")) box.addEventListener("change", drawCurves);
    for (const box of all("[data-arm]")) {
      box.addEventListener("change", () => tick(box.closest(".arm").querySelectorAll("[data-run]"), box.checked));
    }
    document.getElementById("all").addEventListener("click", () => tick(all("[data-run]"), true));
    document.getElementById("none").addEventListener("click", () => tick(all("[data-run]"), false));
  }
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
  addEventListener("beforeprint", () => { for (const found of all("details")) found.open = true; });
  draw();
})();
