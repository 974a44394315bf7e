// The page of the demo: a history, two readings of it, reasons, invented products, written texts.
// The state is this tab's alone and goes with every request; the server keeps nothing of it.

import { TEXTS } from "./texts.js";
import { bar, button, byId, element, PARTS, redraw, scale, signed, total } from "./view.js";

const state = {
  language: navigator.language.startsWith("zh") ? "zh" : "en",
  history: [], // {item_id, item} of the catalogue, or {text}
  products: [], // texts
  readings: [], // name of each list's reading
  weight: 0.5,
  chosen: null, // {list, item_id}: whose reasons are shown
};
const page = {
  about: null,
  answer: null, // the lists that are shown
  reasons: new Map(), // item id -> its parts, and by key of an event what it contributed
  latest: [], // for each list that is shown, item id -> rank
  before: [], // the same of the lists before
  running: false,
  wanted: null, // when the newest state was wanted that was not yet asked for
};

const say = (name, ...values) => (values.length ? TEXTS[state.language][name](...values) : TEXTS[state.language][name]);
const weightOf = (reading) => ({ evidence: 0, learnt: 1, both: state.weight })[reading];
const nameOf = (reading) => say(reading === "evidence" && !page.about.counted ? "words" : reading);
const textOf = (event) => event.item ?? event.text;
const keyOf = (event) => event.item_id ?? `text ${event.text}`;

// ------------------------------------------------------------------------------------------------------ the server

async function ask(path, body) {
  for (;;) {
    const options = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(`api/${path}`, options);
    if (response.status === 503) {
      byId("latency").textContent = say("busy");
      await new Promise((done) => setTimeout(done, 1000 * Number(response.headers.get("retry-after") ?? 1)));
      continue;
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
}

function visit() {
  const history = state.history.map(({ item_id, text }) => (item_id === undefined ? { text } : { item_id }));
  return { history, products: state.products, weights: state.readings.map(weightOf) };
}

// Ask for the lists of the present state, then for their reasons; while an answer is awaited, only the newest state waits.
async function update() {
  page.wanted = performance.now();
  drawState();
  if (page.running) return;
  page.running = true;
  try {
    while (page.wanted !== null) {
      const start = page.wanted;
      page.wanted = null;
      const keys = state.history.map(keyOf);
      const answer = await ask("lists", visit());
      if (page.wanted !== null) continue;
      drawLists(answer, start);
      const items = answer.readings.flatMap(({ rows, products }) => [...rows, ...products].map((row) => row.item_id));
      const found = await ask("reasons", { ...visit(), items: [...new Set(items)] });
      if (page.wanted === null) drawReasons(found.items, keys);
    }
  } catch (error) {
    fail(error);
  } finally {
    page.running = false;
  }
}

function fail(error) {
  byId("latency").textContent = error.message;
  byId("latency").className = "error";
}

// ------------------------------------------------------------------------------------------------------- the state

function add(event) {
  const others = state.history.filter((each) => keyOf(each) !== keyOf(event));
  state.history = [...others, event].slice(-page.about.limits.events);
  update();
}

function remove(key) {
  state.history = state.history.filter((each) => keyOf(each) !== key);
  update();
}

function invent(text) {
  state.products = [...state.products.filter((each) => each !== text), text].slice(-page.about.limits.products);
  update();
}

function translate() {
  document.documentElement.lang = state.language === "zh" ? "zh-Hans" : "en";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  for (const each of document.querySelectorAll("[data-placeholder]")) {
    each.placeholder = say(each.dataset.placeholder);
    each.setAttribute("aria-label", say(each.dataset.placeholder));
  }
  byId("language").textContent = say("other");
  byId("language").lang = state.language === "zh" ? "en" : "zh-Hans";
  byId("name").textContent = page.about.name;
  byId("about").textContent = say("about", page.about.items.toLocaleString(state.language));
  byId("latency").textContent = "";
  drawTasks();
}

function drawState() {
  byId("starters").hidden = state.history.length > 0;
  byId("clear").hidden = state.history.length === 0;
  const chips = page.about.starters.map((item) => button(item.item, () => add(item), { className: "chip" }));
  byId("chips").replaceChildren(...chips);
  byId("weight").value = state.weight;
  byId("weight-value").textContent = `${Math.round(100 * state.weight)}%`;
  byId("weight-label").hidden = !state.readings.includes("both");
  redraw(drawHistory, byId("history"));
}

// The row whose reasons are shown: the one that was clicked, else the first of the last list.
function chosenRow() {
  const readings = page.answer?.readings ?? [];
  const list = state.chosen && state.chosen.list < readings.length ? state.chosen.list : readings.length - 1;
  const rows = [...(readings[list]?.rows ?? []), ...(readings[list]?.products ?? [])];
  return { list, row: rows.find((each) => each.item_id === state.chosen?.item_id) ?? rows[0] };
}

// The parts of an event's contribution to a row, or of the row's score, as they count in a list.
function inReading(parts, list) {
  const factors = page.answer.readings[list].factors;
  return Object.fromEntries(Object.entries(parts ?? {}).map(([name, value]) => [name, value * factors[name]]));
}

function drawHistory() {
  const { list, row } = chosenRow();
  const events = (row && page.reasons.get(row.item_id)?.events) ?? new Map();
  const partsBy = new Map(state.history.map((event) => [keyOf(event), row ? inReading(events.get(keyOf(event)), list) : {}]));
  const several = [...partsBy.values()];
  const [least, most] = scale(several);
  const names = say("parts");
  const rows = state.history.map((event) => {
    const key = keyOf(event);
    const parts = partsBy.get(key);
    const sum = element("span", { className: "number" }, Object.keys(parts).length ? signed(total(parts)) : "");
    const made = element("li", { dataset: { key } });
    const drop = button("×", () => remove(key), { label: say("remove", textOf(event)), className: "small", focus: key });
    const mark = event.item_id === undefined || isNew(event.item_id) ? [badge("new")] : [];
    made.append(element("span", { className: "text" }, textOf(event), ...mark), drop);
    made.append(element("span", { className: "line" }, bar(parts, least, most, names, textOf(event)), sum));
    return made;
  });
  byId("history").replaceChildren(...rows);
  byId("bars").textContent = state.history.length && row ? say("bars", row.item, nameOf(state.readings[list])) : say("more");
  const used = PARTS.filter((name) => several.some((parts) => Math.abs(parts[name] ?? 0) >= 5e-4));
  byId("legend").replaceChildren(...used.map((name) => element("li", { className: name }, names[name])));
}

const isNew = (id) => id.startsWith("new-");

function badge(kind) {
  return element("span", { className: `badge ${kind}`, title: say(`${kind}Title`) }, say(kind));
}

// ------------------------------------------------------------------------------------------------------- the lists

function drawLists(answer, start) {
  page.answer = answer;
  page.before = page.latest;
  page.latest = answer.readings.map(({ rows, products }) => new Map([...rows, ...products].map((row) => [row.item_id, row.rank])));
  drawReadings();
  drawProducts();
  const all = performance.now() - start;
  const server = answer.readings.reduce((sum, reading) => sum + reading.ms, 0);
  byId("latency").className = "";
  byId("latency").textContent = say("latency", Math.round(all), Math.round(server));
  Object.assign(document.body.dataset, { lists: Number(document.body.dataset.lists ?? 0) + 1, latency: all.toFixed(1) });
}

function drawReadings() {
  redraw(() => byId("readings").replaceChildren(...page.answer.readings.map(drawReading)), byId("readings"));
}

function drawReasons(items, keys) {
  const byKey = (events) => new Map(events.map((parts, place) => [keys[place], parts]));
  page.reasons = new Map(Object.entries(items).map(([id, { parts, events }]) => [id, { parts, events: byKey(events) }]));
  for (const line of byId("readings").querySelectorAll("[data-bar]")) fillBar(line);
  redraw(drawHistory, byId("history"));
  document.body.dataset.reasons = Number(document.body.dataset.reasons ?? 0) + 1;
}

// Draw the bar of a list's row, on the scale of its list.
function fillBar(line) {
  const [list, id] = [Number(line.dataset.bar), line.dataset.item];
  const { rows, products } = page.answer.readings[list];
  const shown = [...rows, ...products].map((row) => inReading(page.reasons.get(row.item_id)?.parts, list));
  const parts = inReading(page.reasons.get(id)?.parts, list);
  const names = say("parts");
  const detail = Object.entries(parts).filter(([, value]) => Math.abs(value) >= 5e-4).map(([name, value]) => `${names[name]} ${signed(value)}`);
  line.replaceChildren(bar(parts, ...scale(shown), names, detail.join(", ")));
}

function drawReading(reading, list) {
  const options = (page.about.weights.length > 1 ? ["evidence", "both", "learnt"] : ["evidence"]).map((name) =>
    element("option", { value: name, selected: state.readings[list] === name }, nameOf(name)),
  );
  const choice = element("select", { className: "reading", dataset: { focus: `reading ${list}` } }, ...options);
  choice.setAttribute("aria-label", say("reading"));
  choice.addEventListener("change", () => {
    state.readings[list] = choice.value;
    page.latest[list] = new Map(); // rows of different readings do not move
    update();
  });
  const silent = state.readings[list] === "evidence" && state.history.length === 0;
  const below = reading.products.filter((own) => own.rank === null || own.rank > reading.rows.length);
  const rows = silent ? [] : [...reading.rows, ...below];
  const made = rows.map((row) => drawRow(row, list));
  const hint = silent ? [element("p", { className: "hint" }, say("nothing"))] : [];
  return element("div", { className: "list" }, choice, ...hint, element("ol", { dataset: { list } }, ...made));
}

function drawRow(row, list) {
  const { row: chosen, list: where } = chosenRow();
  const marked = chosen && where === list && chosen.item_id === row.item_id;
  const marks = row.new ? [badge("new")] : row.cold ? [badge("cold")] : [];
  const rank = row.rank ?? `${byId("readings").dataset.most}+`;
  const why = button("", () => choose(list, row.item_id), { className: "text", focus: `why ${list} ${row.item_id}` });
  why.setAttribute("aria-pressed", marked ? "true" : "false");
  why.title = say("why", row.item);
  why.append(row.item, ...marks);
  const event = { item_id: row.item_id, item: row.item };
  const more = button("+", () => add(event), { label: say("add", row.item), className: "small", focus: `add ${list} ${row.item_id}` });
  const made = element("li", { dataset: { key: `${list} ${row.item_id}` }, className: marked ? "marked" : "" });
  made.append(element("span", { className: "rank" }, `${rank}`), why, moved(row, list), more);
  const score = element("span", { className: "number", title: say("score") }, row.score === null ? "" : row.score.toFixed(3));
  const line = element("span", { className: "bars", dataset: { bar: list, item: row.item_id } });
  fillBar(line);
  made.append(element("span", { className: "line" }, line, score));
  return made;
}

// How far a row has moved since the list before.
function moved(row, list) {
  const before = page.before[list] ?? new Map();
  if (!before.size || row.rank === null) return element("span", { className: "moved" });
  const rank = before.get(row.item_id);
  if (rank === undefined) return element("span", { className: "moved up", title: say("entered") }, "●");
  const places = rank - row.rank;
  if (!places) return element("span", { className: "moved" });
  const text = places > 0 ? `▲${places}` : `▼${-places}`;
  const label = places > 0 ? say("up", places) : say("down", -places);
  return element("span", { className: `moved ${places > 0 ? "up" : "down"}`, title: label, "aria-label": label, role: "img" }, text);
}

function choose(list, item_id) {
  state.chosen = { list, item_id };
  drawReadings();
  redraw(drawHistory, byId("history"));
}

function drawProducts() {
  const most = byId("readings").dataset.most;
  const rows = page.answer.products.map(({ text, item_id }) => {
    const own = page.answer.readings.map((reading) => reading.products.find((row) => row.item_id === item_id));
    const places = own.map((row, list) => row && say("place", row.rank ?? say("below", most), nameOf(state.readings[list])));
    const note = places.filter(Boolean).join(" · ") || say("inHistory");
    const drop = button("×", () => forget(text, item_id), { label: say("remove", text), className: "small", focus: text });
    const made = element("li", { dataset: { key: item_id } });
    made.append(element("span", { className: "text" }, text, badge("new")), drop, element("span", { className: "note" }, note));
    return made;
  });
  byId("products").replaceChildren(...rows);
}

function forget(text, item_id) {
  state.products = state.products.filter((each) => each !== text);
  state.history = state.history.filter((event) => event.text !== text && event.item_id !== item_id);
  update();
}

// ------------------------------------------------------------------------------------------------------ the search

const search = { hits: [], words: "", active: -1, turn: 0 };

async function find() {
  const words = byId("search").value.trim();
  const turn = ++search.turn;
  if (!words) {
    close();
    return;
  }
  const hits = await ask(`items?q=${encodeURIComponent(words)}`);
  if (turn !== search.turn) return;
  const invented = state.products.filter((text) => text.toLowerCase().includes(words.toLowerCase())).map((text) => ({ text }));
  search.hits = [...hits, ...invented, ...(invented.some((own) => own.text === words) ? [] : [{ text: words, raw: true }])];
  Object.assign(search, { words, active: 0 });
  drawFound();
}

function drawFound() {
  const rows = search.hits.map((hit, place) => {
    const text = hit.raw ? say("asText", hit.text) : textOf(hit);
    const made = element("li", { id: `hit-${place}`, role: "option", "aria-selected": `${place === search.active}` }, text);
    made.addEventListener("mousedown", (event) => {
      event.preventDefault(); // the field keeps the focus
      take(place);
    });
    return made;
  });
  byId("found").replaceChildren(...rows);
  byId("found").hidden = rows.length === 0;
  byId("search").setAttribute("aria-expanded", `${rows.length > 0}`);
  if (rows.length) {
    byId("search").setAttribute("aria-activedescendant", `hit-${search.active}`);
    rows[search.active].scrollIntoView({ block: "nearest" });
  } else byId("search").removeAttribute("aria-activedescendant");
}

function close() {
  search.turn++;
  Object.assign(search, { hits: [], words: "" });
  drawFound();
}

function take(place) {
  const { raw, ...hit } = search.hits[place];
  byId("search").value = "";
  close();
  add(hit);
}

async function onKey(event) {
  if (event.key === "Escape") close();
  const known = () => byId("search").value.trim() === search.words;
  if (event.key === "Enter" && !known()) await find(); // someone typed faster than the answers came
  const count = search.hits.length;
  if (!count || (event.key === "Enter" && !known())) return;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    search.active = (search.active + (event.key === "ArrowDown" ? 1 : count - 1)) % count;
    drawFound();
  }
  if (event.key === "Enter") {
    event.preventDefault();
    take(search.active);
  }
}

// --------------------------------------------------------------------------------------------------------- writing

function drawTasks() {
  byId("writing").hidden = page.about.tasks.length === 0;
  byId("message-form").hidden = !page.about.tasks.includes("conversation");
  byId("tasks").replaceChildren(...page.about.tasks.map((task) => button(say("task")[task], () => write(task))));
}

async function write(task) {
  const row = chosenRow().row;
  const body = { ...visit(), task, item_id: row?.item_id, message: byId("message").value };
  byId("written").textContent = "…";
  try {
    const answer = await ask("write", body);
    byId("written").textContent = [answer.text, answer.items.join(" · ")].filter(Boolean).join(" — ");
  } catch (error) {
    byId("written").textContent = error.message;
  }
}

// ------------------------------------------------------------------------------------------------------- beginning

async function begin() {
  page.about = await ask("about");
  state.weight = 0.5;
  state.readings = page.about.weights.map((weight) => (weight === 0 ? "evidence" : weight === 1 ? "learnt" : "both"));
  byId("readings").dataset.most = page.about.limits.ranked;
  for (const id of ["search", "product-text", "message"]) byId(id).maxLength = page.about.limits.text;
  translate();
  await update();
}

byId("language").addEventListener("click", () => {
  state.language = state.language === "en" ? "zh" : "en";
  translate();
  update();
});
byId("search").addEventListener("input", () => find().catch(fail));
byId("search").addEventListener("keydown", (event) => onKey(event).catch(fail));
byId("search").addEventListener("blur", close);
byId("clear").addEventListener("click", () => {
  state.history = [];
  update();
});
byId("history").addEventListener("keydown", (event) => {
  if (event.key === "Delete" && event.target.dataset.focus) remove(event.target.dataset.focus);
});
byId("product").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("product-text").value.trim();
  if (!text) return;
  byId("product-text").value = "";
  invent(text);
});
byId("message-form").addEventListener("submit", (event) => {
  event.preventDefault();
  write("conversation");
});
byId("weight").addEventListener("input", () => {
  state.weight = Number(byId("weight").value);
  update();
});
begin().catch(fail);
