// Print which texts the page has in each language; an inner table counts by its own keys.
const { TEXTS } = await import(new URL("../../../train/demo/page/texts.js", import.meta.url));
const keys = (table, before = "") =>
  Object.entries(table).flatMap(([name, value]) => (typeof value === "object" ? [name, ...keys(value, `${name}.`)] : [before + name]));
console.log(JSON.stringify(Object.fromEntries(Object.entries(TEXTS).map(([language, table]) => [language, keys(table)]))));
