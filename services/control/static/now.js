// What a person wants first: the newest step in a row of figures, those beyond the run's own targets marked.

import { show } from "./charts.js";

const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);

const three = (value) => show(typeof value === "number" ? Number(value.toPrecision(3)) : value);

// [label, value, what it is held against, whether it is beyond]
function tiles(run, records, governor) {
  const now = records.at(-1) ?? {};
  const cut = governor.signals.expected_cut_rate;
  const signal = governor.readings?.tail ?? governor.readings?.truncation;
  const loops = governor.readings?.loops;
  const bound = (reading) => (reading?.bound === undefined || reading?.bound === null ? "before any filter" : `healthy: at most ${percent(reading.bound)}`);
  const restarts = Object.entries(run.restarts);
  const held = records.findLast((record) => (record.eval_accuracy ?? null) !== null);
  return [
    ["Mean length, tokens", three(now.length_mean), `p95 ${three(now.length_p95)}, cap ${show(now.cap_tokens)}`, false],
    ["Truncated", percent(now.truncation), cut === undefined || cut === null ? "before any filter" : `the teacher: ${percent(cut)}`, (signal?.pressure ?? 0) > 0],
    ["Looping", percent(now.loops), bound(loops), (loops?.pressure ?? 0) > 0],
    ["Pressure", three(governor.pressure), `governor: ${governor.mode ?? "–"}`, governor.pressure >= 0.5],
    ["KL, nats a token", three(now.kl_nats), "low is no proof of health", false],
    ["Held-out accuracy", percent(held?.eval_accuracy), held ? `at step ${held.step}` : "not measured", false],
    ["Restarts", show(restarts.reduce((sum, [, number]) => sum + number, 0)), restarts.map(([role, number]) => `${role} ${number}`).join(", ") || "of actors", restarts.length > 0],
  ];
}

// Written into what is there, so that nothing jumps and a screen reader is not told of values that stayed.
function write(list, rows) {
  while (list.children.length < rows.length) {
    const row = document.createElement("div");
    row.append(document.createElement("dt"), document.createElement("dd"), document.createElement("dd"));
    list.append(row);
  }
  rows.forEach(([label, value, about, beyond], i) => {
    const row = list.children[i];
    row.className = beyond ? "beyond" : "";
    [label, value, beyond ? `▲ ${about}` : about].forEach((text, j) => {
      if (row.children[j].textContent !== text) row.children[j].textContent = text;
    });
  });
}

export function showNow(run, records, governor) {
  write(document.getElementById("now"), tiles(run, records, governor));
  const limits = Object.entries(run.limits).filter(([name]) => name !== "generation");
  write(document.getElementById("limits"), limits.map(([name, value]) => [name.replaceAll("_", " "), show(value), "", false]));
}
