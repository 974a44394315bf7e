// Answers requests with a model, a processor and a catalogue with its evidence; equal to the pipeline "recommendation".

import { makeTokenizer } from "./tokenizer.js";
import { Evidence } from "./evidence.js";
import { Model } from "./model.js";
import { Processor } from "./processor.js";
import { isMapping, normalizeId } from "./values.js";
import { isMissing } from "./wording.js";

const TARGETS_A_ROW = 128;

export class Catalogue {
  // `items` are texts or fields with an id in `ids`; `vectors` holds N x D numbers, with a factor for each row if these are
  // 8-bit numbers.
  constructor(ids, items, vectors, width, scales, names) {
    Object.assign(this, { ids: [...ids], items: [...items], vectors, width, scales, names });
    this.rows = new Map(this.ids.map((id, row) => [id, row]));
    this.added = [];
    this.byName = null;
  }

  get(id) {
    return this.items[this.rows.get(id)];
  }

  add(id, item, vector) {
    if (this.rows.has(id)) throw new Error(`item_id ${id} is in the catalogue`);
    this.rows.set(id, this.ids.length);
    this.ids.push(id);
    this.items.push(item);
    this.added.push(vector);
    this.byName?.set(this.names.name(item), [...(this.byName.get(this.names.name(item)) ?? []), id]);
  }

  // The ids of items with one of these names.
  named(names) {
    if (this.byName === null) {
      this.byName = new Map();
      this.items.forEach((item, row) => {
        const name = this.names.name(item);
        if (!this.byName.has(name)) this.byName.set(name, []);
        this.byName.get(name).push(this.ids[row]);
      });
    }
    return names.flatMap((name) => this.byName.get(name) ?? []);
  }

  score(user, row) {
    const first = this.ids.length - this.added.length;
    const [vectors, start] = row < first ? [this.vectors, row * this.width] : [this.added[row - first], 0];
    let sum = 0;
    for (let index = 0; index < this.width; index++) sum += user[index] * vectors[start + index];
    return Math.fround(row < first && this.scales ? sum * this.scales[row] : sum);
  }

  // The best rows that are not in `seen`, as [row, score], the best first; equal scores keep their order.
  search(scoreOf, count, seen) {
    const found = [];
    for (let row = 0; row < this.ids.length; row++) {
      if (!seen.has(this.ids[row])) found.push([row, scoreOf(row)]);
    }
    return found.sort((one, other) => other[1] - one[1]).slice(0, count);
  }
}

export class Recommender {
  // `makeModel` resolves to the model; null if the catalogue ranks by evidence alone. `unknownUser` is the vector of a user
  // without a history. `evidence` may be null.
  constructor(makeModel, processor, catalogue, { evidence = null, unknownUser = null, excludeSeen = true } = {}) {
    Object.assign(this, { makeModel, processor, catalogue, evidence, unknownUser, excludeSeen });
    this.model = null;
    this.loading = null;
  }

  // Load what `m6rec export --to web` wrote. `read(name)` resolves to an ArrayBuffer of a file of the folder model/,
  // `runtime()` to onnxruntime-web. The model is loaded when it is needed, or by `ready`.
  static async load(read, runtime, options = {}) {
    const text = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
    const [manifest, { ids, items }, tokens] = await Promise.all(["manifest.json", "items.json", "tokenizer.json"].map(text));
    const processor = new Processor(makeTokenizer(tokens), manifest.processor, manifest.ids, manifest.kinds);
    const { width, weights, exclude_seen: excludeSeen } = manifest.catalogue;
    const [small, numbers] = [weights === "int8", manifest.model ? await read("vectors.bin") : new ArrayBuffer(0)];
    const vectors = small && manifest.model ? new Int8Array(numbers, ids.length * 4) : new Float32Array(numbers);
    const scales = small && manifest.model ? new Float32Array(numbers, 0, ids.length) : null;
    const catalogue = new Catalogue(ids, items, vectors, width, scales, processor.names);
    let evidence = null;
    if (manifest.evidence) {
      const [content, words] = await Promise.all([read("evidence.bin"), text("words.json")]);
      evidence = new Evidence(manifest.evidence, content, words);
    }
    const makeModel = async () => {
      const [ort, ...files] = await Promise.all([runtime(), read("reader.onnx"), read("joint.onnx")]);
      const session = (file) => ort.InferenceSession.create(new Uint8Array(file), options);
      return new Model(ort, { reader: await session(files[0]), joint: await session(files[1]) }, manifest.model);
    };
    const unknownUser = manifest.model ? Float32Array.from(manifest.model.unknown_user) : null;
    return new Recommender(manifest.model && makeModel, processor, catalogue, { evidence, unknownUser, excludeSeen });
  }

  // The model, which is loaded once; an error if the catalogue ranks by evidence alone.
  ready() {
    if (this.makeModel === null) throw new Error("this page has no model: its catalogue ranks by what was counted");
    this.loading ??= this.makeModel().then((model) => (this.model = model));
    return this.loading;
  }

  // Weight of the model's cosine in a score.
  get share() {
    return this.evidence === null ? 1 : this.evidence.rule.learnt;
  }

  // Complete items that are given by id only.
  described(request) {
    const found = { ...request };
    if (Array.isArray(found.candidates)) found.candidates = found.candidates.map((item) => this.whole(item));
    if (Array.isArray(found.history)) {
      found.history = found.history.map((event) =>
        isMapping(event) && "item" in event ? { ...event, item: this.whole(event.item) } : this.whole(event),
      );
    }
    return found;
  }

  whole(item) {
    if (!isMapping(item) || isMissing(item.item_id)) return item;
    if (Object.keys(item).some((name) => !["item_id", "stats"].includes(name))) return item;
    const known = this.catalogue.get(normalizeId(item.item_id, "item_id"));
    if (known === undefined) throw new Error(`item_id ${item.item_id} alone says nothing, and is not in the catalogue`);
    return typeof known === "string" ? known : { ...known, ...item };
  }

  // The ids of the catalogue's items in a history, by id, else by text.
  seen(history) {
    const ids = new Set();
    for (const event of history) {
      const item = isMapping(event) ? event.item : event;
      if (isMissing(item)) continue;
      if (isMapping(item) && !isMissing(item.item_id)) {
        ids.add(normalizeId(item.item_id, "item_id"));
        continue;
      }
      const alike = this.catalogue.named(this.processor.names.candidates(item));
      for (const id of alike) if (this.processor.names.same(item, this.catalogue.get(id))) ids.add(id);
    }
    return ids;
  }

  // The best items of the catalogue for a request: rank, item (its text), item_id, score; with `explain` also because.
  async recommend(request, { topK = 10, excludeSeen = this.excludeSeen, explain = false } = {}) {
    const asked = typeof request === "string" ? { user: request } : request;
    const { candidates: _, ...source } = this.described(asked);
    const row = this.processor.read(source, "retrieval");
    const history = asked.history ?? []; // as given: items of a catalogue of texts have their ids only here
    const user = await this.userOf(row);
    const weighed = this.evidence === null ? [] : this.weighed(asked, source, row);
    const terms = this.evidence?.terms(weighed.filter(({ weight }) => weight).map(({ entry, weight }) => [entry, weight]));
    const seen = excludeSeen ? this.seen(history) : new Set();
    const best = this.catalogue.search((place) => this.scoreOf(user, terms, place), topK, seen);
    const answer = best.map(([place, score], index) => this.answered(place, score, index + 1));
    if (explain && answer.length) await this.explain({ row, history, user, weighed }, best, answer);
    return answer;
  }

  async userOf(row) {
    if (!this.share) return null;
    if (row.input_ids.length === 2) return this.unknownUser; // the markers of a source without anything in it
    return (await (await this.ready()).join([row])).users[0];
  }

  scoreOf(user, terms, place) {
    const cosine = user === null ? 0 : this.catalogue.score(user, place);
    return terms === undefined ? cosine : this.share * cosine + this.evidence.of(terms, place);
  }

  // What evidence reads of a request: {entry, place, weight}, the last event last.
  weighed(request, source, row) {
    const texts = (source.history ?? []).map((event) => {
      const item = isMapping(event) ? event.item : event;
      return isMissing(item) ? null : this.processor.wording.item(item, "item").text;
    });
    const known = (given) => {
      const id = normalizeId(given, "item_id");
      return { id, row: this.catalogue.rows.get(id) ?? -1 };
    };
    const found = this.evidence.entries(request, texts, row.events.length, known);
    const weights = this.evidence.weighed(found.map(({ entry }) => entry)).map(([, weight]) => weight);
    return found.map((each, index) => ({ ...each, weight: weights[index] }));
  }

  answered(place, score, rank) {
    const item = this.catalogue.items[place];
    return { rank, item: this.processor.wording.item(item, "item").text, item_id: this.catalogue.ids[place], score };
  }

  // Each event's contribution: what the score loses with the event hidden, and the event's own terms of evidence.
  async explain({ row, history, user, weighed }, best, answer) {
    const start = history.length - row.events.length;
    const events = row.events.map(([from, to], number) => {
      const own = row.segments.filter((each) => each.start >= from && each.end <= to);
      const text = own.filter(({ kind }) => ["event", "item", "text"].includes(kind)).map((each) => each.text).join(" ");
      return { place: start + number, ...described(text, history[start + number]) };
    });
    const earlier = weighed.filter(({ place }) => place >= 0 && place < start);
    const all = [...earlier.map(({ entry, place }) => ({ place, ...described(entry.text, history[place]) })), ...events];
    const joins = this.share && events.length;
    const hidden = joins ? (await (await this.ready()).join(row.events.map(() => row), row.events)).users : [];
    const terms = new Map();
    for (const { entry, weight, place } of weighed) if (weight) terms.set(place, this.evidence.terms([[entry, weight]]));
    best.forEach(([place], index) => {
      const because = all.map(({ place: at, ...event }) => {
        const without = hidden[at - start];
        const learnt = without ? this.share * (this.catalogue.score(user, place) - this.catalogue.score(without, place)) : 0;
        if (this.evidence === null) return { ...event, contribution: learnt };
        const own = terms.get(at);
        const [words, transitions] = own ? [this.evidence.likeness(own.words, place), own.after[place]] : [0, 0];
        return { ...event, contribution: learnt + words + transitions, learnt, words, transitions };
      });
      answer[index].because = because.sort((one, other) => other.contribution - one.contribution);
    });
  }

  // Scores of a request's candidates by a scoring task, in their order: numbers, or lists of numbers for interactions.
  async score(request, task) {
    const whole = this.described(request);
    const parts = [];
    for (let start = 0; start < whole.candidates.length; start += TARGETS_A_ROW) {
      const candidates = whole.candidates.slice(start, start + TARGETS_A_ROW);
      const row = this.processor.read({ ...whole, candidates }, task);
      parts.push(...(await (await this.ready()).join([row])).scores[task][0]);
    }
    return parts.map((values) => (values.length === 1 ? values[0] : values));
  }

  // Add a product that is given by its text or its fields; it can be found at once.
  async add(id, item) {
    const { text } = this.processor.wording.item(item, "item");
    const [vector] = this.share ? await (await this.ready()).itemVectors([this.processor.encodeItem(item)]) : [null];
    this.catalogue.add(id, item, vector);
    this.evidence?.add(id, text);
  }
}

function described(text, entry) {
  const item = isMapping(entry) ? entry.item : null;
  return isMapping(item) && !isMissing(item.item_id) ? { event: text, item_id: item.item_id } : { event: text };
}
