// Draws the charts of #charts-data into the .plot elements with uPlot, and does nothing where there are none.
(function () {
  "use strict";
  const source = document.getElementById("charts-data");
  if (source === null) return;
  const data = JSON.parse(source.textContent);
  const HEIGHT = 220;
  const COLOURS = 8;
  const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4], [1, 5], [12, 6]];
  const severalRuns = data.curves.length > 1;
  const plots = [];
  let syncing = false;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function shown(value, form) {
    if (value === null || value === undefined) return "";
    if (form === "share") return (100 * value).toFixed(1) + "%";
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  function tick(value, form) {
    if (value === null) return "";
    if (form === "share") return Number((100 * value).toPrecision(4)) + "%";
    const size = Math.abs(value);
    if (size >= 10000) return Number((value / 1000).toPrecision(4)) + "k";
    return size !== 0 && size < 1e-3 ? value.toExponential() : String(Number(value.toPrecision(6)));
  }

  // what tells lines apart: the run by colour and the measure by dashes, or, of one run, the measure by colour
  function styles(chart) {
    const measures = [...new Set(chart.lines.map((line) => line[1]))];
    return chart.lines.map(([place, key]) => {
      const number = measures.indexOf(key);
      return severalRuns
        ? { colour: place % COLOURS, dash: DASHES[number % DASHES.length] }
        : { colour: number % COLOURS, dash: [] };
    });
  }

  function columns(chart) {
    const tables = chart.lines.map(([place, key]) => [data.curves[place].steps, data.curves[place].values[key]]);
    return uPlot.join(tables);
  }

  // alarms, best steps and limits of the curves that a chart shows
  function marks(key, chart) {
    const places = [...new Set(chart.lines.map((line) => line[0]))];
    const found = [];
    for (const place of places) {
      const curve = data.curves[place];
      const who = severalRuns ? curve.name + ": " : "";
      if (key === "drift" && curve.limit !== null) {
        found.push({ y: curve.limit, name: "mark-bad", text: who + "limit of the alarm at " + shown(curve.limit) });
      }
      if (curve.alarm !== null && ["logps", "drift", "loss", "dev", "margins"].includes(key)) {
        found.push({ x: curve.alarm, name: "mark-bad", text: who + "alarm from step " + curve.alarm });
      }
      if (curve.best !== null && ["dev", "loss"].includes(key)) {
        found.push({ x: curve.best, name: "mark-good", text: who + "adapter of step " + curve.best + " is kept" });
      }
    }
    return found;
  }

  function drawMarks(found) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.lineWidth = 1.5 * devicePixelRatio;
      for (const mark of found) {
        ctx.strokeStyle = colour(mark.name);
        ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
        ctx.beginPath();
        if (mark.x !== undefined) {
          const x = plot.valToPos(mark.x, "x", true);
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
        } else {
          const y = plot.valToPos(mark.y, "y", true);
          ctx.moveTo(bbox.left, y);
          ctx.lineTo(bbox.left + bbox.width, y);
        }
        ctx.stroke();
      }
      ctx.restore();
    };
  }

  function yRange(chart, found) {
    const limits = found.filter((mark) => mark.y !== undefined).map((mark) => mark.y);
    return (plot, low, high) => {
      if (low === null || high === null) return [0, 1];
      low = Math.min(low, ...limits);
      high = Math.max(high, ...limits);
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      if (chart.form === "share" && low >= 0 && high <= 1) {
        return [Math.max(-0.02, low - room), Math.min(1.02, high + room)];
      }
      return [low - room, high + room];
    };
  }

  function logSplits(low, high) {
    const factors = high / low > 300 ? [1] : high / low > 30 ? [1, 3] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of factors) found.push(factor * 10 ** power);
    }
    return found.filter((value) => value >= low && value <= high);
  }

  // the nearest step at which a line has a value
  function valueAt(plot, line, index) {
    const values = plot.data[line];
    for (let away = 0; away < 4; away++) {
      for (const place of [index - away, index + away]) {
        if (values[place] !== null && values[place] !== undefined) return values[place];
      }
    }
    return null;
  }

  function options(key, chart, width, look, found, buttons) {
    const axis = { stroke: colour("muted"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const values = columns(chart).slice(1).flat().filter((value) => value !== null && value !== undefined);
    const lowest = values.reduce((one, other) => Math.min(one, other), Infinity);
    const highest = values.reduce((one, other) => Math.max(one, other), -Infinity);
    const isLog = chart.form === "log" && lowest > 0 && highest > 30 * lowest;
    const few = columns(chart)[0].length <= 60;
    return {
      width, height: HEIGHT,
      legend: { show: false },
      scales: {
        x: { time: false },
        y: isLog ? { distr: 3, range: (plot, low, high) => [low / 1.2, high * 1.2] } : { range: yRange(chart, found) },
      },
      axes: [
        { ...axis, size: 28, grid: { show: false }, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
        { ...axis, size: 58, gap: 8, grid: { stroke: colour("grid"), width: 1 }, space: 36, ...(isLog ? { splits: (plot, axis, low, high) => logSplits(low, high) } : {}), values: (plot, ticks) => ticks.map((value) => tick(value, chart.form)) },
      ],
      series: [
        {},
        ...chart.lines.map(([place, measure], number) => {
          const values = data.curves[place].values[measure];
          const count = values.filter((value) => value !== null).length;
          const stroke = colour("series-" + look[number].colour);
          return {
            stroke, width: 2, dash: look[number].dash, spanGaps: true, auto: true,
            show: buttons[number].getAttribute("aria-pressed") === "true",
            points: { show: count < 2 || (few && count <= 25 && measure.startsWith("eval_")), size: 6, stroke, fill: colour("bg") },
          };
        }),
      ],
      cursor: {
        y: false, points: { size: 7 },
        drag: { x: true, y: false },
        sync: { key: "step", scales: ["x", null], setSeries: false },
      },
      hooks: {
        draw: [drawMarks(found)],
        setCursor: [
          (plot) => {
            const index = plot.cursor.idx;
            chart.lines.forEach((line, number) => {
              const text = index === null || index === undefined ? "" : shown(valueAt(plot, number + 1, index), chart.form);
              buttons[number].querySelector(".value").textContent = text;
            });
          },
        ],
        setScale: [
          (plot, scale) => {
            if (scale !== "x" || syncing || !plot.status) return;
            syncing = true;
            for (const other of plots) {
              if (other.plot && other.plot !== plot) other.plot.setScale("x", { min: plot.scales.x.min, max: plot.scales.x.max });
            }
            syncing = false;
          },
        ],
      },
    };
  }

  function zoomOut() {
    syncing = true;
    for (const { plot } of plots) {
      if (plot) plot.setScale("x", { min: plot.data[0][0], max: plot.data[0][plot.data[0].length - 1] });
    }
    syncing = false;
  }

  function moveCursor(plot, event) {
    const steps = plot.data[0];
    const last = steps.length - 1;
    const now = plot.cursor.idx;
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") {
      plot.setCursor({ left: -10, top: -10 });
      zoomOut();
    } else if (event.key in moves && !event.ctrlKey && !event.altKey && !event.metaKey) {
      const from = now === null || now === undefined ? (moves[event.key] > 0 ? -1 : last + 1) : now;
      const place = Math.min(last, Math.max(0, from + moves[event.key]));
      for (const other of plots) {  // what a key does is not passed on by uPlot, as what the mouse does is
        if (other.plot) other.plot.setCursor({ left: other.plot.valToPos(steps[place], "x"), top: HEIGHT / 3 }, true, false);
      }
    } else {
      return;
    }
    event.preventDefault();
  }

  function setUp(element) {
    const key = element.dataset.chart;
    const chart = data.charts[key];
    const figure = element.closest("figure");
    const buttons = [...figure.querySelectorAll(".legend button")];
    const look = styles(chart);
    const found = marks(key, chart);
    const entry = { plot: null };
    plots.push(entry);
    const note = figure.querySelector(".marks");
    if (found.length) {
      note.textContent = "Dashed: " + found.map((mark) => mark.text).join("; ") + ".";
      note.hidden = false;
    }
    buttons.forEach((button, number) => {
      const line = button.querySelector("line");
      line.style.stroke = "var(--series-" + look[number].colour + ")";
      line.style.strokeDasharray = look[number].dash.map((length) => length * 0.7).join(" ");
      button.addEventListener("click", () => {
        const show = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(show));
        if (entry.plot) entry.plot.setSeries(number + 1, { show });
      });
    });
    element.addEventListener("keydown", (event) => entry.plot && moveCursor(entry.plot, event));
    element.addEventListener("dblclick", zoomOut);
    entry.draw = () => {
      const width = element.clientWidth;
      if (width < 50) return;
      if (entry.plot) entry.plot.destroy();
      entry.plot = new uPlot(options(key, chart, width, look, found, buttons), columns(chart), element);
    };
    new ResizeObserver(() => {
      const width = element.clientWidth;
      if (entry.plot === null) entry.draw();
      else if (width >= 50 && width !== entry.plot.width) entry.plot.setSize({ width, height: HEIGHT });
    }).observe(element);
  }

  document.querySelectorAll(".plot[data-chart]").forEach(setUp);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((entry) => entry.draw()));
  addEventListener("beforeprint", () => plots.forEach((entry) => entry.draw()));
})();
