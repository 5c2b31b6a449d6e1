// The form of tunable settings, made from /v1/config/schema. The service alone judges values: a change is shown by a dry run first.

import { Problem, get, request } from "./api.js";
import { show } from "./charts.js";

const answer = document.getElementById("answer");
const form = document.getElementById("settings-form");
const applyButton = document.getElementById("apply-button");

const SMALL_GROUP = 6; // larger groups start folded: a phone shows about as many fields at once

let fields = [];
let config = null; // what the form was filled from, with its ETag
let pending = null; // the patch that the last dry run showed

export async function openSettings() {
  const schema = await get("v1/config/schema");
  fields = [];
  document.getElementById("fields").replaceChildren(...Object.entries(schema.properties).map(([name, node]) => makeGroup(schema, node, [name])));
  await fill();
}

// Called when the run reports another generation: a form nobody edits follows, an edited one keeps its ETag and will be refused.
export async function noticeConfig(newest) {
  const waiting = newest.observed_generation < newest.generation;
  const since = waiting ? `waits for the next step border (generation ${newest.observed_generation} is in force)` : "in force";
  document.getElementById("generation").textContent = `Generation ${newest.generation}, ${since}. An emptied field returns to the job file's value.`;
  if (config && newest.generation !== config.generation && !fields.some(edited)) await fill();
}

function resolve(schema, node) {
  if (node.$ref) return { ...resolve(schema, schema.$defs[node.$ref.split("/").pop()]), ...node };
  const some = node.anyOf?.filter((option) => option.type !== "null");
  return some?.length === 1 ? { ...resolve(schema, some[0]), ...node, anyOf: undefined } : node;
}

function makeGroup(schema, raw, path) {
  const node = resolve(schema, raw);
  const group = document.createElement("details");
  group.open = Object.keys(node.properties).length <= SMALL_GROUP;
  const title = document.createElement("summary");
  title.textContent = path.join(".");
  const grid = document.createElement("div");
  grid.className = "grid";
  const subgroups = [];
  for (const [name, child] of Object.entries(node.properties)) {
    const inner = resolve(schema, child);
    if (inner.properties) subgroups.push(makeGroup(schema, child, [...path, name]));
    else grid.append(makeField(inner, [...path, name]));
  }
  group.append(title, grid, ...subgroups);
  return group;
}

function makeField(node, path) {
  const id = `field-${path.join("-")}`;
  const box = document.createElement("div");
  box.className = "field";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = path.at(-1);
  const input = document.createElement(node.enum ? "select" : "input");
  input.id = id;
  input.name = path.join(".");
  if (node.enum) input.append(...node.enum.map((value) => new Option(value, value)));
  else if (node.type === "boolean") input.type = "checkbox";
  else if (node.type === "integer" || node.type === "number") input.inputMode = "decimal";
  const about = document.createElement("p");
  about.className = "about";
  about.id = `${id}-about`;
  about.textContent = [node.description, range(node)].filter(Boolean).join(" ");
  const error = document.createElement("p");
  error.className = "error";
  error.id = `${id}-error`;
  input.setAttribute("aria-describedby", `${about.id} ${error.id}`);
  box.append(label, input, about, error);
  const field = { path, node, box, input, error, filled: null };
  input.addEventListener("input", () => {
    box.classList.toggle("edited", edited(field));
    forgetPreview();
  });
  fields.push(field);
  return box;
}

function range(node) {
  const low = node.minimum ?? node.exclusiveMinimum;
  const high = node.maximum ?? node.exclusiveMaximum;
  const parts = [low !== undefined && `${node.minimum === undefined ? "above" : "from"} ${low}`, high !== undefined && `${node.maximum === undefined ? "below" : "to"} ${high}`];
  const text = parts.filter(Boolean).join(" ");
  return text && `Range: ${text}.`;
}

const written = ({ input }) => (input.type === "checkbox" ? String(input.checked) : input.value.trim());
const edited = (field) => written(field) !== field.filled;
const valueIn = (tree, path) => path.reduce((node, key) => node?.[key], tree);
const asText = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

function parse(field) {
  const text = written(field);
  if (text === "") return null;
  if (field.node.type === "string" || field.node.enum) return text;
  // What is not JSON goes to the service as it is: its answer names the field and the range.
  try { return JSON.parse(text); } catch { return text; }
}

function write(field, text) {
  if (field.input.type === "checkbox") field.input.checked = text === "true";
  else field.input.value = text;
}

async function fill({ keepEdits = false } = {}) {
  const { body, etag } = await request("v1/config");
  config = { ...body, etag };
  for (const field of fields) {
    const keep = keepEdits && edited(field);
    field.filled = asText(valueIn(body, field.path));
    if (!keep) write(field, field.filled);
    field.box.classList.toggle("edited", edited(field));
    sayError(field, "");
  }
  forgetPreview();
}

function makePatch() {
  const patch = {};
  for (const field of fields.filter(edited)) {
    const parent = field.path.slice(0, -1).reduce((node, key) => (node[key] ??= {}), patch);
    parent[field.path.at(-1)] = parse(field);
  }
  return patch;
}

function send(patch, dryRun) {
  return request(`v1/config${dryRun ? "?dry_run=true" : ""}`, {
    method: "PATCH",
    headers: { "content-type": "application/merge-patch+json", "if-match": config.etag },
    body: JSON.stringify(patch),
  });
}

function say(text, items = [], ...more) {
  const line = document.createElement("p");
  line.textContent = text;
  const list = document.createElement("ul");
  list.append(...items.map((item) => Object.assign(document.createElement("li"), { textContent: item })));
  answer.replaceChildren(line, ...(items.length ? [list] : []), ...more);
}

export const describe = ({ pointer, from, to }) => `${pointer.slice(1).replaceAll("/", ".")}: ${compact(from)} → ${compact(to)}`;
const compact = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : show(value));

function forgetPreview() {
  pending = null;
  applyButton.disabled = true;
}

function sayError(field, text) {
  field.error.textContent = text;
  if (text) field.input.setAttribute("aria-invalid", "true");
  else field.input.removeAttribute("aria-invalid");
}

async function attempt(action) {
  fields.forEach((field) => sayError(field, ""));
  try {
    await action();
  } catch (problem) {
    forgetPreview();
    if (!(problem instanceof Problem)) say("Nothing was changed: the run cannot be reached just now. Try again in a moment.");
    else if (problem.status === 412) await explainStale();
    else explainRefusal(problem);
  }
}

function unfold(field) {
  for (let node = field.box.parentElement; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
}

document.getElementById("find-setting").addEventListener("input", ({ target }) => {
  const words = target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const field of fields) {
    const text = `${field.input.name} ${field.node.description ?? ""}`.toLowerCase();
    const found = words.every((word) => text.includes(word));
    field.box.hidden = !found;
    if (found && words.length) unfold(field);
  }
});

function explainRefusal({ message, errors }) {
  let first = null;
  for (const { pointer, detail } of errors) {
    const path = pointer.slice(1).split("/");
    const field = fields.find((candidate) => candidate.path.every((part, i) => part === path[i]));
    if (!field) continue;
    sayError(field, detail);
    unfold(field);
    first ??= field;
  }
  const list = errors.map(({ pointer, detail }) => `${pointer.slice(1).replaceAll("/", ".")}: ${detail}`);
  say(errors.length ? "Nothing was changed. The service refuses:" : `Nothing was changed: ${message}`, list);
  first?.input.focus();
}

async function explainStale() {
  const { history } = await get("v1/config/history");
  const missed = history.filter(({ generation }) => generation > config.generation);
  const items = missed.flatMap(({ generation, source, time, changes }) =>
    changes.map((change) => `${describe(change)} (generation ${generation}, ${new Date(time * 1000).toLocaleTimeString()}, ${source})`));
  const button = Object.assign(document.createElement("button"), { type: "button", id: "rebase-button", textContent: "Take the new values and keep my edits" });
  button.addEventListener("click", () => attempt(async () => {
    await fill({ keepEdits: true });
    say("The form now shows the newest settings with your edits in them. Look at what would change, then apply.");
    document.getElementById("preview-button").focus();
  }));
  say("Nothing was changed: somebody else changed the settings after this form was filled, and your edit was made against the old ones. What changed meanwhile:", items, button);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    const patch = makePatch();
    const { body } = await send(patch, true);
    if (!body.changes.length) return say("Nothing would change.");
    pending = patch;
    applyButton.disabled = false;
    say("From the next step border on:", body.changes.map(describe));
  });
});

applyButton.addEventListener("click", () => attempt(async () => {
  const { body } = await send(pending, false);
  await fill();
  say(`Saved as generation ${body.generation}; it takes force at the next step border.`, body.changes.map(describe));
}));

form.addEventListener("reset", (event) => {
  event.preventDefault();
  fill().then(() => answer.replaceChildren());
});
