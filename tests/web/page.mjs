// Use an exported page in headless Chromium by clicks, as a person would; print what it shows and how long it takes.
//   node page.mjs FOLDER/OF/THE/PAGE/CODE FOLDER/OF/AN/EXPORTED/PAGE FOLDER/OF/NODE_MODULES FOLDER/FOR/PICTURES|- TEXT

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { normalize } from "node:path";

const [, folder, modules, pictures, words] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = async (name) => import(require.resolve(name));
const { default: chromium } = await load("@sparticuz/chromium");
const { default: puppeteer } = await load("puppeteer-core");
const KINDS = { html: "text/html", js: "text/javascript", mjs: "text/javascript", css: "text/css", wasm: "application/wasm", json: "application/json" };

const server = createServer(async (request, response) => {
  const path = normalize(decodeURIComponent(request.url.split("?")[0])).replace(/\/$/, "/index.html");
  try {
    const content = await readFile(`${folder}${path}`);
    const kind = KINDS[path.split(".").pop()] ?? "application/octet-stream";
    response.writeHead(200, { "content-type": kind, "cache-control": "no-store" }).end(content);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const address = `http://127.0.0.1:${server.address().port}/`;

const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox", "--lang=en-US"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const errors = [];
const elsewhere = [];
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("request", (request) => request.url().startsWith(address) || request.url().startsWith("data:") || elsewhere.push(request.url()));
  await page.setViewport({ width: 1280, height: 900 });
  await page.goto(address);
  const lists = (count) => page.waitForFunction((least) => Number(document.body.dataset.lists) >= least, { timeout: 120000 }, count);
  await lists(1);
  const texts = (selector) => page.$$eval(selector, (found) => found.map((each) => each.firstElementChild.textContent));
  const seen = { title: await page.title(), unknown: await texts("#list > li") };
  await page.waitForFunction(() => document.body.dataset.ready, { timeout: 120000 });
  Object.assign(seen, await page.evaluate(() => ({ first_list_ms: Number(document.body.dataset.firstList), ready_ms: Number(document.body.dataset.ready) })));
  await page.type("#search", words);
  seen.found = await texts("#found > li");
  await page.click("#found > li:first-child button");
  await lists(2);
  seen.history = await texts("#history > li");
  seen.list = await texts("#list > li");
  await page.click("#list > li:first-child button:last-child");
  await lists(3);
  await page.click("#list > li:first-child button:first-of-type");
  await page.waitForSelector("#list .because li");
  seen.because = await texts("#list .because > li");
  await page.type("#new-text", `${words} again, 2025`);
  await page.click("#new button");
  await page.waitForFunction(() => document.getElementById("new-note").textContent);
  seen.note = await page.$eval("#new-note", (each) => each.textContent);
  if (await page.$("#measure:not([hidden])")) {
    // The processor time of the page's thread says more than the clock does if other processes run.
    const thread = await page.createCDPSession();
    await thread.send("Performance.enable", { timeDomain: "threadTicks" });
    const busy = async () => 1000 * (await thread.send("Performance.getMetrics")).metrics.find(({ name }) => name === "TaskDuration").value;
    const measured = async () => {
      await page.evaluate(() => delete window.m6rec.candidatesTimes);
      await page.click("#measure");
      await page.waitForFunction(() => window.m6rec.candidatesTimes !== undefined, { timeout: 120000 });
      return page.evaluate(() => window.m6rec.candidatesTimes);
    };
    const first = await measured();
    const before = await busy();
    const again = await measured(); // null: the catalogue has fewer items
    const busyFor = (await busy()) - before;
    if (again) Object.assign(seen, { candidates100_ms: again.median, candidates100_second_ms: first.second, candidates100_processor_ms: busyFor / again.rounds });
  }
  Object.assign(seen, await page.evaluate(() => ({ list_ms: window.m6rec.listTime, new_item_ms: window.m6rec.newTime })));
  await page.click("#list > li:first-child button:first-of-type");
  await page.waitForSelector("#list .because li");
  if (pictures !== "-") await page.screenshot({ path: `${pictures}/page-desktop.png` });
  await page.click("#language");
  await lists(4);
  seen.chinese = await page.$eval("#list-title", (each) => each.textContent);
  await page.setViewport({ width: 390, height: 844 });
  seen.overflows = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
  if (pictures !== "-") await page.screenshot({ path: `${pictures}/page-phone.png`, fullPage: false });
  await page.click("#history > li:first-child button");
  await lists(5);
  seen.shorter = await texts("#history > li");
  seen.status = await page.$eval("#status", (each) => each.textContent);
  console.log(JSON.stringify({ ...seen, errors, elsewhere }));
} finally {
  await browser.close();
  server.close();
}
