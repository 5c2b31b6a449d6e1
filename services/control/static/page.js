// The live page: asks the run what is new every POLL_MS and shows it. A restarted run has another `instance`: all is read again.

import { get, request } from "./api.js";
import { makeCharts } from "./charts.js";
import { showNow } from "./now.js";
import { describe, noticeConfig, openSettings } from "./settings.js";

const POLL_MS = 2000;
const NUM_DECISIONS = 300;
const $ = (id) => document.getElementById(id);
const charts = makeCharts($("charts"));

let instance = null;
let records = [];
let decisions = [];
let generations = [];
let samples = [];
let chosenSample = null; // null follows the newest that loops, else the newest

async function readNew(run) {
  if (run.instance !== instance || run.step < (records.at(-1)?.step ?? 0)) {
    // A new service, or a rollback: steps that were shown are being made again.
    instance = run.instance;
    records = [];
    decisions = [];
    generations = [];
    await openSettings();
  }
  for (let more = true; more;) {
    const page = await get(`v1/steps?after=${records.at(-1)?.step ?? -1}`);
    records.push(...page.steps);
    more = page.more;
  }
  const after = decisions.at(-1)?.step ?? Math.max(-1, run.step - NUM_DECISIONS);
  decisions.push(...(await get(`v1/governor/decisions?after=${after}`)).decisions);
  decisions = decisions.slice(-NUM_DECISIONS);
  const config = await get("v1/config");
  if (config.generation !== generations.at(-1)?.generation) generations = (await get("v1/config/history")).history;
  await noticeConfig(config);
  samples = (await get("v1/samples")).samples;
  const governor = await get("v1/governor");
  charts.declare(governor.declared);
  return governor;
}

// Decisions that hold or repeat the one before are in the list only.
function findEvents(run) {
  const decided = decisions
    .filter(({ action, signal }, i) => action !== "hold" && (action !== decisions[i - 1]?.action || signal !== decisions[i - 1]?.signal))
    .map(({ step, action, reason }) => ({ step, text: `${action ? `${action}: ` : ""}${reason}` }));
  const tuned = records
    .filter(({ config_generation: now }, i) => i && now > records[i - 1].config_generation)
    .map(({ step, config_generation: now }) => ({ step, text: `settings generation ${now}: ${(generations[now - 1]?.changes ?? []).map(describe).join(", ")}` }));
  const happened = (run.events ?? []).map(({ step, text }) => ({ step, text }));
  return [...decided, ...tuned, ...happened];
}

function showRun(run, governor) {
  document.title = `${run.name}: ${run.phase}, step ${run.step}`;
  $("run-name").textContent = run.name;
  $("phase").textContent = run.waiting_for ? `${run.phase}, waiting: ${run.waiting_for}` : run.phase;
  $("progress").max = run.total_steps;
  $("progress").value = run.step;
  $("progress-text").textContent = `step ${run.step} of ${run.total_steps}, weights v${run.weight_version}`;
  $("governor").textContent = `The governor's mode is ${governor.mode ?? "not known yet"}. Limits in force:`;
  showNow(run, records, governor);
  const over = ["finished", "failed", "stopping"].includes(run.phase);
  for (const button of $("verbs").children) button.disabled = over;
  charts.setRecords(records, findEvents(run));
}

// Steps in a row at which nothing moved are one line.
function showDecisions() {
  const lines = [];
  for (const { step, action, reason } of decisions) {
    const last = lines.at(-1);
    if (action === "hold" && last?.action === "hold") Object.assign(last, { until: step, reason });
    else lines.push({ from: step, until: step, action, reason });
  }
  $("decisions").replaceChildren(...lines.reverse().map(({ from, until, action, reason }) => {
    const item = document.createElement("li");
    const steps = from === until ? `Step ${from}` : `Steps ${from} to ${until}`;
    const verb = document.createElement("strong");
    verb.textContent = action;
    item.className = action === "hold" ? "hold" : "act";
    item.append(`${steps}: `, ...(action ? [verb, ". "] : []), reason);
    return item;
  }));
}

function showSample() {
  const looping = samples.findLastIndex(({ loop_onset_char: onset }) => onset !== null && onset !== undefined);
  const index = Math.min(chosenSample ?? (looping >= 0 ? looping : samples.length - 1), samples.length - 1);
  $("older-sample").disabled = index <= 0;
  $("newer-sample").disabled = index >= samples.length - 1;
  const sample = samples[index];
  if (!sample) {
    $("sample-facts").textContent = "None yet.";
    return index;
  }
  const onset = sample.loop_onset_char ?? null;
  const looped = onset === null ? "" : "; the loop is marked";
  $("sample-facts").textContent = `Step ${sample.step}: ${sample.length_tokens} tokens, ended by ${sample.finish_reason}${looped}.`;
  $("sample-prompt").textContent = sample.prompt;
  const text = onset === null ? sample.response : sample.response.slice(0, onset);
  $("sample-response").replaceChildren(text);
  if (onset !== null) {
    const loop = document.createElement("mark");
    loop.textContent = sample.response.slice(onset);
    $("sample-response").append(loop);
  }
  return index;
}

function browseSamples(by) {
  chosenSample = Math.max(0, showSample() + by);
  if (chosenSample >= samples.length - 1) chosenSample = null;
  showSample();
}

let asked = Promise.resolve(false);

// One question after the other: a dialog's close event comes later than its closing, and would answer the next question too.
function ask(text) {
  const answer = (resolve) => {
    $("ask-text").textContent = text;
    $("ask").returnValue = "no";
    $("ask").showModal();
    $("ask").addEventListener("close", () => resolve($("ask").returnValue === "yes"), { once: true });
  };
  asked = asked.then(() => new Promise(answer));
  return asked;
}

async function requestVerb({ verb, ask: question }) {
  if (question && !(await ask(question))) return;
  try {
    await request(`v1/run/${verb}`, { method: "POST" });
    $("verb-answer").textContent = `Asked to ${verb}; it happens at the next step border.`;
  } catch (problem) {
    $("verb-answer").textContent = `Not done: ${problem.message}`;
  }
}

let connected = null;

function sayConnection(live) {
  if (live === connected) return;
  connected = live;
  const time = new Date().toLocaleTimeString();
  $("connection").textContent = live ? `Live since ${time}` : `Connection lost at ${time}: what you see is old. Trying again…`;
}

async function poll() {
  try {
    const run = await get("v1/run");
    const governor = await readNew(run);
    sayConnection(true);
    showRun(run, governor);
    showDecisions();
    showSample();
  } catch (error) {
    sayConnection(false);
    console.info(error);
  } finally {
    setTimeout(poll, POLL_MS);
  }
}

$("older-sample").addEventListener("click", () => browseSamples(-1));
$("newer-sample").addEventListener("click", () => browseSamples(1));
$("verbs").addEventListener("click", ({ target }) => target.dataset.verb && requestVerb(target.dataset));
poll();
