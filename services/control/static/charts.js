// The plots over steps: one uPlot per figure, a legend that shows the values of the step under the cursor, marks for events.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const line = (key, label, color, dash) => ({ key, label, color: () => css(color), dash });

const CHARTS = [
  { id: "length", title: "Response length (tokens)", lines: [
    line("length_mean", "mean", "--c1"), line("length_p95", "p95", "--c2"), line("length_max", "max", "--c3"), line("cap_tokens", "cap", "--c4", [6, 4]),
  ] },
  { id: "ends", title: "Truncated and looping rollouts (share)", lines: [line("truncation", "truncated", "--c1"), line("loops", "looping", "--c2", [6, 4])] },
  { id: "kl", title: "KL to the teacher by position of the token (nats)", byPosition: true, lines: [line("kl_nats", "all", "--c1")] },
  { id: "pressure", title: "Governor: pressure", lines: [line("pressure", "pressure", "--c1")], range: [0, 1] },
  { id: "eval", title: "Held-out accuracy and truncation (share)", range: [0, 1], sparse: true, lines: [
    line("eval_accuracy", "accuracy", "--c4"), line("eval_truncation", "truncated", "--c2", [6, 4]),
  ] },
  { id: "speed", title: "Tokens per second", lines: [line("tokens_per_s", "tokens/s", "--c1")] },
];

export function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(4)));
}

const read = (record, key) => (key.startsWith("kl:") ? record.kl_by_position?.[key.slice(3)] : record[key]) ?? null;

// Charts of what the service declares: actuators by unit, signals' evidence over its threshold (pressure starts at 1).
const STYLES = [["--c1"], ["--c2", [6, 4]], ["--c3", [2, 3]], ["--c4", [8, 3, 2, 3]], ["--c1", [1, 3]], ["--c2", [10, 4]], ["--c3", [4, 2]]];
const styled = (key, label, i) => line(key, label, ...STYLES[i % STYLES.length]);
const GROUPS = {
  share: { id: "shares", title: "Governor: factors and shares", range: [0, 1] },
  factor: { id: "shares", title: "Governor: factors and shares", range: [0, 1] },
  "": { id: "weights", title: "Governor: loss weights" },
  nats: { id: "tilt", title: "Governor: tilts (nats)" },
};

function declaredCharts({ actuators, signals }) {
  const groups = new Map();
  for (const { name, title, unit } of actuators) {
    if (name === "cap_tokens") continue; // drawn with the lengths it cuts
    const group = GROUPS[unit] ?? { id: `unit-${unit}`, title: `Governor: ${unit}` };
    if (!groups.has(group.id)) groups.set(group.id, { ...group, lines: [] });
    const { lines } = groups.get(group.id);
    lines.push(styled(name, title, lines.length));
  }
  const evidence = signals.map(({ name }, i) => styled(`evidence:${name}`, name.replaceAll("_", " "), i));
  return [...groups.values(), { id: "evidence", title: "Governor: evidence over its threshold (acts from 1 on)", range: [0, 1.5], lines: evidence }];
}

class Chart {
  constructor(parent, spec, tip) {
    this.spec = spec;
    this.tip = tip;
    this.lines = spec.lines;
    this.figure = document.createElement("figure");
    this.figure.innerHTML = `<figcaption></figcaption><div class="plot" tabindex="0" role="group"></div><ul class="legend"></ul>`;
    this.figure.id = `chart-${spec.id}`;
    this.figure.querySelector("figcaption").textContent = spec.title;
    this.plot = this.figure.querySelector(".plot");
    this.legend = this.figure.querySelector(".legend");
    this.plot.setAttribute("aria-label", spec.title);
    this.events = [];
    this.records = [];
    this.cursor = null;
    parent.append(this.figure);
    this.build();
    new ResizeObserver(() => this.plot.clientWidth && this.uplot.setSize(this.size())).observe(this.plot);
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.plot.addEventListener("blur", () => this.point(null));
  }

  size() {
    return { width: this.plot.clientWidth, height: this.plot.clientHeight };
  }

  build() {
    this.uplot?.destroy();
    const axis = { stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { stroke: () => css("--line") } };
    const y = this.spec.range
      ? { range: this.spec.range }
      : { range: (_, low, high) => [Math.min(0, low ?? 0), (high ?? 1) > 0 ? high * 1.08 : 1] };
    this.uplot = new uPlot({
      ...this.size(),
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false },
      scales: { x: { time: false }, y },
      axes: [{ ...axis, size: 32 }, { ...axis, size: 58 }],
      series: [{}, ...this.lines.map(({ color, dash }) => ({ stroke: color, width: 2, dash, spanGaps: Boolean(this.spec.sparse), points: { show: Boolean(this.spec.sparse) } }))],
      hooks: { draw: [() => this.drawEvents()], setCursor: [(u) => this.writeLegend(u.cursor.idx)] },
    }, [[], ...this.lines.map(() => [])], this.plot);
    this.legend.replaceChildren(...[{ label: "step", key: "step" }, ...this.lines].map(({ key, label, color, dash }) => {
      const item = document.createElement("li");
      if (color) {
        const swatch = document.createElement("span");
        swatch.className = dash ? "swatch dashed" : "swatch";
        swatch.style.borderColor = color();
        item.append(swatch);
      }
      const value = document.createElement("span");
      value.dataset.series = key;
      item.className = color ? "" : "step";
      item.append(`${label} `, value);
      return item;
    }));
  }

  // Lines per position appear with the first record that has them.
  usePositions(records) {
    if (!this.spec.byPosition) return;
    const buckets = [...new Set(records.flatMap((record) => Object.keys(record.kl_by_position ?? {})))];
    buckets.sort((a, b) => parseInt(a) - parseInt(b));
    if (!buckets.length || buckets.length === this.lines.length) return;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const color = (i) => () => `hsl(${215 + (i * 130) / Math.max(1, buckets.length - 1)} 70% ${dark.matches ? 72 : 40}%)`;
    this.lines = buckets.map((bucket, i) => ({ key: `kl:${bucket}`, label: bucket, color: color(i), dash: i % 2 ? [6, 3] : undefined }));
    this.build();
  }

  setRecords(records, events) {
    this.usePositions(records);
    this.records = records;
    this.events = events;
    this.figure.hidden = Boolean(this.spec.sparse) && !records.some((record) => this.lines.some(({ key }) => read(record, key) !== null));
    // A knob that nobody has moved is a line of text, not a plot: the phone's screen is for what happens.
    this.figure.classList.toggle("flat", !this.spec.sparse && records.length > 1 && this.lines.every(({ key }) => new Set(records.map((record) => read(record, key)).filter((value) => value !== null)).size < 2));
    this.uplot.setData([records.map(({ step }) => step), ...this.lines.map(({ key }) => records.map((record) => read(record, key)))]);
    this.writeLegend(this.cursor);
  }

  // Without a cursor: the newest record, or the newest that has any of these values where most have none.
  writeLegend(index) {
    const newest = this.spec.sparse ? this.records.findLast((record) => this.lines.some(({ key }) => read(record, key) !== null)) : this.records.at(-1);
    const record = this.records[index] ?? newest;
    for (const value of this.legend.querySelectorAll("[data-series]")) {
      const raw = record ? read(record, value.dataset.series) : null;
      value.textContent = show(raw);
      value.dataset.value = raw ?? "";
    }
  }

  move(event) {
    const last = this.records.length - 1;
    const from = this.cursor ?? last;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last, PageUp: from - 10, PageDown: from + 10, Escape: null }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.legend.setAttribute("aria-live", "polite");
    this.point(to === null ? null : Math.max(0, Math.min(last, to)));
  }

  point(index) {
    this.cursor = index;
    const left = index === null ? -10 : this.uplot.valToPos(this.records[index].step, "x");
    this.uplot.setCursor({ left, top: index === null ? -10 : 1 });
    this.writeLegend(index);
  }

  drawEvents() {
    const { ctx, bbox } = this.uplot;
    ctx.save();
    ctx.strokeStyle = css("--event");
    ctx.globalAlpha = 0.5;
    ctx.setLineDash([3, 5]);
    ctx.beginPath();
    for (const { step } of this.events) {
      const x = this.uplot.valToPos(step, "x", true);
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
    }
    ctx.stroke();
    ctx.restore();
    if (this.spec.id === "length") this.placeMarks();
  }

  // Marks are buttons, so that hover, touch, keyboard and screen reader all reach the sentence.
  placeMarks() {
    const present = new Map([...this.uplot.over.querySelectorAll(".event")].map((mark) => [mark.dataset.key, mark]));
    for (const event of this.events) {
      const key = `${event.step} ${event.text}`;
      const mark = present.get(key) ?? this.makeMark(key, event);
      present.delete(key);
      mark.style.left = `${this.uplot.valToPos(event.step, "x")}px`;
    }
    for (const mark of present.values()) mark.remove();
  }

  makeMark(key, event) {
    const mark = document.createElement("button");
    mark.type = "button";
    mark.className = "event";
    mark.dataset.key = key;
    mark.textContent = "◆";
    mark.setAttribute("aria-label", `Step ${event.step}: ${event.text}`);
    const open = () => this.tip.open(mark, `Step ${event.step}: ${event.text}`);
    for (const name of ["mouseenter", "focus", "click"]) mark.addEventListener(name, open);
    for (const name of ["mouseleave", "blur"]) mark.addEventListener(name, () => this.tip.close());
    this.uplot.over.append(mark);
    return mark;
  }
}

const tip = {
  open(mark, text) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.hidden = false;
    const { left, top } = mark.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${Math.max(8, top - box.offsetHeight - 6)}px`;
  },
  close() {
    document.getElementById("tip").hidden = true;
  },
};

export function makeCharts(parent) {
  const charts = CHARTS.map((spec) => new Chart(parent, spec, tip));
  let declared = false;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => {
    chart.build();
    chart.setRecords(chart.records, chart.events);
  }));
  document.addEventListener("keydown", (event) => event.key === "Escape" && tip.close());
  return {
    setRecords: (records, events) => charts.forEach((chart) => chart.setRecords(records, events)),
    declare: (what) => {
      if (declared || !what) return;
      declared = true;
      charts.push(...declaredCharts(what).map((spec) => new Chart(parent, spec, tip)));
    },
  };
}
