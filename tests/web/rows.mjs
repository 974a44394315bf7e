// Encode the requests of a fixture by the page's code, and print how many rows differ from the fixture's, with examples.
//   node rows.mjs FOLDER/OF/THE/PAGE/CODE fixture.json

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [code, path] = process.argv.slice(2);
const { makeTokenizer } = await import(pathToFileURL(`${code}/tokenizer.js`));
const { Processor } = await import(pathToFileURL(`${code}/processor.js`));
const fixture = JSON.parse(readFileSync(path, "utf8"));
const tokenizers = fixture.tokenizers.map(makeTokenizer);
const processors = fixture.processors.map(
  ({ tokenizer, settings, ids, kinds }) => new Processor(tokenizers[tokenizer], settings, ids, kinds),
);

function read({ processor, task, request, item }) {
  const own = processors[processor];
  try {
    if (item !== undefined) return { input_ids: own.encodeItem(item) };
    const { input_ids, item_embedding_ids, segments, events, dropped } = own.read(request, task);
    const texts = segments.filter(({ kind }) => kind).map(({ kind, text }) => [kind, text]);
    return { input_ids, item_embedding_ids, segments: texts, events, dropped };
  } catch (error) {
    return { error: error.message };
  }
}

const different = [];
for (const example of fixture.examples) {
  const found = read(example);
  const { expected } = example;
  const same = expected === null ? "error" in found : JSON.stringify(found) === JSON.stringify(expected);
  if (!same) different.push({ ...example, found });
}
console.log(JSON.stringify({ read: fixture.examples.length, different: different.length, some: different.slice(0, 3) }));
