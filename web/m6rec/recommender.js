// Answers requests with a model, a processor and a catalogue; equal to the pipeline "recommendation" without evidence.

import { makeTokenizer } from "./tokenizer.js";
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
  search(user, count, seen) {
    const found = [];
    for (let row = 0; row < this.ids.length; row++) {
      if (!seen.has(this.ids[row])) found.push([row, this.score(user, row)]);
    }
    return found.sort((one, other) => other[1] - one[1]).slice(0, count);
  }
}

export class Recommender {
  constructor(model, processor, catalogue, excludeSeen = true) {
    Object.assign(this, { model, processor, catalogue, excludeSeen });
  }

  // Load what `m6rec export --to web` wrote. `read(name)` resolves to an ArrayBuffer of a file of the folder model/.
  static async load(ort, read, options = {}) {
    const text = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
    const manifest = await text("manifest.json");
    const files = ["reader.onnx", "joint.onnx", "vectors.bin"];
    const [reader, joint, numbers] = await Promise.all(files.map(read));
    const { ids, items } = await text("items.json");
    const session = (file) => ort.InferenceSession.create(new Uint8Array(file), options);
    const sessions = { reader: await session(reader), joint: await session(joint) };
    const tokenizer = makeTokenizer(await text("tokenizer.json"));
    const processor = new Processor(tokenizer, manifest.processor, manifest.ids, manifest.kinds);
    const { width, weights, exclude_seen: excludeSeen } = manifest.catalogue;
    const small = weights === "int8";
    const vectors = small ? new Int8Array(numbers, ids.length * 4) : new Float32Array(numbers);
    const scales = small ? new Float32Array(numbers, 0, ids.length) : null;
    const catalogue = new Catalogue(ids, items, vectors, width, scales, processor.names);
    return new Recommender(new Model(ort, sessions, manifest.model), processor, catalogue, excludeSeen);
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
    const { candidates: _, ...source } = this.described(typeof request === "string" ? { user: request } : request);
    const row = this.processor.read(source, "retrieval");
    const { users } = await this.model.join([row]);
    const history = request.history ?? []; // as given: items of a catalogue of texts have their ids only here
    const seen = excludeSeen ? this.seen(history) : new Set();
    const best = this.catalogue.search(users[0], topK, seen);
    const answer = best.map(([place, score], index) => this.answered(place, score, index + 1));
    if (explain && answer.length) await this.explain(row, best, answer, history);
    return answer;
  }

  answered(place, score, rank) {
    const item = this.catalogue.items[place];
    return { rank, item: this.processor.wording.item(item, "item").text, item_id: this.catalogue.ids[place], score };
  }

  // Each event's contribution: the score minus the score with the event hidden.
  async explain(row, best, answer, history) {
    if (!row.events.length) return answer.forEach((each) => (each.because = []));
    const { users } = await this.model.join(row.events.map(() => row), row.events);
    const texts = row.events.map(([start, end]) => {
      const own = row.segments.filter((each) => each.start >= start && each.end <= end);
      return own.filter(({ kind }) => ["event", "item", "text"].includes(kind)).map(({ text }) => text).join(" ");
    });
    const described = texts.map((event, number) => {
      const entry = history[history.length - texts.length + number];
      const item = isMapping(entry) ? entry.item : null;
      return isMapping(item) && !isMissing(item.item_id) ? { event, item_id: item.item_id } : { event };
    });
    best.forEach(([place, score], index) => {
      const events = described.map((event, number) => ({
        ...event,
        contribution: score - this.catalogue.score(users[number], place),
      }));
      answer[index].because = events.sort((one, other) => other.contribution - one.contribution);
    });
  }

  // Scores of a request's candidates by a scoring task, in their order: numbers, or lists of numbers for interactions.
  async score(request, task) {
    const whole = this.described(request);
    const parts = [];
    for (let start = 0; start < whole.candidates.length; start += TARGETS_A_ROW) {
      const candidates = whole.candidates.slice(start, start + TARGETS_A_ROW);
      const row = this.processor.read({ ...whole, candidates }, task);
      parts.push(...(await this.model.join([row])).scores[task][0]);
    }
    return parts.map((values) => (values.length === 1 ? values[0] : values));
  }

  // Add a product that is given by its text or its fields; it can be found at once.
  async add(id, item) {
    const [vector] = await this.model.itemVectors([this.processor.encodeItem(item)]);
    this.catalogue.add(id, item, vector);
  }
}
