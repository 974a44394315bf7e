// Answer the requests of a file by an exported page under Node: print the answers, and the milliseconds of each part.
//   node answers.mjs FOLDER/OF/THE/PAGE/CODE FOLDER/OF/AN/EXPORTED/PAGE requests.json

import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [, folder, path] = process.argv.slice(2);
const at = (name) => pathToFileURL(`${folder}/${name}`);
const { Recommender } = await import(at("m6rec/recommender.js"));

async function runtime() {
  const ort = await import(at("vendor/ort.wasm.min.mjs"));
  ort.env.wasm.wasmPaths = `${at("vendor")}/`;
  ort.env.wasm.numThreads = 1;
  return ort;
}

const read = async (name) => {
  const file = await readFile(`${folder}/model/${name}`);
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength);
};
const recommender = await Recommender.load(read, runtime, { executionProviders: ["wasm"] });
const { requests, explained, scored, added, options } = JSON.parse(readFileSync(path, "utf8"));
const answers = [];
for (const request of requests) answers.push(await recommender.recommend(request, options));
const reasons = [];
for (const request of explained ?? []) reasons.push(await recommender.recommend(request, { ...options, explain: true }));
const scores = [];
for (const [request, task] of scored ?? []) scores.push(await recommender.score(request, task));
for (const [id, item] of added ?? []) await recommender.add(id, item);
const after = added ? await recommender.recommend(requests[0], { ...options, topK: recommender.catalogue.ids.length }) : [];
console.log(JSON.stringify({ answers, reasons, scores, after }));
