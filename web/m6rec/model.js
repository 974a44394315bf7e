// Runs the two stages of an exported model: the reader reads each text once and keeps its states, the joint stage joins
// the kept states of a row and gives user vectors and scores. `ort` is onnxruntime-web, or onnxruntime-node.

const KEPT_SEGMENTS = 20000;
const READ_AT_ONCE = 64;

function longs(ort, values, dims) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
}

function padded(rows, width, fill) {
  return rows.flatMap((row) => [...row, ...new Array(width - row.length).fill(fill)]);
}

export class Model {
  // `sessions` are those of "reader" and "joint"; `config` is the manifest's.
  constructor(ort, sessions, config) {
    Object.assign(this, { ort, sessions, config });
    this.states = new Map();
    this.textsRead = 0;
  }

  // The places of a segment's tokens that the joint layers read; markers are always read.
  keptOf({ start, end, kind }) {
    const { segment_summary: summary, skipped_kinds: skipped } = this.config;
    if (kind !== null && skipped?.includes(kind)) return [];
    const first = kind === null || summary === null ? start : Math.max(start, end - summary);
    return Array.from({ length: end - first }, (_, index) => first + index);
  }

  // Read segments that are not kept: a map from key to {ids, kept}, `kept` = places in the segment.
  async readSegments(missing) {
    const order = [...missing].sort(([, one], [, other]) => one.ids.length - other.ids.length);
    for (let start = 0; start < order.length; start += READ_AT_ONCE) {
      const batch = order.slice(start, start + READ_AT_ONCE);
      const { data, dims } = (await this.reader(batch.map(([, { ids }]) => ids))).states;
      const [, width, size] = dims;
      batch.forEach(([key, { kept }], row) => {
        const own = new Float32Array(kept.length * size);
        kept.forEach((place, index) => {
          const from = (row * width + place) * size;
          own.set(data.subarray(from, from + size), index * size);
        });
        this.states.set(key, own);
      });
      this.textsRead += batch.length;
    }
  }

  async reader(texts) {
    const width = Math.max(...texts.map((ids) => ids.length));
    const dims = [texts.length, width];
    const mask = texts.map((ids) => ids.map(() => 1));
    return this.sessions.reader.run({
      input_ids: longs(this.ort, padded(texts, width, this.config.pad_token_id), dims),
      attention_mask: longs(this.ort, padded(mask, width, 0), dims),
    });
  }

  // The vectors of items, of their ids [ITEM] ... [SEG]: one Float32Array each.
  async itemVectors(texts) {
    const { data, dims } = (await this.reader(texts)).item_vectors;
    return texts.map((_, index) => data.slice(index * dims[1], (index + 1) * dims[1]));
  }

  async segmentStates(row) {
    const missing = new Map();
    const used = row.segments.map((segment) => {
      const ids = row.input_ids.slice(segment.start, segment.end);
      const [key, places] = [ids.join(" "), this.keptOf(segment)];
      if (places.length && !this.states.has(key)) missing.set(key, { ids, kept: places.map((place) => place - segment.start) });
      return [key, places];
    });
    if (this.states.size + missing.size > KEPT_SEGMENTS) {
      for (const [key, places] of used) {
        const ids = key.split(" ").map(Number);
        if (places.length) missing.set(key, { ids, kept: places.map((place) => place - places[0] + ids.length - places.length) });
      }
      this.states.clear();
    }
    await this.readSegments(missing);
    return used.filter(([, places]) => places.length);
  }

  // Join rows, as the processor writes them; `hidden`, [start, end] of an event or null for each, hides tokens. Returns
  // the user vector of each row and, by task, the scores of each row's targets.
  async join(rows, hidden = []) {
    const size = this.config.hidden_size;
    const kept = [];
    for (const row of rows) kept.push(await this.segmentStates(row));
    const tokens = Math.max(...rows.map((row) => row.input_ids.length));
    const places = kept.map((row) => row.flatMap(([, own]) => own));
    const width = Math.max(...places.map((row) => row.length));
    const states = new Float32Array(rows.length * width * size);
    kept.forEach((row, number) => {
      let place = number * width * size;
      for (const [key] of row) {
        states.set(this.states.get(key), place);
        place += this.states.get(key).length;
      }
    });
    const dims = [rows.length, tokens];
    const hides = new Uint8Array(rows.length * tokens);
    hidden.forEach((span, row) => span && hides.fill(1, row * tokens + span[0], row * tokens + span[1]));
    const given = {
      input_ids: longs(this.ort, padded(rows.map((row) => row.input_ids), tokens, this.config.pad_token_id), dims),
      attention_mask: longs(this.ort, padded(rows.map((row) => row.input_ids.map(() => 1)), tokens, 0), dims),
      hidden_events: new this.ort.Tensor("bool", hides, dims),
      kept: longs(this.ort, padded(places, width, -1), [rows.length, width]),
      states: new this.ort.Tensor("float32", states, [rows.length, width, size]),
    };
    if (this.config.reads_item_rows) {
      given.item_embedding_ids = longs(this.ort, padded(rows.map((row) => row.item_embedding_ids), tokens, 0), dims);
    }
    return this.answers(rows, await this.sessions.joint.run(given));
  }

  answers(rows, found) {
    const vectors = found.user_vectors;
    const width = vectors.dims[1];
    const users = rows.map((_, row) => vectors.data.slice(row * width, (row + 1) * width));
    const scores = {};
    for (const task of this.config.tasks) {
      const [, targets, values = 1] = found[task].dims;
      scores[task] = rows.map((row, number) => {
        const count = row.input_ids.filter((id) => id === this.config.bos_token_id).length;
        const at = (target) => (number * targets + target) * values;
        return Array.from({ length: count }, (_, target) => [...found[task].data.slice(at(target), at(target) + values)]);
      });
    }
    return { users, scores };
  }
}
