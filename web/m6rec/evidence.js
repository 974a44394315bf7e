// What a catalogue has counted: words and transitions between items, added to the scores of the model; equal to `Counted`
// of catalogue_m6rec.py without the static reader. Numbers are added in the order in which Python adds them.

import { isMapping, moment } from "./values.js";
import { isMissing } from "./wording.js";

const UNSPACED = "\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff";
const WORD = new RegExp(`[${UNSPACED}]|(?:(?![${UNSPACED}])[\\p{L}\\p{N}_])+`, "gu");
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array };

// The different words of a text, in their order.
export function wordsOf(text) {
  return [...new Set(text.toLowerCase().match(WORD) ?? [])];
}

// The text of who a user is and of facts, as evidence reads it; of the user's fields, only texts.
export function profileOf({ user, facts }) {
  const values = isMapping(user) ? Object.entries(user).filter(([name]) => name !== "user_id") : [["", user]];
  const parts = [...values.map(([, value]) => value), facts].flatMap((own) => (Array.isArray(own) ? own : [own]));
  return parts.filter((part) => typeof part === "string").join(" ");
}

// An array of the file, or its places in a table of the different numbers.
function unpack(places, content, name) {
  const read = ({ type, start, length }) => new TYPES[type](content, start, length);
  if (places[name]) return read(places[name]);
  const table = read(places[`${name}.table`]);
  return Float64Array.from(read(places[`${name}.places`]), (place) => table[place]);
}

function joined(kind, one, other) {
  const whole = new kind(one.length + other.length);
  whole.set(one);
  whole.set(other, one.length);
  return whole;
}

export class Evidence {
  // `manifest` is that of the page, `content` the file of arrays, `vocabulary` the words in the order of their numbers.
  constructor(manifest, content, vocabulary) {
    const names = ["numbers", "pair_starts", "pair_items", "pair_totals", "out", "into", "popular", "word_weights"];
    for (const name of [...names, "word_starts", "word_columns", "rarity"]) {
      this[name] = unpack(manifest.arrays, content, name);
    }
    this.rule = manifest.rule;
    for (const name of this.rule.linear ? ["linear_starts", "linear_items", "linear_values"] : []) {
      this[name] = unpack(manifest.arrays, content, name);
    }
    this.items = manifest.items;
    this.outside = new Map(Object.entries(manifest.outside));
    this.vocabulary = new Map(vocabulary.map((word, number) => [word, number]));
    this.norms = this.lengths();
  }

  get count() {
    return this.word_starts.length - 1;
  }

  lengths() {
    return Float64Array.from({ length: this.count }, (_, row) => {
      let sum = 0;
      for (let place = this.word_starts[row]; place < this.word_starts[row + 1]; place++) {
        const rarity = this.rarity[this.word_columns[place]];
        sum += rarity * rarity;
      }
      return Math.max(Math.sqrt(sum), 1e-12);
    });
  }

  // Add a row with an id and a text; as in Python, words become rarer or more common for all rows.
  add(id, text) {
    const columns = wordsOf(text).map((word) => {
      if (!this.vocabulary.has(word)) this.vocabulary.set(word, this.vocabulary.size);
      return this.vocabulary.get(word);
    });
    this.word_columns = joined(Uint32Array, this.word_columns, columns);
    this.word_starts = joined(Uint32Array, this.word_starts, [this.word_columns.length]);
    this.numbers = joined(Uint32Array, this.numbers, [this.outside.has(id) ? this.outside.get(id) + 1 : 0]);
    this.popular = joined(Float64Array, this.popular, [0]);
    this.word_weights = joined(Float64Array, this.word_weights, [this.rule.words * (1 + this.rule.unseen)]);
    const met = new Uint32Array(this.vocabulary.size + 1);
    for (const column of this.word_columns) met[column] += 1;
    this.rarity = Float64Array.from(met, (rows) => Math.log((1 + this.count) / (1 + rows)) + 1);
    this.norms = this.lengths();
  }

  // The entries of a history with their weights; the last one comes last. An entry is {kind, id, row, text}: kind "item",
  // "query" or "profile", row -1 = not in the catalogue.
  weighed(entries) {
    const { recency, queries, profile } = this.rule;
    const shares = ages(entries.filter((entry) => entry.kind === "item").map((entry) => entry.time), this.rule);
    let [items, texts] = [0, 0];
    const found = [...entries].reverse().map((entry) => {
      if (entry.kind === "profile") return [entry, profile];
      if (entry.kind === "query") return [entry, queries * (recency[items + texts++] ?? 0)];
      return [entry, shares[items++] ?? 0];
    });
    return found.reverse();
  }

  numberOf({ id, row }) {
    if (row >= 0) return this.numbers[row] - 1;
    return id !== null && this.outside.has(id) ? this.outside.get(id) : -1;
  }

  // The terms that weighed entries add to the scores of rows: transitions of each row, and a function of words.
  terms(weighed) {
    return { after: this.after(weighed), words: this.words(weighed) };
  }

  // The terms of transitions, of the user's own items and of the linear model: one number for each row.
  after(weighed) {
    const known = new Float64Array(this.items);
    const own = new Float64Array(this.count);
    for (const [entry, weight] of weighed) {
      const number = this.numberOf(entry);
      if (number >= 0) known[number] += weight;
      if (entry.row >= 0) own[entry.row] += weight;
    }
    const { transitions, second, again } = this.rule;
    const found = new Float64Array(this.items);
    if (transitions) {
      const first = this.follow(known);
      const next = second ? this.follow(first) : null;
      for (let item = 0; item < this.items; item++) {
        found[item] = transitions * (next ? first[item] + second * next[item] : first[item]);
      }
    }
    const linear = this.rule.linear ? this.linear(known) : null;
    return Float64Array.from(own, (value, row) => {
      const number = this.numbers[row] - 1;
      const passed = number >= 0 ? found[number] : 0;
      const repeated = again && value ? passed + again * value : passed;
      return linear && number >= 0 ? repeated + this.rule.linear * linear[number] : repeated;
    });
  }

  // Weights of items, multiplied with the table of the linear model.
  linear(weights) {
    const found = new Float64Array(this.items);
    for (let item = 0; item < this.items; item++) {
      if (!weights[item]) continue;
      for (let place = this.linear_starts[item]; place < this.linear_starts[item + 1]; place++) {
        found[this.linear_items[place]] += weights[item] * this.linear_values[place];
      }
    }
    return found;
  }

  // Weights of items, moved on by one step of transitions.
  follow(weights) {
    const found = new Float64Array(this.items);
    for (let item = 0; item < this.items; item++) {
      if (!weights[item]) continue;
      const weight = weights[item] / this.out[item];
      for (let place = this.pair_starts[item]; place < this.pair_starts[item + 1]; place++) {
        found[this.pair_items[place]] += weight * this.pair_totals[place];
      }
    }
    return found.map((value, item) => value / this.into[item]);
  }

  // The user's vector of words: one number for each word; null if it has none.
  words(weighed) {
    if (!this.rule.words) return null;
    const rows = new Map();
    const said = [];
    for (const [entry, weight] of weighed) {
      if (entry.row >= 0) rows.set(entry.row, (rows.get(entry.row) ?? 0) + weight);
      else if (entry.text) said.push([entry.text, weight]);
    }
    if (!rows.size && !said.length) return null;
    const found = new Float64Array(this.rarity.length);
    for (const [row, weight] of [...rows].sort(([one], [other]) => one - other)) {
      const share = weight / this.norms[row];
      for (let place = this.word_starts[row]; place < this.word_starts[row + 1]; place++) {
        const word = this.word_columns[place];
        found[word] += share * this.rarity[word];
      }
    }
    for (const [text, weight] of said) this.addText(found, text, weight);
    return found;
  }

  addText(found, text, weight) {
    const unknown = this.rarity.length - 1;
    const numbers = wordsOf(text).map((word) => Math.min(this.vocabulary.get(word) ?? unknown, unknown));
    const size = Math.sqrt(numbers.reduce((sum, word) => sum + this.rarity[word] ** 2, 0));
    for (const word of numbers) {
      if (word < unknown) found[word] += (weight * this.rarity[word]) / Math.max(size, 1e-12);
    }
  }

  // What the words of a user's vector add to the score of a row.
  likeness(words, row) {
    if (words === null) return 0;
    let sum = 0;
    for (let place = this.word_starts[row]; place < this.word_starts[row + 1]; place++) {
      const word = this.word_columns[place];
      sum += words[word] * this.rarity[word];
    }
    return this.word_weights[row] * (sum / this.norms[row]);
  }

  // The sum of all terms of a row.
  of({ after, words }, row) {
    return after[row] + this.likeness(words, row) + this.popular[row];
  }

  // What evidence reads of a request: the profile, then the history. `texts` are those of the history's items, null for an
  // event without an item; `events` is the number of events that the model reads. Where evidence reaches further back
  // than the model, earlier items and queries are read too. `known(id)` gives an id as a text, and its row. Returns
  // {entry, place}, place in the history, -1 = profile.
  entries(request, texts, events, known) {
    const history = request.history ?? [];
    const places = [...history.keys()].filter((place) => texts[place] !== null);
    const times = places.map((place) => (this.rule.share_ties ? timeOf(history[place], place) : NaN));
    const back = numRecent([...times].reverse(), this.rule);
    const isShort = places.length < this.rule.recency.length;
    const first = isShort ? 0 : Math.min(history.length - events, places[places.length - back]);
    const found = [];
    let next = places.findIndex((place) => place >= first);
    for (let place = first; place < history.length; place++) {
      const isQuery = texts[place] === null;
      const entry = isQuery ? queryOf(history[place]) : itemOf(history[place], texts[place], known, times[next++]);
      if (entry !== null) found.push({ entry, place });
    }
    const profile = profileOf(request);
    return profile ? [{ entry: { kind: "profile", id: null, row: -1, text: profile }, place: -1 }, ...found] : found;
  }
}

// The number of last events that have a weight, from their times, the last one first; NaN = unknown.
function numRecent(latest, { recency, share_ties }) {
  let length = Math.min(recency.length, latest.length);
  const oldest = latest[length - 1];
  while (share_ties && length > 0 && latest[length] === oldest) length += 1;
  return length;
}

// The weights of a history's last events, the last one first, from the times of all, in order; with `share_ties`,
// consecutive events of one time have the mean of their weights.
function ages(times, rule) {
  const latest = [...times].reverse();
  const length = numRecent(latest, rule);
  const weights = Array.from({ length }, (_, age) => rule.recency[age] ?? 0);
  if (!rule.share_ties) return weights;
  for (let start = 0, end; start < length; start = end) {
    let sum = weights[start];
    for (end = start + 1; end < length && latest[end] === latest[start]; end++) sum += weights[end];
    weights.fill(sum / (end - start), start, end);
  }
  return weights;
}

function timeOf(event, place) {
  return !isMapping(event) || isMissing(event.timestamp) ? NaN : moment(event.timestamp, `history[${place}].timestamp`);
}

function itemOf(event, text, known, time) {
  const item = isMapping(event) ? event.item : event;
  if (!isMapping(item) || isMissing(item.item_id)) return { kind: "item", id: null, row: -1, text, time };
  return { kind: "item", ...known(item.item_id), text, time };
}

function queryOf(event) {
  const text = isMissing(event.query) ? event.text : event.query;
  return isMissing(text) ? null : { kind: "query", id: null, row: -1, text: String(text) };
}
