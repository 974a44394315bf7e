// Elements of the page: rows with bars, and movements of a list.

export const PARTS = ["learnt", "words", "transitions", "texts", "popularity", "profile"];

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "dataset") Object.assign(made.dataset, value);
    else if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// A button whose place is found again by `focus` after its list was drawn anew.
export function button(text, action, { label, className = "", focus = "" } = {}) {
  const made = element("button", { type: "button", className, dataset: focus ? { focus } : {} }, text);
  if (label) {
    made.setAttribute("aria-label", label);
    made.title = label;
  }
  made.addEventListener("click", action);
  return made;
}

// A bar of parts around a zero: negative ones to its left. `least` and `most` are the ends of the scale.
export function bar(parts, least, most, names, label = "") {
  const span = Math.max(most - least, 1e-9);
  const made = element("span", { className: "bar", role: "img", "aria-label": label, title: label });
  const ends = { left: 0, right: 0 };
  for (const name of PARTS) {
    const value = parts[name] ?? 0;
    if (Math.abs(value) < 5e-4) continue;
    const start = value < 0 ? ends.left + value : ends.right;
    if (value < 0) ends.left += value;
    else ends.right += value;
    const piece = element("span", { className: `part ${name}`, title: `${names[name]} ${signed(value)}` });
    piece.style.left = `${(100 * (start - least)) / span}%`;
    piece.style.width = `${(100 * Math.abs(value)) / span}%`;
    made.append(piece);
  }
  if (least < 0) {
    const zero = element("span", { className: "zero" });
    zero.style.left = `${(100 * (0 - least)) / span}%`;
    made.append(zero);
  }
  return made;
}

// The ends of a scale for bars with these parts.
export function scale(several) {
  let [least, most] = [0, 0];
  for (const parts of several) {
    const values = Object.values(parts);
    least = Math.min(least, values.filter((own) => own < 0).reduce((sum, own) => sum + own, 0));
    most = Math.max(most, values.filter((own) => own > 0).reduce((sum, own) => sum + own, 0));
  }
  return [least, most];
}

export function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
}

export function total(parts) {
  return Object.values(parts).reduce((sum, own) => sum + own, 0);
}

// Draw a list anew: rows that stay slide from their former places, and the focus stays where it was.
export function redraw(draw, container) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const before = new Map();
  for (const row of container.querySelectorAll("[data-key]")) before.set(row.dataset.key, row.getBoundingClientRect().top);
  const focus = container.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  const place = focus ? [...container.querySelectorAll("[data-focus]")].findIndex((each) => each.dataset.focus === focus) : -1;
  draw();
  if (focus) {
    const all = [...container.querySelectorAll("[data-focus]")];
    (all.find((each) => each.dataset.focus === focus) ?? all[Math.min(place, all.length - 1)])?.focus();
  }
  if (still) return;
  for (const row of container.querySelectorAll("[data-key]")) {
    const top = before.get(row.dataset.key);
    const moved = top === undefined ? null : top - row.getBoundingClientRect().top;
    if (moved === null && before.size) row.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 300 });
    else if (moved) row.animate([{ transform: `translateY(${moved}px)` }, { transform: "none" }], { duration: 300, easing: "ease-out" });
  }
}
