// From the parts of a request to the texts of its segments, by the template of a saved processor; equal to
// RequestFormatter and ItemNames of formatting_m6rec.py.

import {
  byCodePoints,
  checkMapping,
  checkNumber,
  checkSize,
  checkText,
  decimalNumber,
  inRange,
  isMapping,
  isoTime,
  moment,
  normalizeId,
  strip,
  valueText,
  wrongType,
} from "./values.js";

const EVENT_KEYS = ["event", "item", "timestamp", "rating", "query", "text"];

// Put values into a pattern with {name} placeholders; {{ and }} are braces.
export function format(pattern, values) {
  return pattern.replace(/\{\{|\}\}|\{(\w+)\}/g, (whole, name) => (name === undefined ? whole[0] : values[name]));
}

function placeholders(pattern) {
  return [...pattern.matchAll(/\{\{|\}\}|\{(\w+)\}/g)].map((found) => found[1]).filter((name) => name !== undefined);
}

// The words of the first entry whose limit is at least the number.
function words(table, number) {
  return table.find(([limit]) => limit === null || limit >= number)[1];
}

function isEmpty(value) {
  if (value === null || value === undefined) return true;
  if (typeof value === "string") return !strip(value);
  return Array.isArray(value) && !value.length;
}

function present(fields, leaveOut = []) {
  return Object.fromEntries(Object.entries(fields).filter(([name, value]) => !isEmpty(value) && !leaveOut.includes(name)));
}

function spoken(name, place) {
  return checkText(name, `${place}: the name of a field`).replaceAll("_", " ");
}

// A segment: its text consists of parts, the texts of the fields `names`, joined by `join`. `row` is the item's row of
// item embeddings.
export function makeSegment(kind, names, parts, join, row = 0) {
  return { kind, text: parts.join(join), names, parts, join, row };
}

export function only(segment, fields) {
  const [names, parts] = [segment.names, segment.parts].map((own) => fields.map((index) => own[index]));
  return makeSegment(segment.kind, names, parts, segment.join, segment.row);
}

function plain(kind, text) {
  return { kind, text, names: ["text"], parts: [], join: "", row: 0 };
}

export class Wording {
  constructor(template, itemRows = null) {
    this.template = template;
    this.itemRows = itemRows ?? {};
  }

  user(user) {
    if (user === null || user === undefined) return null;
    if (typeof user === "string") return plain("user", checkText(user, "user"));
    checkSize(user, "user");
    const fields = present(checkMapping(user, "user"), ["user_id"]);
    if (!Object.keys(fields).length) return null;
    const wording = this.template.user;
    const gender = typeof fields.gender === "string" ? strip(fields.gender).toLowerCase() : null;
    const known = gender !== null && Object.hasOwn(wording.genders, gender) ? wording.genders[gender] : "unknown";
    let subject = wording.subjects[known];
    if (known !== "unknown") delete fields.gender;
    const age = typeof fields.age === "string" ? decimalNumber(strip(fields.age)) : fields.age;
    if (typeof age === "boolean") throw wrongType(age, "user.age", "a number");
    if (typeof age === "number") {
      const years = checkNumber(age, "user.age");
      if (!(years >= 0 && years <= 150)) throw new Error(`user.age: expected years from 0 to 150, got ${years}`);
      subject += format(wording.age, { age: words(wording.ages, Math.trunc(years)), pronoun: wording.pronouns[known] });
      delete fields.age;
    }
    const [names, parts] = this.fields(wording, fields, "user");
    return makeSegment("user", ["subject", ...names], [subject, ...parts], wording.join);
  }

  now(now, since) {
    const wording = this.template.now;
    let [names, parts] = [[], []];
    if (typeof now === "string") {
      [names, parts] = [["text"], [checkText(now, "now")]];
    } else if (now !== null && now !== undefined) {
      checkSize(now, "now");
      const fields = present(checkMapping(now, "now"), ["timestamp"]);
      if ("date" in fields) fields.date = this.month(fields.date);
      [names, parts] = this.fields(wording, fields, "now");
    }
    if (since !== null) {
      names.push("gap");
      parts.push(format(wording.gap, { value: this.gap(since, "ago") }));
    }
    return parts.length ? makeSegment("now", names, parts, wording.join) : null;
  }

  month(value) {
    const read = typeof value === "string" ? isoTime(strip(value)) : null;
    return read === null ? value : this.template.now.months[inRange(read, "now.date").month - 1];
  }

  item(item, place) {
    const wording = this.template.item;
    if (typeof item === "string") return makeSegment("item", ["text"], [checkText(item, place)], wording.join);
    const fields = checkMapping(item, place);
    checkSize(item, place);
    if (!isMissing(fields.stats)) throw new Error(`${place}.stats: statistics vary, so they may stand in a candidate only`);
    const [names, parts] = this.fields(wording, present(fields, ["item_id", "stats"]), place);
    if (!parts.length) throw new Error(`${place}: the item has no text, give it a field such as title`);
    return makeSegment("item", names, parts, wording.join, this.itemRow(item, place));
  }

  itemRow(item, place = "item") {
    if (typeof item === "string" || isMissing(item.item_id)) return 0;
    const id = normalizeId(item.item_id, `${place}.item_id`);
    return Object.hasOwn(this.itemRows, id) ? this.itemRows[id] : 0;
  }

  event(event, place) {
    if (typeof event === "string") return { verb: this.verb(null, null, place), item: this.item(event, place), text: null, seconds: null };
    checkMapping(event, place, EVENT_KEYS);
    const verb = this.verb(event.event ?? null, event.rating ?? null, place);
    const text = this.eventText(event, place);
    if (isMissing(event.item) && text === null && ("item" in event || isMissing(event.event))) {
      throw new Error(`${place}.item: missing; an event needs an item, a query or a text, or only a verb`);
    }
    return {
      verb,
      item: isMissing(event.item) ? null : this.item(event.item, `${place}.item`),
      text,
      seconds: isMissing(event.timestamp) ? null : moment(event.timestamp, `${place}.timestamp`),
    };
  }

  eventText(event, place) {
    const given = ["query", "text"].filter((name) => !isMissing(event[name]));
    if (given.length === 2) throw new Error(`${place}: query and text are the same thing, give one of them`);
    return given.length ? plain("text", checkText(event[given[0]], `${place}.${given[0]}`)) : null;
  }

  verb(verb, rating, place) {
    if (verb !== null && typeof verb !== "string") throw wrongType(verb, `${place}.event`, "a text");
    if (rating !== null && !["string", "number"].includes(typeof rating)) {
      throw wrongType(rating, `${place}.rating`, "a number or a text");
    }
    const wording = this.template.events;
    const name = verb === null ? wording.default : checkText(verb, `${place}.event`);
    const key = name.toLowerCase().replaceAll("_", " ").replaceAll("-", " ");
    let text = Object.hasOwn(wording.verbs, key) ? wording.verbs[key] : name;
    if (rating !== null) {
      text = format(wording.rated, { verb: text, rating: valueText(rating, `${place}.rating`, this.template.words) });
    }
    return plain("event", text);
  }

  gap(seconds, table = "gaps") {
    return words(this.template[table], seconds);
  }

  stats(stats, place) {
    if (isMissing(stats)) return [];
    checkSize(stats, place);
    const given = Array.isArray(stats) ? stats.map((stat, index) => [stat, `${place}[${index}]`]) : [[stats, place]];
    return given.flatMap(([stat, own]) => this.stat(stat, own));
  }

  stat(stat, place) {
    if (typeof stat === "string") return [plain("stat", checkText(stat, place))];
    const entries = Object.entries(present(checkMapping(stat, place)));
    return entries.map(([name, value]) => plain("stat", this.statText(name, value, `${place}.${name}`)));
  }

  statText(name, value, place) {
    const wording = this.template.stats;
    if (!Object.hasOwn(wording.names, name)) {
      if (isMapping(value)) throw new Error(`${place}: the template has no words for this statistic`);
      return format(wording.other, { name: spoken(name, place), value: valueText(value, place, this.template.words) });
    }
    const wanted = placeholders(wording.names[name]);
    const given = isMapping(value) ? value : Object.fromEntries(wanted.slice(0, 1).map((key) => [key, value]));
    if (new Set([...wanted, ...Object.keys(given)]).size !== new Set(wanted).size || wanted.some((key) => !(key in given))) {
      throw new Error(`${place}: expected the values ${wanted.join(", ")}`);
    }
    const texts = Object.entries(given).map(([key, each]) => [key, this.statValue(key, each, `${place}.${key}`)]);
    return format(wording.names[name], Object.fromEntries(texts));
  }

  statValue(name, value, place) {
    const tables = this.template.stats.tables;
    if (Object.hasOwn(tables, name)) return words(tables[name], checkNumber(value, place));
    return valueText(value, place, this.template.words);
  }

  // Fields of the template in its order, then all other fields, sorted, as `name: value`.
  fields(wording, fields, place) {
    const known = new Map(wording.fields);
    const names = [...known.keys()].filter((name) => Object.hasOwn(fields, name));
    const others = Object.keys(fields).filter((name) => !known.has(name)).sort(byCodePoints);
    const text = (name) => valueText(fields[name], `${place}.${name}`, this.template.words);
    const parts = names.map((name) => format(known.get(name), { value: text(name) }));
    for (const name of others) {
      const value = text(name);
      parts.push(format(wording.other, { name: spoken(name, place), value }));
    }
    return [[...names, ...others], parts];
  }
}

export function isMissing(value) {
  return value === null || value === undefined;
}

// Comparison of items by their text: equal names, the first fields of their texts, and no common field that differs. A
// text is the same as an item with this name or this whole text.
export class ItemNames {
  constructor(wording) {
    this.wording = wording;
  }

  name(item) {
    return this.wording.item(item, "item").parts[0];
  }

  candidates(item) {
    const segment = this.wording.item(item, "item");
    if (typeof item !== "string" || !segment.join) return [segment.parts[0]];
    const pieces = segment.text.split(segment.join);
    return pieces.map((_, index) => pieces.slice(0, index + 1).join(segment.join));
  }

  same(one, other) {
    const [first, second] = [one, other].map((item) => this.wording.item(item, "item"));
    if (typeof one === "string" || typeof other === "string") {
      return [first.text, first.parts[0]].some((text) => text === second.text || text === second.parts[0]);
    }
    const others = new Map(second.names.map((name, index) => [name, second.parts[index]]));
    const differs = first.names.some((name, index) => others.has(name) && others.get(name) !== first.parts[index]);
    return !differs && first.parts[0] === second.parts[0];
  }
}
