// The controls. What is chosen stands in the address, so that a view survives a refresh and can be passed on.

const SOURCES = { "held-out": "held-out prompts", rollout: "rollouts of training" };
const WHENS = { both: "before and after", before: "before", after: "after" };

function remember() {
  const kept = Object.entries({ ...state, theme: document.documentElement.dataset.theme ?? "" }).filter(([, value]) => value !== "" && value !== null && value !== false);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const known = { source: SOURCES, when: WHENS, color: Object.fromEntries(colors.map((name) => [name])), sort: SORTS };
  for (const [name, values] of Object.entries(known)) if (Object.hasOwn(values, kept.get(name) ?? "")) state[name] = kept.get(name);
  if (iterations[kept.get("step")] !== undefined && kept.has("step")) state.step = Number(kept.get("step"));
  state.search = kept.get("search") ?? "";
  state.numbers = kept.has("numbers");
  state.fixed = kept.has("fixed");
  state.at = kept.get("at");
}

function recallTheme() {
  const theme = new URLSearchParams(location.hash.slice(1)).get("theme");
  if (["light", "dark"].includes(theme)) document.documentElement.dataset.theme = theme;
}

function radios(holder, name, choices, change) {
  for (const [value, label] of Object.entries(choices)) {
    const input = el("input", { type: "radio", name, value });
    input.checked = state[name] === value;
    input.addEventListener("change", () => change(value));
    holder.append(el("label", {}, input, ` ${label}`));
  }
}

function options(select, name, choices) {
  for (const [value, label] of choices) select.append(el("option", { value }, label));
  select.value = state[name];
  select.addEventListener("change", () => set({ [name]: select.value }));
}

// Change what is chosen, and draw what depends on it.
function set(changes) {
  Object.assign(state, changes);
  $("when-rollout").hidden = state.source !== "rollout";
  $("when-held-out").hidden = state.source !== "held-out";
  $("step-name").textContent = `${iterations[state.step] ?? "–"} of ${data.iterations}`;
  $("step").setAttribute("aria-valuetext", `${data.unit} ${iterations[state.step]}`);
  if (Object.keys(changes).every((name) => ["color", "numbers", "fixed"].includes(name))) repaint();
  else drawResponses();
  remember();
}

function available() {
  if (!moments.after.length) {
    delete WHENS.both;
    delete WHENS.after;
    state.when = "before";
  }
  if (!iterations.length || !heldOut.length) delete SOURCES[iterations.length ? "held-out" : "rollout"];
  if (!(state.source in SOURCES) || (!moments.after.length && iterations.length)) [state.source] = iterations.length ? ["rollout"] : Object.keys(SOURCES);
  if (!records.some((record) => record.gold !== null && record.score !== null)) delete SORTS.apart;
  if (!records.some((record) => record.kl !== null)) delete SORTS.kl;
  if (!colors.includes("advantage")) delete SORTS.advantage;
  if (!records.some((record) => record.score !== null)) for (const name of ["low", "high"]) delete SORTS[name];
}

// Arrow keys go along a response, and up and down to the next.
function walk(event) {
  const token = event.target.closest(".own");
  if (!token) return;
  const own = [...token.parentElement.querySelectorAll(".own")], at = own.indexOf(token);
  const texts = [...document.querySelectorAll(".text")], line = texts.indexOf(token.parentElement);
  const beside = (text) => {
    const others = text?.querySelectorAll(".own") ?? [];
    return others[Math.min(at, others.length - 1)];
  };
  const next = { ArrowRight: own[at + 1], ArrowLeft: own[at - 1], Home: own[0], End: own.at(-1), ArrowDown: beside(texts[line + 1]), ArrowUp: beside(texts[line - 1]) };
  if (!(event.key in next)) return;
  event.preventDefault();
  const to = next[event.key];
  if (!to) return;
  for (const other of to.parentElement.querySelectorAll(".own")) other.tabIndex = other === to ? 0 : -1;
  to.focus();
}

function listen() {
  const responses = $("responses");
  const look = (event) => {
    const token = event.target.closest?.(".own");
    if (token) select(token);
  };
  responses.addEventListener("pointerover", look);
  responses.addEventListener("focusin", look);
  responses.addEventListener("click", (event) => event.target.closest(".own")?.focus());
  responses.addEventListener("keydown", walk);
  $("step").addEventListener("input", () => set({ step: Number($("step").value) }));
  $("search").addEventListener("input", () => set({ search: $("search").value }));
  for (const name of ["numbers", "fixed"]) $(name).addEventListener("change", () => set({ [name]: $(name).checked }));
}

function drawTokens() {
  if (!records.length || !colors.length) return;
  $("tokens").hidden = false;
  available();
  recall();
  radios($("source"), "source", SOURCES, (source) => set({ source }));
  radios($("when-held-out"), "when", WHENS, (when) => set({ when }));
  options($("color"), "color", colors.map((name) => [name, QUANTITIES[name][0]]));
  options($("sort"), "sort", Object.entries(SORTS).map(([name, [label]]) => [name, label]));
  $("step").max = Math.max(iterations.length - 1, 0);
  $("step").value = state.step;
  $("search").value = state.search;
  for (const name of ["numbers", "fixed"]) $(name).checked = state[name];
  $("detail").append(el("p", { class: "dim" }, "Point at a token, or go to one by keyboard: its numbers appear here."));
  listen();
  const [record, token] = (state.at ?? "").split(".");
  set({ source: state.source });
  const before = document.querySelector(`.own[data-record="${Number(record)}"][data-token="${Number(token)}"]`);
  if (before) select(before);
}

function switchTheme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  remember();
}

// A page of a run that goes on shows its next state.
function refresh() {
  let waiting = setTimeout(() => location.reload(), 1000 * data.refresh);
  $("pause").addEventListener("click", () => {
    const paused = $("pause").getAttribute("aria-pressed") === "true";
    clearTimeout(waiting);
    if (paused) waiting = setTimeout(() => location.reload(), 1000 * data.refresh);
    $("pause").setAttribute("aria-pressed", String(!paused));
  });
}

recallTheme();
drawTokens();
drawCharts();
$("theme").addEventListener("click", switchTheme);
if (data.refresh) refresh();
document.documentElement.dataset.drawn = String(Math.round(performance.now())); // milliseconds, for whoever measures
