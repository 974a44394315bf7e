// From requests to rows of ids, for retrieval and scoring; equal to M6RecProcessor and Truncator of processing_m6rec.py.

import { MAX_CANDIDATES, MAX_EVENTS, MAX_FACTS, checkList, checkMapping, checkText, isMapping, moment } from "./values.js";
import { ItemNames, Wording, isMissing, only } from "./wording.js";

const REQUEST_KEYS = ["user", "history", "now", "facts", "candidates", "text"];
const NEAR = 8; // tokens checked before and after a cut: a character has no more

function upToWhole(count, step) {
  return Math.ceil(count / step) * step;
}

// The first index of 0 .. count - 1 for which `holds`, which never changes back; `count` if there is none.
function firstOf(count, holds) {
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

function slotOf(segment, place) {
  return { segment, place, head: [], body: [], tail: [], cut: false, fixed: false };
}

function size(slot) {
  return slot.head.length + slot.body.length + slot.tail.length;
}

function total(slots) {
  return slots.reduce((sum, slot) => sum + size(slot), 0);
}

function above(lengths, level) {
  return lengths.reduce((sum, length) => sum + Math.max(0, length - level), 0);
}

export class Processor {
  // `settings` are those of a saved processor: template, max_length, max_events, time, item_rows, options,
  // truncation_stride, max_segment; `ids` the tokenizer's structural ids, `kinds` the id of each kind token.
  constructor(tokenizer, settings, ids, kinds) {
    Object.assign(this, { tokenizer, ids, kinds });
    this.settings = settings;
    this.wording = new Wording(settings.template, settings.item_rows);
    this.names = new ItemNames(this.wording);
  }

  // The row of a request: input_ids, item_embedding_ids, segments ({start, end, kind, text}), events ([start, end]) and
  // the number of events that were dropped.
  read(request, task) {
    const draft = this.draft(typeof request === "string" ? { user: request } : request, task);
    for (const slot of slots(draft)) this.fill(slot);
    if (this.excess(draft) > 0) this.shortenRow(draft);
    const excess = this.excess(draft);
    if (excess > 0) {
      throw new Error(`the request needs ${this.settings.max_length + excess} tokens when all that may be dropped is`);
    }
    return this.write(draft);
  }

  // The ids of standalone items, [ITEM] text [SEG].
  encodeItem(item, place = "items[0]") {
    const slot = slotOf(this.wording.item(item, place), place);
    const draft = { start: [slot], events: [], end: [], targets: [], dropped: 0, gaps: true };
    this.fill(slot);
    if (this.excess(draft) > 0) this.shortenRow(draft);
    if (this.excess(draft) > 0) throw new Error(`${place}: the item does not fit`);
    return [...slot.head, ...slot.body, ...slot.tail];
  }

  draft(request, task) {
    const parts = checkMapping(request, "request", REQUEST_KEYS);
    if (!isMissing(parts.text)) throw new Error(`text: task '${task}' does not read it`);
    const history = checkList(parts.history, "history", MAX_EVENTS);
    const stride = this.settings.truncation_stride;
    const skipped = upToWhole(Math.max(0, history.length - this.settings.max_events), stride);
    const read = history.slice(skipped).map((event, index) => this.wording.event(event, `history[${skipped + index}]`));
    const stamp = isMapping(parts.now) ? parts.now.timestamp : null;
    const [events, since] = this.events(read, isMissing(stamp) ? null : moment(stamp, "now.timestamp"), skipped);
    const targets = this.targets(parts, task);
    const now = this.wording.now(parts.now, this.settings.time === "gap" ? since : null);
    return {
      start: [...this.user(parts), ...this.options(task)],
      events,
      end: now === null ? [] : [slotOf(now, "now")],
      targets,
      gaps: this.settings.time === "gap",
      dropped: skipped,
    };
  }

  user(parts) {
    const user = this.wording.user(parts.user);
    const facts = checkList(parts.facts, "facts", MAX_FACTS).map((fact, index) => {
      const text = checkText(fact, `facts[${index}]`);
      return slotOf({ kind: "fact", text, names: ["text"], parts: [], join: "", row: 0 }, `facts[${index}]`);
    });
    return [...(user === null ? [] : [slotOf(user, "user")]), ...facts];
  }

  options(task) {
    if (!this.settings.options || task === "retrieval") return [];
    const tokens = Array.from({ length: this.settings.options }, (_, index) => `[OPT_${index}]`);
    return [slotOf({ kind: "option", text: tokens.join(" "), names: tokens, parts: tokens, join: " ", row: 0 }, "options")];
  }

  events(events, now, first) {
    const known = events.map((event) => event.seconds).filter((seconds) => seconds !== null);
    const until = now ?? (known.length ? Math.max(...known) : null);
    const found = [];
    let before = null;
    events.forEach(({ verb, item, text, seconds }, index) => {
      const segments = [verb];
      const place = `history[${first + index}]`;
      if (seconds !== null) {
        checkOrder(before, seconds, `${place}.timestamp`);
        if (this.settings.time === "ago" && until !== null) {
          checkOrder(seconds, until, "now.timestamp");
          segments.push(age(this.wording.gap(until - seconds, "ago")));
        } else if (this.settings.time === "gap" && before !== null) {
          segments.push(age(this.wording.gap(seconds - before)));
        }
        before = seconds;
      }
      found.push([...segments, item, text].filter(Boolean).map((segment) => slotOf(segment, place)));
    });
    if (now === null || before === null) return [found, null];
    checkOrder(before, now, "now.timestamp");
    return [found, now - before];
  }

  targets(parts, task) {
    const given = checkList(parts.candidates, "candidates", MAX_CANDIDATES);
    const candidates = given.map((candidate, index) => this.candidate(candidate, `candidates[${index}]`));
    if (task === "retrieval") return [];
    if (!candidates.length) throw new Error(`candidates: task '${task}' needs at least one`);
    return candidates;
  }

  candidate(candidate, place) {
    let [item, stats] = [candidate, null];
    if (isMapping(candidate) && "stats" in candidate) ({ stats, ...item } = candidate);
    const segments = [this.wording.item(item, place), ...this.wording.stats(stats, `${place}.stats`)];
    return segments.map((segment) => slotOf(segment, place));
  }

  // ------------------------------------------------------------------------------------------------- encoding, lengths

  fill(slot) {
    const { segment } = slot;
    slot.head = [this.kinds[segment.kind]];
    slot.body = segment.text ? this.tokenizer.encode(segment.text) : [];
    slot.tail = [this.ids.segment_token_id];
    if (segment.kind === "option") {
      slot.head.push(...segment.parts.map((_, index) => this.ids.first_option_token_id + index));
      slot.body = [];
    }
    const most = this.settings.max_segment;
    if (!isMissing(most)) this.shorten(slot, most - slot.head.length - slot.tail.length);
  }

  room(draft) {
    const source = 2 + total(draft.start) + total(draft.end) + draft.events.reduce((sum, event) => sum + total(event), 0);
    return this.settings.max_length - source - (draft.targets.length ? 2 : 0);
  }

  excess(draft) {
    return Math.max(0, ...draft.targets.map(total)) - this.room(draft);
  }

  halfExcess(draft) {
    const longest = Math.max(0, ...draft.targets.map(total));
    return Math.min(longest, Math.floor(this.settings.max_length / 2)) - this.room(draft);
  }

  // -------------------------------------------------------------------------------------------------------- truncation

  shortenRow(draft) {
    const { start, dropped } = draft;
    const given = slots(draft).map((slot) => [slot, slot.segment]);
    const events = draft.events.length;
    this.fit(draft);
    if (this.excess(draft) > 0 && draft.events.length) {
      Object.assign(draft, { start, events: [], dropped: dropped + events });
      for (const [slot, segment] of given) {
        Object.assign(slot, { segment, cut: false, fixed: false });
        this.fill(slot);
      }
      this.fit(draft);
    }
  }

  fit(draft) {
    this.dropEvents(draft);
    this.dropFields(draft);
    this.cutTexts(draft);
  }

  dropEvents(draft) {
    const half = Math.floor(this.settings.max_length / 2);
    this.dropSpare(draft, Math.min(this.halfExcess(draft), total(draft.start) - half));
    let excess = this.halfExcess(draft);
    let gone = 0;
    const events = [...draft.events];
    while (gone < events.length - 1 && (excess > 0 || gone < upToWhole(gone, this.settings.truncation_stride))) {
      excess -= total(events[gone]);
      gone += 1;
      if (draft.gaps) {
        const first = events[gone];
        events[gone] = first.filter((slot) => slot.segment.kind !== "age");
        excess -= total(first) - total(events[gone]);
      }
    }
    draft.events = events.slice(gone);
    draft.dropped += gone;
    this.dropSpare(draft, excess);
  }

  // Drop the last facts, except the first fact.
  dropSpare(draft, given) {
    let excess = given;
    const gone = new Set();
    for (const slot of draft.start.filter((each) => each.segment.kind === "fact").slice(1).reverse()) {
      if (excess <= 0) break;
      excess -= size(slot);
      gone.add(slot);
    }
    draft.start = draft.start.filter((slot) => !gone.has(slot));
  }

  dropFields(draft) {
    const source = [...draft.start, ...draft.events.flat(), ...draft.end];
    this.dropLongest(source, this.halfExcess(draft));
    const room = this.room(draft);
    for (const target of draft.targets) this.dropLongest(target, total(target) - room);
    this.dropLongest(source, this.excess(draft));
  }

  // Drop the longest fields of items, as few as necessary; an item's first field, its name, stays.
  dropLongest(all, excess) {
    if (excess <= 0) return;
    const items = all.filter(({ segment }) => segment.kind === "item" && segment.parts.length);
    const whole = items.map((slot) => slot.segment);
    const room = total(items) - excess;
    const parts = whole.flatMap((segment, place) => segment.parts.slice(1).map((text, index) => [place, index + 1, text]));
    const sized = parts.map(([place, index, text]) => [place, index, this.tokenizer.encode(text).length]);
    const order = sized.sort((one, other) => other[2] - one[2]); // stable
    const length = (count) => {
      const gone = new Set(order.slice(0, count).map(([place, index]) => `${place} ${index}`));
      items.forEach((slot, place) => {
        const segment = whole[place];
        const kept = segment.parts.map((_, index) => index).filter((index) => !gone.has(`${place} ${index}`));
        if (kept.length !== slot.segment.parts.length) {
          slot.segment = kept.length < segment.parts.length ? only(segment, kept) : segment;
          slot.cut = false;
          this.fill(slot);
        }
      });
      return total(items);
    };
    length(firstOf(order.length, (count) => length(count) <= room));
  }

  cutTexts(draft) {
    const source = [...draft.start, ...draft.events.flat(), ...draft.end];
    for (let excess = this.excess(draft); excess > 0; excess = this.excess(draft)) {
      let longest = [];
      for (const target of draft.targets) if (total(target) > total(longest)) longest = target;
      if (!this.cut([...source, ...longest], excess)) return;
      const room = this.room(draft);
      for (const target of draft.targets) this.cut(target, total(target) - room);
    }
  }

  cut(all, excess) {
    const own = all.filter((slot) => slot.body.length > 1 && !slot.fixed);
    if (excess <= 0 || !own.length) return false;
    const lengths = own.map((slot) => slot.body.length);
    const level = firstOf(Math.max(...lengths) - 1, (index) => above(lengths, index + 2) < excess) + 1;
    const longest = own.filter((slot) => slot.body.length > level);
    const spared = Math.max(0, above(lengths, level) - excess);
    longest.forEach((slot, place) => this.shorten(slot, level + (place >= longest.length - spared ? 1 : 0)));
    return true;
  }

  shorten(slot, count) {
    if (count >= slot.body.length) return;
    const kept = this.wholeCharacters(slot.body, count);
    if (kept === 0) {
      slot.fixed = true;
      return;
    }
    slot.body = slot.body.slice(0, kept);
    slot.cut = true;
  }

  // The largest number of tokens up to `count` that does not end inside a character; 0 if none.
  wholeCharacters(ids, count) {
    for (let kept = count; kept > 0; kept--) {
      const start = Math.max(0, kept - NEAR);
      const whole = this.tokenizer.decode(ids.slice(start, kept + NEAR));
      if (whole.startsWith(this.tokenizer.decode(ids.slice(start, kept)))) return kept;
    }
    return 0;
  }

  // ----------------------------------------------------------------------------------------------------------- writing

  write(draft) {
    const row = { input_ids: [], item_embedding_ids: [], segments: [], events: [], dropped: draft.dropped };
    const marker = (id) => {
      row.input_ids.push(id);
      row.segments.push({ start: row.input_ids.length - 1, end: row.input_ids.length, kind: null, text: "" });
    };
    const put = (slot) => {
      const start = row.input_ids.length;
      row.input_ids.push(...slot.head, ...slot.body, ...slot.tail);
      const { kind, text } = slot.segment;
      const row_ = kind === "item" ? slot.segment.row : 0;
      const shown = slot.cut ? this.tokenizer.decode(slot.body) : text;
      row.segments.push({ start, end: row.input_ids.length, kind, text: shown, row: row_ });
    };
    marker(this.ids.source_token_id);
    draft.start.forEach(put);
    for (const event of draft.events) {
      const start = row.input_ids.length;
      event.forEach(put);
      row.events.push([start, row.input_ids.length]);
    }
    draft.end.forEach(put);
    marker(this.ids.source_end_token_id);
    for (const target of draft.targets) {
      marker(this.ids.bos_token_id);
      target.forEach(put);
      marker(this.ids.eos_token_id);
    }
    row.item_embedding_ids = new Array(row.input_ids.length).fill(0);
    for (const { end, row: own } of row.segments) if (own) row.item_embedding_ids[end - 1] = own;
    return row;
  }
}

function age(text) {
  return { kind: "age", text, names: ["text"], parts: [], join: "", row: 0 };
}

function slots(draft) {
  return [...draft.start, ...draft.events.flat(), ...draft.end, ...draft.targets.flat()];
}

function checkOrder(before, after, place) {
  if (before !== null && after < before) throw new Error(`${place}: ${after} is earlier than ${before} before it`);
}
