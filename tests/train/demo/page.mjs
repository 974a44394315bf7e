// Use a demo in headless Chromium by clicks and keys, as a person would; print what it shows and how long it takes.
//   node page.mjs ADDRESS FOLDER/OF/NODE_MODULES FOLDER/FOR/PICTURES|- PRODUCT WORDS [WORDS ...]

import { createRequire } from "node:module";

const [address, modules, pictures, product, ...words] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = async (name) => import(require.resolve(name));
const { default: chromium } = await load("@sparticuz/chromium");
const { default: puppeteer } = await load("puppeteer-core");

const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox", "--lang=en-US"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const [errors, elsewhere, latencies] = [[], [], []];
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("request", (request) => request.url().startsWith(address) || request.url().startsWith("data:") || elsewhere.push(request.url()));
  await page.setViewport({ width: 1360, height: 1060 });
  await page.goto(address);
  let count = 0;
  // Wait until the lists and the reasons of the last action are shown.
  const settled = async () => {
    count += 1;
    const shown = (least) => Number(document.body.dataset.lists) >= least && Number(document.body.dataset.reasons) >= least;
    await page.waitForFunction(shown, { timeout: 60000 }, count);
    latencies.push(Number(await page.evaluate(() => document.body.dataset.latency)));
  };
  const texts = (selector) => page.$$eval(selector, (found) => found.map((each) => each.textContent));
  const list = (number) => texts(`#readings .list:nth-child(${number}) .text`);
  const picture = async (name, more = {}) => {
    await new Promise((done) => setTimeout(done, 400)); // rows have stopped sliding
    if (pictures !== "-") await page.screenshot({ path: `${pictures}/${name}.png`, ...more });
  };
  await settled();
  const seen = { title: await page.$eval("#name", (each) => each.textContent), starters: (await texts(".chip")).length };
  seen.empty = [await list(1), await list(2)];

  for (const word of words) {
    await page.type("#search", word);
    const whole = (text) => [...document.querySelectorAll("#found li")].at(-1)?.textContent.includes(`“${text}”`);
    if (word !== words[0]) await page.waitForFunction(whole, {}, word); // the first time Enter comes at once
    seen.found = await texts("#found li");
    await page.keyboard.press("Enter");
    await settled();
  }
  seen.history = await texts("#history .text");
  seen.lists = [await list(1), await list(2)];
  seen.bars = await page.$$eval("#history .part", (found) => found.length);
  seen.legend = await texts("#legend li");
  seen.row_bars = await page.$$eval("#readings .part", (found) => found.length);

  await page.click("#readings .list:last-child li:nth-child(2) .small");
  await settled();
  seen.after_click = { history: await texts("#history .text"), list: await list(2), moved: (await texts("#readings .moved")).join("") };
  await page.focus("#history li:first-child .small");
  await page.keyboard.press("Delete");
  await settled();
  seen.after_removal = { history: await texts("#history .text"), list: await list(2) };
  seen.focus = await page.evaluate(() => document.activeElement.dataset.focus !== undefined);

  await page.type("#product-text", product);
  await page.click("#product button");
  await settled();
  seen.note = await texts("#products .note");
  seen.invented = await texts("#readings .badge.new");
  await page.click("#readings .list:last-child li:nth-child(2) .small");
  await settled();
  seen.note_after = await texts("#products .note");
  await page.click("#readings .list:last-child li:first-child .text");
  seen.chosen = await page.$eval("#bars", (each) => each.textContent);
  await picture("desktop");

  seen.tasks = await texts("#tasks button");
  if (seen.tasks.length) {
    await page.click("#tasks button:last-child");
    await page.waitForFunction(() => document.getElementById("written").textContent.length > 1);
    seen.written = await page.$eval("#written", (each) => each.textContent);
    await picture("writing", { fullPage: true });
  }
  await page.select("#readings .list:last-child select", "learnt");
  await settled();
  const learnt = await list(2);
  await page.select("#readings .list:last-child select", "both");
  await settled();
  await page.focus("#weight");
  await page.keyboard.press("End");
  await settled();
  seen.same_at_the_end = JSON.stringify(learnt) === JSON.stringify(await list(2));
  await page.keyboard.press("Home");
  await settled();
  seen.same_at_the_start = JSON.stringify(await list(1)) === JSON.stringify(await list(2));
  await page.evaluate(() => {
    const slider = document.getElementById("weight");
    slider.value = "0.5";
    slider.dispatchEvent(new Event("input"));
  });
  await settled();

  await page.click("#language");
  await settled();
  seen.chinese = await page.$eval("#history-title", (each) => each.textContent);
  await page.setViewport({ width: 390, height: 844, deviceScaleFactor: 2 });
  seen.overflows = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
  await picture("phone-chinese", { fullPage: true });
  await page.click("#language");
  await settled();
  await picture("phone", { fullPage: true });
  await page.click("#clear");
  await settled();
  seen.cleared = await texts("#history .text");
  console.log(JSON.stringify({ ...seen, latencies, errors, elsewhere }));
} finally {
  await browser.close();
}
