// The page: a history, search, the list of recommendations with reasons, and new products, without a server.

import { Recommender } from "./m6rec/recommender.js";

const FOUND = 8;
const LISTED = 10;
const CANDIDATES = 100;
const ROUNDS = 30;

const TEXTS = {
  en: {
    about: "Recommends from the text of what you did. Everything runs in this tab; nothing is sent.",
    other: "中文",
    find: "Find an item",
    search: "Search the catalogue",
    new: "A new product",
    newLabel: "Text of a new product",
    addNew: "Add",
    history: "Your history",
    empty: "Nothing yet: add items that you liked. Until then the list is for an unknown user.",
    clear: "Clear",
    list: "Recommended",
    add: "Add",
    measure: "Time 100 candidates",
    remove: "Remove",
    why: "Why?",
    loading: "Loading …",
    loadingModel: "The model is being loaded; your first list of your own follows.",
    unread: "Similarity of texts by the static reader is left out here; words and transitions count.",
    nothing: "No item has these words.",
    added: (name, ms, rank, total) => `“${name}” was read in ${ms} ms; it now ranks ${rank} of ${total} for you.`,
    latency: (all, texts, candidates) =>
      `This list took ${all} ms (${texts} new texts read).` + (candidates === null ? "" : ` ${CANDIDATES} candidates: ${candidates} ms.`),
  },
  zh: {
    about: "根据你的行为文本进行推荐。全部计算在本页完成，不发送任何数据。",
    other: "English",
    find: "查找物品",
    search: "搜索目录",
    new: "新商品",
    newLabel: "新商品的文字",
    addNew: "添加",
    history: "你的历史",
    empty: "还没有：请添加你喜欢的物品。在此之前，列表面向未知用户。",
    clear: "清空",
    list: "推荐",
    add: "添加",
    measure: "测量 100 个候选的用时",
    remove: "移除",
    why: "原因",
    loading: "正在加载……",
    loadingModel: "正在加载模型，随后给出你的推荐。",
    unread: "本页不计算静态阅读器的文本相似度；词语和转移仍计入。",
    nothing: "没有物品包含这些词。",
    added: (name, ms, rank, total) => `“${name}”用 ${ms} 毫秒读完；现在它在你的 ${total} 个物品中排第 ${rank}。`,
    latency: (all, texts, candidates) =>
      `本列表用时 ${all} 毫秒（新读 ${texts} 段文字）。` + (candidates === null ? "" : `${CANDIDATES} 个候选：${candidates} 毫秒。`),
  },
};

const byId = (id) => document.getElementById(id);
const page = { language: navigator.language.startsWith("zh") ? "zh" : "en", history: [], recommender: null, texts: [] };
let turn = Promise.resolve();

function say(name, ...values) {
  const text = TEXTS[page.language][name];
  return values.length ? text(...values) : text;
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  Object.assign(made, attributes);
  return made;
}

function button(name, action) {
  const made = element("button", say(name), { type: "button" });
  made.addEventListener("click", action);
  return made;
}

function row(text, ...others) {
  const made = element("li", "");
  made.append(element("span", text), ...others);
  return made;
}

function translate() {
  document.documentElement.lang = page.language;
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  byId("language").textContent = say("other");
  byId("search").placeholder = say("search");
  byId("new-text").placeholder = say("newLabel");
}

function textOf(id) {
  return page.recommender.processor.wording.item(page.recommender.catalogue.get(id), "item").text;
}

function request() {
  return { history: page.history.map((id) => ({ item: page.recommender.catalogue.get(id) })) };
}

function showFound() {
  const words = byId("search").value.trim().toLowerCase().split(/\s+/u).filter(Boolean);
  const ids = page.recommender.catalogue.ids;
  const hits = [];
  for (let index = 0; words.length && index < ids.length && hits.length < FOUND; index++) {
    page.texts[index] ??= textOf(ids[index]).toLowerCase();
    if (words.every((word) => page.texts[index].includes(word))) hits.push(ids[index]);
  }
  const rows = hits.map((id) => row(textOf(id), button("add", () => change([...page.history, id]))));
  byId("found").replaceChildren(...(rows.length || !words.length ? rows : [row(say("nothing"))]));
}

function showHistory() {
  const rows = page.history.map((id, place) =>
    row(textOf(id), button("remove", () => change(page.history.filter((_, index) => index !== place)))),
  );
  byId("history").replaceChildren(...rows);
  byId("history-empty").hidden = rows.length > 0;
  byId("clear").hidden = rows.length === 0;
}

async function because(item) {
  const answer = await page.recommender.recommend(request(), { topK: LISTED, explain: true });
  const reasons = answer.find((each) => each.item_id === item.item_id)?.because ?? [];
  const list = element("ul", "", { className: "because" });
  for (const { event, contribution } of reasons) {
    const sign = contribution < 0 ? "down" : "up";
    list.append(row(event, element("span", `${contribution < 0 ? "−" : "+"}${Math.abs(contribution).toFixed(3)}`, { className: sign })));
  }
  return list;
}

function showList(answer) {
  const rows = answer.map((item) => {
    const score = element("span", item.score.toFixed(3), { className: "score" });
    const why = button("why", () => {
      why.disabled = true;
      queue(async () => made.append(await because(item)));
    });
    const made = row(`${item.rank}. ${item.item}`, score, why, button("add", () => change([...page.history, item.item_id])));
    return made;
  });
  byId("list").replaceChildren(...rows);
}

// The times of scoring the first items of the catalogue for the history, whose texts have been read before: the second
// request's, and the median of further ones. Browsers translate WebAssembly quickly first, and well once it is used often.
async function candidatesTimes() {
  const { recommender } = page;
  const task = (await recommender.ready()).config.tasks[0];
  const candidates = recommender.catalogue.items.slice(0, CANDIDATES);
  if (candidates.length < CANDIDATES) return null;
  const times = [];
  for (let round = 0; round < ROUNDS; round++) {
    const start = performance.now();
    await recommender.score({ ...request(), candidates }, task);
    times.push(performance.now() - start);
  }
  const sorted = times.slice(ROUNDS >> 1).sort((one, other) => one - other);
  return { rounds: ROUNDS, second: times[1], median: sorted[sorted.length >> 1] };
}

async function showRecommendations() {
  const before = page.recommender.model?.textsRead ?? 0;
  const start = performance.now();
  const answer = await page.recommender.recommend(request(), { topK: LISTED });
  const all = performance.now() - start;
  showList(answer);
  const read = (page.recommender.model?.textsRead ?? 0) - before;
  byId("latency").textContent = say("latency", all.toFixed(0), read, null);
  document.body.dataset.lists = Number(document.body.dataset.lists ?? 0) + 1;
  Object.assign(page, { listTime: all, listTexts: read });
}

// Run one action after the other: the runtime computes one thing at a time.
function queue(action) {
  turn = turn.then(action).catch((error) => {
    byId("status").textContent = error.message;
    byId("status").className = "error";
  });
  return turn;
}

function change(history) {
  page.history = history;
  showHistory();
  return queue(showRecommendations);
}

async function addNew(text) {
  const { recommender } = page;
  const id = `new ${recommender.catalogue.added.length + 1}`;
  const start = performance.now();
  await recommender.add(id, text);
  const time = performance.now() - start;
  const total = recommender.catalogue.ids.length;
  const answer = await recommender.recommend(request(), { topK: total });
  const rank = answer.find((each) => each.item_id === id)?.rank ?? total;
  byId("new-note").textContent = say("added", text, time.toFixed(0), rank, total);
  page.newTime = time;
  showList(answer.slice(0, LISTED));
}

async function load(name) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

// onnxruntime-web, on one thread.
async function runtime() {
  const ort = await import("./vendor/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
  ort.env.wasm.numThreads = 1;
  return ort;
}

// The first list needs no model, since the vector of an unknown user comes with the page; the model is loaded after it.
async function begin() {
  translate();
  byId("status").textContent = say("loading");
  page.recommender = await Recommender.load(load, runtime, { executionProviders: ["wasm"] });
  const { share, evidence } = page.recommender;
  byId("unread").hidden = !evidence?.rule.texts;
  byId("measure").hidden = !share;
  for (const each of document.querySelectorAll("input, form button, #measure")) each.disabled = false;
  showHistory();
  await showRecommendations();
  document.body.dataset.firstList = performance.now();
  byId("status").textContent = share ? say("loadingModel") : "";
  queue(async () => {
    await new Promise(requestAnimationFrame); // the list is on the screen
    if (share) await page.recommender.ready();
    byId("status").textContent = "";
    document.body.dataset.ready = performance.now();
  });
}

byId("language").addEventListener("click", () => {
  page.language = page.language === "en" ? "zh" : "en";
  translate();
  if (page.recommender) {
    showFound();
    change(page.history);
  }
});
byId("search").addEventListener("input", showFound);
byId("clear").addEventListener("click", () => change([]));
byId("new").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("new-text").value.trim();
  if (text) queue(() => addNew(text));
});
byId("measure").addEventListener("click", () =>
  queue(async () => {
    const times = await candidatesTimes();
    byId("latency").textContent = say("latency", page.listTime.toFixed(0), page.listTexts, times?.median.toFixed(0) ?? null);
    page.candidatesTimes = times;
  }),
);
window.m6rec = page;
queue(begin);
