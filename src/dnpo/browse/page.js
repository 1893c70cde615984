"use strict";

// What is shown is in the address: the view, the search, filters, order, page and the open row.
// Rows come as JSON and are put into the page as text, never as HTML.

const find = (selector) => document.querySelector(selector);
const list = find("#rows");
const search = find("input[name=q]");
let state = new URLSearchParams(location.search);
let pending = new AbortController();
let typing = 0;
let last = null; // the list that is shown

// --- state ---------------------------------------------------------------------------------------------------------

const view = () => state.get("view") || "held";
const page = () => Number(state.get("page") || 1);

function controls() {
  return document.querySelectorAll(`fieldset[data-view=${view()}] select, select[name=family], input[name=q]`);
}

function put(name, value, usual = "") {
  if (value === usual) state.delete(name);
  else state.set(name, value);
}

function remember(replace = false) {
  state.set("runs", document.body.dataset.runs);
  const address = `?${state}`;
  if (address === location.search) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
}

function readControls() {
  for (const control of controls()) put(control.name, control.value, control.dataset.usual || "");
}

function fillControls() {
  for (const fieldset of document.querySelectorAll("fieldset")) fieldset.hidden = fieldset.dataset.view !== view();
  for (const button of document.querySelectorAll("nav [data-view]")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view()));
  }
  for (const control of controls()) {
    control.value = state.get(control.name) ?? (control.dataset.usual || "");
    if (control.selectedIndex === -1) control.value = control.dataset.usual || ""; // the address has a value that is refused
  }
}

function fillFamilies(families) {
  const select = find("select[name=family]");
  const chosen = state.get("family") || "";
  const names = chosen && !families.includes(chosen) ? [chosen, ...families] : families;
  select.replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
  select.value = chosen;
  select.parentElement.hidden = !names.length;
}

// --- elements ------------------------------------------------------------------------------------------------------

function make(tag, classes, ...children) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

function text(content, classes = "text") {
  const element = make("div", classes, content);
  element.dir = "auto";
  return element;
}

const rounded = (value, digits = 1) => String(Number(value.toFixed(digits))).replace("-", "−");
// Measured numbers: the same decimals in all rows, so that those one below another can be compared at a glance.
const measured = (value) => (Number(value.toFixed(1)) || 0).toFixed(1).replace("-", "−");
const score = (value) => (value === null ? "–" : measured(value));

function difference(value, name) {
  if (value === null) return make("span", "difference", "–");
  const sign = value > 0 ? "+" : "";
  const element = make("span", `difference ${value > 0 ? "up" : value < 0 ? "down" : ""}`, sign + measured(value));
  element.title = name;
  return element;
}

function facts(answer) {
  const parts = [];
  if (answer.score !== null) parts.push(make("b", "score", measured(answer.score)));
  if (answer.right === 1) parts.push(make("span", "right", "✓ right"));
  else if (answer.right === 0) parts.push(make("span", "wrong", "✗ wrong"));
  else if (typeof answer.right === "number") parts.push(make("span", "", `${rounded(100 * answer.right, 0)} % right`));
  if (answer.logprob !== null && answer.logprob !== undefined) parts.push(make("span", "", `log p ${measured(answer.logprob)}`));
  if (answer.tokens) parts.push(make("span", "", `${answer.tokens} tokens`));
  if (answer.cut) parts.push(make("span", "wrong", "cut"));
  if (answer.second !== null && answer.second !== undefined) parts.push(make("span", "", `second judge ${score(answer.second)}`));
  if (answer.reason) parts.push(make("span", "", answer.reason));
  return make("div", "facts", ...parts);
}

function side(title, answer, classes = "") {
  const label = make("span", "label", title);
  return make("span", `side ${classes}`, label, facts(answer), text(answer.text, "text short"));
}

// --- the list ------------------------------------------------------------------------------------------------------

function heldRow(row) {
  const [old, fresh] = row.sides;
  const change = old.score === null || fresh.score === null ? null : fresh.score - old.score;
  return [
    make("span", "side prompt", make("span", "id", make("bdi", "", row.id), row.family ? ` · ${row.family}` : ""), text(row.prompt, "text short")),
    side("human", row.human, "human"),
    side(last.titles[0], old),
    side(last.titles[1], fresh),
    difference(change, "score change"),
  ];
}

function pairRow(row) {
  const badges = [row.flipped ? make("span", "badge bad", "flipped") : "", ...small(row)];
  const sides = row.sides.map((each) => side(`${each.side} · ${each.source}`, each, each.side));
  if (sides.length === 1) sides.push(make("span", "side"));
  return [
    make("span", "side prompt", make("span", "id", make("bdi", "", row.id), row.family ? ` · ${row.family}` : ""), ...badges, text(row.prompt, "text short")),
    ...sides,
    difference(row.gap, "score of chosen minus score of rejected"),
  ];
}

// Values that differ from the usual ones: strength of the label, weight, shift.
function small(row) {
  const usual = { strength: 1, weight: 1, shift: 0 };
  return Object.entries(usual)
    .filter(([name, value]) => row[name] !== value)
    .map(([name]) => make("span", "badge", `${name} ${rounded(row[name], 3)}`));
}

// A link to the same search in another iteration.
function matches([key, many]) {
  const there = new URLSearchParams(state);
  for (const name of ["page", "row"]) there.delete(name);
  there.set("of", key);
  const title = [...find("select[name=of]").options].find((option) => option.value === key).textContent;
  const element = make("a", "link", `${title}: ${many.toLocaleString("en")}`);
  element.href = `?${there}`;
  return element;
}

function showList(found) {
  last = found;
  const held = view() === "held";
  list.className = held ? "held" : "pairs";
  const titles = held ? ["prompt", "human", ...found.titles, "change"] : ["prompt", "chosen", "rejected", "gap"];
  find("#titles").className = `columns ${list.className}`;
  find("#titles").replaceChildren(...titles.map((title) => make("span", "", title)));
  list.replaceChildren(
    ...found.rows.map((row) => {
      const head = make("button", "head columns", ...(held ? heldRow(row) : pairRow(row)));
      head.type = "button";
      head.setAttribute("aria-expanded", "false");
      const item = make("li", "", head);
      item.dataset.row = row.row;
      return item;
    }),
  );
  const noun = held ? "prompts" : "pairs";
  const all = found.of.toLocaleString("en");
  find("#count").textContent = found.total === found.of ? `${all} ${noun}` : `${found.total.toLocaleString("en")} of ${all} ${noun}`;
  const pages = Math.max(1, Math.ceil(found.total / found.size));
  find("#page").textContent = `page ${page()} of ${pages}`;
  find("#previous").disabled = page() <= 1;
  find("#next").disabled = page() >= pages;
  find("#foot").replaceChildren(...(found.total ? [] : ["Nothing matches.", ...(found.elsewhere || []).map(matches)]));
  fillFamilies(found.families);
}

// --- an open row ---------------------------------------------------------------------------------------------------

function conversation(found) {
  const turns = found.messages.map((each) => make("div", "turn", make("span", "label", each.role), text(each.content)));
  return make("div", "conversation", ...turns, found.answer === null ? "" : make("div", "turn", make("span", "label", "right answer"), text(found.answer)));
}

function heldDetail(found) {
  const human = make("div", "turn human", make("span", "label", "human"), text(found.human));
  const several = found.runs.length > 1;
  const tables = found.runs.map((run) => {
    const head = make("tr", "", make("td", ""), ...run.iterations.map((each) => make("th", "", each.iteration === "SFT" ? "SFT" : `iteration ${each.iteration}`)));
    const count = Math.max(...run.iterations.map((each) => each.answers.length));
    const lines = Array.from({ length: count }, (_, number) => {
      const cells = run.iterations.map(({ answers }) => (answers[number] ? make("td", "", facts(answers[number]), text(answers[number].text)) : make("td", "")));
      return make("tr", "", make("th", "", run.iterations[0].answers[number]?.title || `sample ${number}`), ...cells);
    });
    const caption = `${several ? `${run.name} · ` : ""}human response scores ${score(run.human)}`;
    const scroll = make("div", "scroll", make("table", "", make("caption", "", caption), make("thead", "", head), make("tbody", "", ...lines)));
    scroll.tabIndex = 0;
    return scroll;
  });
  return make("div", "detail", conversation(found), human, ...tables, link());
}

function pairDetail(found) {
  const sides = found.sides.map((each) => {
    const sample = each.source === "human" || each.sample === null ? "" : `, sample ${each.sample + 1}`;
    return make("div", `full ${each.side}`, make("span", "label", `${each.side} · ${each.source}${sample}`), facts(each), text(each.text));
  });
  const own = [["strength", found.strength], ["weight", found.weight], ["shift", found.shift], ["made at step", found.step], ["drawn", found.draws]];
  const shown = own.filter(([name, value]) => value || name === "strength" || name === "weight");
  const line = make("div", "facts", found.flipped ? make("span", "badge bad", "flipped") : "", ...shown.map(([name, value]) => make("span", "", `${name} ${rounded(value, 3)}`)));
  const human = found.human === null ? "" : make("div", "turn human", make("span", "label", "human"), text(found.human));
  return make("div", "detail", conversation(found), human, line, make("div", "sides", ...sides), link());
}

function link() {
  const element = make("a", "link", "Link to this row");
  element.href = `?${state}`;
  return element;
}

function close() {
  for (const head of list.querySelectorAll("[aria-expanded=true]")) {
    head.setAttribute("aria-expanded", "false");
    head.parentElement.querySelector(".detail")?.remove();
  }
}

async function open(row) {
  close();
  const item = list.querySelector(`[data-row="${CSS.escape(row)}"]`);
  if (!item) return notify(`Row ${row} is not on this page.`);
  const head = item.querySelector(".head");
  head.setAttribute("aria-expanded", "true");
  const parameters = new URLSearchParams({ view: view(), row, of: state.get("of") || "" });
  const found = await ask(`/row?${parameters}`);
  if (!found || state.get("row") !== String(row) || !item.isConnected) return;
  item.querySelector(".detail")?.remove();
  item.append(view() === "held" ? heldDetail(found) : pairDetail(found));
  if (item.getBoundingClientRect().bottom > innerHeight) item.scrollIntoView({ block: item.offsetHeight < innerHeight ? "nearest" : "start" });
}

function toggle(row) {
  if (state.get("row") === row) {
    state.delete("row");
    close();
  } else {
    state.set("row", row);
    open(row);
  }
  remember();
}

// --- asking --------------------------------------------------------------------------------------------------------

function notify(message) {
  find("#notice").textContent = message;
  find("#notice").hidden = !message;
}

async function ask(address, signal) {
  try {
    const response = await fetch(address, { signal });
    if (response.ok) return await response.json();
    notify(await response.text());
  } catch (error) {
    if (error.name !== "AbortError") notify("No answer: dnpo browse has ended. Start it again, with the same port and runs.");
  }
  return null;
}

async function load() {
  pending.abort();
  pending = new AbortController();
  const asked = new URLSearchParams({ view: view() });
  for (const control of controls()) {
    if (state.get(control.name)) asked.set(control.name, state.get(control.name));
  }
  if (state.get("page")) asked.set("page", state.get("page"));
  document.body.setAttribute("aria-busy", "true");
  const signal = pending.signal;
  const found = await ask(`/rows?${asked}`, signal);
  if (signal.aborted) return;
  document.body.removeAttribute("aria-busy");
  if (!found) return;
  notify(foreign() ? "This link was made for other runs than those shown." : "");
  showList(found);
  performance.mark("rows");
  if (state.get("row")) await open(state.get("row"));
}

const foreign = () => state.get("runs") && state.get("runs") !== document.body.dataset.runs;

function change(replace = false) {
  readControls();
  state.delete("page");
  state.delete("row");
  remember(replace);
  load();
}

function turn(by) {
  const pages = last ? Math.ceil(last.total / last.size) : 1;
  const wanted = Math.min(Math.max(1, page() + by), Math.max(1, pages));
  if (wanted === page()) return;
  put("page", String(wanted), "1");
  state.delete("row");
  remember();
  scrollTo(0, 0);
  load();
}

function look(name) {
  if (name === view()) return;
  state = new URLSearchParams(state.get("q") ? { q: state.get("q") } : {});
  put("view", name, "held");
  fillControls();
  remember();
  load();
}

function step(by) {
  const heads = [...list.querySelectorAll(".head")];
  const at = heads.indexOf(document.activeElement?.closest("li")?.querySelector(".head"));
  heads[Math.min(Math.max(at + by, 0), heads.length - 1)]?.focus();
}

// --- events --------------------------------------------------------------------------------------------------------

document.querySelector("form[role=search]").addEventListener("submit", (event) => event.preventDefault());
document.querySelector("form[role=search]").addEventListener("change", (event) => {
  if (event.target !== search) change();
});
search.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => change(true), 120);
});
list.addEventListener("click", (event) => {
  const head = event.target.closest(".head");
  if (head) toggle(head.parentElement.dataset.row);
});
find("#previous").addEventListener("click", () => turn(-1));
find("#next").addEventListener("click", () => turn(1));
find("#help").addEventListener("click", () => find("#keys").showModal());
for (const button of document.querySelectorAll("nav [data-view]")) {
  button.addEventListener("click", () => look(button.dataset.view));
}

const KEYS = {
  j: () => step(1),
  ArrowDown: () => step(1),
  k: () => step(-1),
  ArrowUp: () => step(-1),
  n: () => turn(1),
  p: () => turn(-1),
  "/": () => search.focus(),
  "?": () => find("#keys").showModal(),
  v: () => document.querySelector("nav [aria-pressed=false]")?.click(),
  Escape: () => state.get("row") && toggle(state.get("row")),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || find("#keys").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") {
      event.preventDefault(); // or the browser would empty the field
      event.target.blur();
    } else if (event.target === search && event.key === "Enter") step(1);
    return;
  }
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

addEventListener("popstate", () => {
  state = new URLSearchParams(location.search);
  fillControls();
  load();
});

find("#filters").open = matchMedia("(min-width: 800px)").matches;
fillControls();
load();
