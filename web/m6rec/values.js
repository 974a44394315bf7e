// Rules for texts, numbers, ids and times of a request, equal to those of the Python package (values_m6rec.py,
// formatting_m6rec.py). Every function throws an Error that names the place of an invalid value.

export const MAX_CHARACTERS = 100000;
export const MAX_VALUES = 10000;
export const MAX_EVENTS = 100000;
export const MAX_CANDIDATES = 100000;
export const MAX_FACTS = 10000;
const MAX_DEPTH = 12;
const EXACT = 2 ** 53;

// White space by Python's str.strip and str.isspace, which differ from String.trim in U+001C to U+001F, U+0085, U+FEFF.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const ENDS = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "g");

export function strip(text) {
  return text.replace(ENDS, "");
}

export function isMapping(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export function wrongType(value, place, expected) {
  return new Error(`${place}: expected ${expected}, got ${JSON.stringify(value)?.slice(0, 80)}`);
}

export function checkText(value, place) {
  if (typeof value !== "string") throw wrongType(value, place, "a text");
  if ([...value].length > MAX_CHARACTERS) throw new Error(`${place}: the text is too long: shorten it`);
  const text = strip(value);
  if (!text) throw new Error(`${place}: the text is empty; leave the key out, or give a text`);
  if (!text.isWellFormed()) throw new Error(`${place}: the text is not valid Unicode`);
  return text;
}

export function checkMapping(value, place, known = null) {
  if (!isMapping(value)) throw wrongType(value, place, "a mapping");
  if (known !== null) {
    for (const key of Object.keys(value)) {
      if (!known.includes(key)) throw new Error(`${place}: unknown key ${key}; known keys: ${known.join(", ")}`);
    }
  }
  return value;
}

export function checkList(value, place, most = MAX_VALUES) {
  if (value === null || value === undefined) return [];
  if (!Array.isArray(value)) throw wrongType(value, place, "a list");
  if (value.length > most) throw new Error(`${place}: ${value.length} entries; the limit is ${most}: give fewer`);
  return value;
}

export function checkSize(value, place, most = MAX_VALUES, depth = MAX_DEPTH) {
  let level = [value];
  let count = 0;
  for (let step = 0; step <= depth; step++) {
    const below = [];
    for (const each of level) {
      const inner = typeof each === "object" && each !== null ? Object.values(each) : [];
      count += inner.length;
      if (count > most) throw new Error(`${place}: more than ${most} values, which is the limit: give fewer`);
      below.push(...inner.filter((own) => typeof own === "object" && own !== null));
    }
    if (!below.length) return;
    level = below;
  }
  throw new Error(`${place}: lists and mappings stand within each other more than ${depth} deep`);
}

export function checkNumber(value, place) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw wrongType(value, place, "a finite number");
  return value;
}

// JavaScript does not tell 4 from 4.0 and rounds large numbers: from 1e15 on the two languages write them differently.
export function numberText(value, place) {
  const size = Math.abs(value);
  if (size >= 1e15) throw new Error(`${place}: ${value} is too large: give it as a text`);
  if (Number.isInteger(value)) return String(value === 0 ? 0 : value);
  if (size < 1e-4) {
    const [digits, power] = value.toExponential().split("e-");
    return `${digits}e-${power.padStart(2, "0")}`;
  }
  return String(value);
}

export function valueText(value, place, words) {
  if (typeof value === "string") return checkText(value, place);
  if (typeof value === "boolean") return words[String(value)];
  if (Array.isArray(value) && value.length) {
    return value.map((each, index) => valueText(each, `${place}[${index}]`, words)).join(words.list);
  }
  if (typeof value === "number") return numberText(checkNumber(value, place), place);
  throw wrongType(value, place, "a text, a number, a truth value or a list of these");
}

export function normalizeId(value, place) {
  if (typeof value === "string") {
    const text = strip(value);
    if (text && text.isWellFormed()) return text;
  } else if (typeof value === "number" && Number.isInteger(value) && Math.abs(value) < EXACT) {
    return String(value === 0 ? 0 : value);
  }
  throw new Error(`${place}: ${JSON.stringify(value)} is no id: give a text that is not empty, or a whole number`);
}

// Compare texts by code points, as Python does; "<" compares UTF-16 units.
export function byCodePoints(one, other) {
  const first = [...one];
  const second = [...other];
  for (let index = 0; index < Math.min(first.length, second.length); index++) {
    const difference = first[index].codePointAt(0) - second[index].codePointAt(0);
    if (difference) return difference;
  }
  return first.length - second.length;
}

// The number that a text of decimal digits of any script writes, or null for other texts (Python's str.isdecimal).
export function decimalNumber(text) {
  if (!/^\p{Nd}+$/u.test(text)) return null;
  const digits = [...text].map((each) => {
    const point = each.codePointAt(0);
    if (point >= 0x1d7ce && point <= 0x1d7ff) return (point - 0x1d7ce) % 10;
    let start = point;
    while (point - start < 9 && /\p{Nd}/u.test(String.fromCodePoint(start - 1))) start--;
    return point - start;
  });
  return Number(digits.join(""));
}

// ------------------------------------------------------------------------------------------------------------- times

const UNITS = [
  [1e8, 1e11, 1],
  [1e11, 1e14, 1e3],
  [1e14, 1e17, 1e6],
  [1e17, 1e20, 1e9],
];
const EARLIEST = -62135596800;
const LATEST = 1e11;
const NUMBER = /^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?$/;
const YEAR_FIRST = /^([0-9]{4})[-/.]([0-9]{1,2})(?:[-/.]([0-9]{1,2})(?:([T ])([0-9]{1,2})(:.*|[-+Z].*)?)?)?$/;

// A moment in seconds: a number in seconds to nanoseconds since 1970 by its size, a small number, or an ISO 8601 text.
export function moment(value, place) {
  if (typeof value === "string") {
    const text = strip(value);
    return NUMBER.test(text) ? ofNumber(Number(text), place) : ofWords(text, place);
  }
  if (typeof value !== "number") throw wrongType(value, place, "a time");
  return ofNumber(value, place);
}

function ofNumber(number, place) {
  if (!Number.isFinite(number)) throw new Error(`${place}: expected a finite number`);
  if (isWrittenDate(number)) throw new Error(`${place}: ${number} is no time: its digits are a date`);
  const size = Math.abs(number);
  for (const [first, last, inASecond] of UNITS) {
    if (first <= size && size < last) return number / inASecond;
  }
  if (size < UNITS[0][0]) return number;
  throw new Error(`${place}: ${number} is no time`);
}

function isWrittenDate(number) {
  if (!(number >= 1.9e7 && number < 2.1e13 && Number.isInteger(number))) return false;
  const digits = String(number);
  if (![8, 12, 14].includes(digits.length) || digits.slice(0, 4) < "1900" || digits.slice(0, 4) >= "2100") return false;
  const [month, day, hour, minute, second] = [4, 6, 8, 10, 12].map((at) => Number(digits.slice(at, at + 2) || "0"));
  return isDay(Number(digits.slice(0, 4)), month, day) && hour < 24 && minute < 60 && second < 62;
}

function ofWords(text, place) {
  let iso = text.replace(/ ?(UTC|GMT)$/, "+00:00");
  const found = YEAR_FIRST.exec(iso);
  if (found) {
    const [, year, month, day, between, hour, rest] = found;
    iso = `${year}-${month.padStart(2, "0")}-${(day ?? "1").padStart(2, "0")}`;
    if (hour) iso += `${between}${hour.padStart(2, "0")}${rest ?? ""}`;
  }
  const read = isoTime(iso);
  if (read === null) throw new Error(`${place}: ${text} is no time`);
  return inRange(read, place).seconds;
}

// A time that isoTime read, if it is between the years 1 and 5138.
export function inRange(read, place) {
  if (read.seconds >= EARLIEST && read.seconds < LATEST) return read;
  throw new Error(`${place}: no time between the years 1 and 5138`);
}

function isDay(year, month, day) {
  if (year < 1 || month < 1 || month > 12 || day < 1) return false;
  return day <= new Date(Date.UTC(2000 + (year % 400), month, 0)).getUTCDate();
}

function dayNumber(year, month, day) {
  const date = new Date(0);
  date.setUTCFullYear(year, month - 1, day);
  return date.getTime() / 86400000;
}

// The month and the seconds since 1970 of an ISO 8601 text, as datetime.fromisoformat reads it; null for other texts.
export function isoTime(text) {
  const date = readDate(text);
  if (date === null) return null;
  const [year, month, day, length] = date;
  const characters = [...text.slice(length)];
  let seconds = dayNumber(year, month, day) * 86400;
  if (characters.length) {
    const clock = readClock(characters.slice(1).join(""));
    if (clock === null) return null;
    seconds += clock;
  }
  return { year, month, seconds };
}

function readDate(text) {
  let found = /^(\d{4})-(\d\d)-(\d\d)/.exec(text) ?? /^(\d{4})(\d\d)(\d\d)/.exec(text);
  if (found) {
    const [year, month, day] = found.slice(1).map(Number);
    return isDay(year, month, day) ? [year, month, day, found[0].length] : null;
  }
  found = /^(\d{4})-W(\d\d)(?:-([1-7]))?(?!\d)/.exec(text) ?? /^(\d{4})W(\d\d)([1-7])?(?!\d)/.exec(text);
  if (!found) return null;
  const [year, week, weekday] = [Number(found[1]), Number(found[2]), Number(found[3] ?? 1)];
  const fourth = dayNumber(year, 1, 4);
  const monday = fourth - ((((fourth + 3) % 7) + 7) % 7);
  const date = new Date((monday + (week - 1) * 7 + weekday - 1) * 86400000);
  const next = dayNumber(year + 1, 1, 4);
  const weeks = (next - ((((next + 3) % 7) + 7) % 7) - monday) / 7;
  if (year < 1 || week < 1 || week > weeks) return null;
  return [date.getUTCFullYear(), date.getUTCMonth() + 1, date.getUTCDate(), found[0].length];
}

const ZONE = "(Z|[-+]\\d\\d(?::?\\d\\d(?::?\\d\\d(?:[.,]\\d+)?)?)?)?";
const CLOCKS = [
  new RegExp(`^(\\d\\d)(?::(\\d\\d)(?::(\\d\\d)(?:[.,](\\d+))?)?)?${ZONE}$`),
  new RegExp(`^(\\d\\d)(?:(\\d\\d)(?:(\\d\\d)(?:[.,](\\d+))?)?)?${ZONE}$`),
];

// The seconds of a time of day, less its zone's offset.
function readClock(text) {
  const found = CLOCKS[0].exec(text) ?? CLOCKS[1].exec(text);
  if (!found) return null;
  const [hour, minute, second] = found.slice(1, 4).map((each) => Number(each ?? 0));
  if (hour > 23 || minute > 59 || second > 59) return null;
  const micro = Number((found[4] ?? "").slice(0, 6).padEnd(6, "0"));
  const zone = readZone(found[5]);
  return zone === null ? null : hour * 3600 + minute * 60 + second - zone + micro / 1e6;
}

function readZone(text) {
  if (text === undefined || text === "Z") return 0;
  const [hours, minutes, seconds] = (text.slice(1).match(/\d\d/g) ?? []).map(Number);
  const size = hours * 3600 + (minutes ?? 0) * 60 + (seconds ?? 0);
  if ((minutes ?? 0) > 59 || (seconds ?? 0) > 59 || size >= 86400) return null;
  return text[0] === "-" ? -size : size;
}
