// Responses token by token: what is chosen, how it is colored, and the numbers of one token.

// Number: [label, what it is, whether its sign matters]
const QUANTITIES = {
  advantage: ["advantage A_t", "before whitening", true],
  td_error: ["TD error δ_t", "r̃_t + γ V(s_t+1) − V(s_t)", true],
  value: ["value V(s_t)", "of the state before the token", false],
  reward: ["reward r̃_t", "what the learner optimizes", true],
  score: ["score part", "of the reward", true],
  penalty: ["penalty β·KL_t", "taken from the reward", true],
  log_prob: ["log π(a_t|s_t)", "of the policy that wrote it", false],
  reference_log_prob: ["log π_ref(a_t|s_t)", "of the reference", false],
  entropy: ["entropy", "of π(·|s_t), in nats", false],
};

const least = (values) => Math.min(...values.filter((value) => value !== null));
const SORTS = {
  order: ["as drawn", (record) => record.row, null],
  advantage: ["worst advantage", (record) => least(record.numbers.advantage ?? [null]), (record) => `lowest A_t ${short(least(record.numbers.advantage), true)}`],
  kl: ["highest KL", (record) => -record.kl, null],
  apart: ["score and gold apart", (record) => -Math.abs(record.apart), (record) => `score ${record.apart > 0 ? "above" : "below"} gold by ${short(Math.abs(record.apart))} std`],
  low: ["lowest score", (record) => record.score, null],
  high: ["highest score", (record) => -record.score, null],
  long: ["longest", (record) => -record.own.length, null],
};

const records = data.records.map((record, index) => ({ ...record, index, own: record.generated.flatMap((own, at) => (own ? [at] : [])) }));
const colors = Object.keys(QUANTITIES).filter((name) => records.some((record) => name in record.numbers));
const iterations = [...new Set(records.filter((record) => record.source === "rollout").map((record) => record.iteration))].sort((a, b) => a - b);
const heldOut = records.filter((record) => record.source === "held-out");
const moments = { before: heldOut.filter((record) => record.iteration === 0), after: heldOut.filter((record) => record.iteration > 0) };

const state = { source: "held-out", step: Math.max(iterations.length - 1, 0), when: "both", color: colors[0], sort: "order", search: "", numbers: false, fixed: false, at: null };

// How far score and gold are apart, in standard deviations of each among the records.
function measureApart(some) {
  const rated = some.filter((record) => record.gold !== null && record.score !== null);
  const raw = (record) => record.raw_score ?? record.score, gold = (record) => record.gold;
  const [a, b] = [raw, gold].map((of) => standard(rated.map(of)));
  for (const record of rated) record.apart = a(raw(record)) - b(gold(record));
}

function standard(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length) || 1;
  return (value) => (value - mean) / deviation;
}

// The range of colors of a quantity over some records, without the outermost 2%, which would leave the rest pale.
function scaleOf(name, some) {
  const values = some.flatMap((record) => record.numbers[name] ?? []).filter((value) => value !== null);
  if (QUANTITIES[name][2]) {
    const sizes = values.map(Math.abs).filter((size) => size > 1e-6).sort((a, b) => a - b);
    return { signed: true, high: sizes[Math.floor(0.98 * (sizes.length - 1))] ?? 1 };
  }
  values.sort((a, b) => a - b);
  const [low, high] = [0.02, 0.98].map((share) => values[Math.round(share * (values.length - 1))] ?? 0);
  return { signed: false, low, high: high > low ? high : low + 1 };
}

// Share of full color, and its side.
function shade(value, scale) {
  if (value === null || value === undefined) return { much: 0, side: "" };
  const share = scale.signed ? Math.abs(value) / scale.high : (value - scale.low) / (scale.high - scale.low);
  return { much: Math.min(1, Math.max(0, share)), side: scale.signed ? (value < 0 ? "minus" : "plus") : "" };
}

function paint(token, value, scale) {
  const { much, side } = shade(value, scale);
  const level = much < 0.02 ? 0 : Math.ceil(much * 4);
  for (const old of ["signed", "plain", "minus", "plus", "level-0", "level-1", "level-2", "level-3", "level-4"]) token.classList.remove(old);
  token.classList.add(scale.signed ? "signed" : "plain", `level-${level}`);
  if (side) token.classList.add(side);
  token.style.setProperty("--much", much.toFixed(3));
  token.dataset.short = short(value, scale.signed);
  token.querySelector("small").textContent = token.dataset.short;
}

function textOf(record) {
  const box = el("p", { class: "text", role: "listbox", "aria-orientation": "horizontal", "aria-label": `response ${record.row + 1}, ${record.own.length} tokens; arrow keys move between them` });
  let written = 0;
  record.ids.forEach((id, at) => {
    const [text, special] = data.vocabulary[id], kind = special ? " special" : "";
    if (!record.generated[at]) {
      box.append(el("bdi", { class: `given${kind}`, role: "presentation" }, visible(text)));
      return;
    }
    const token = el("bdi", { class: `own${kind}`, role: "option", tabindex: written ? -1 : 0, "aria-selected": "false", "data-record": record.index, "data-token": written }, visible(text), el("small"));
    box.append(token);
    written += 1;
  });
  return box;
}

function chip(name, value) {
  return el("span", {}, `${name} `, el("b", {}, value));
}

function cardBody(record, why) {
  const chips = el("div", { class: "chips" }, el("span", {}, `#${record.row + 1}`));
  if (record.score !== null) chips.append(chip("score", short(record.score, true)));
  if (record.raw_score !== null) chips.append(chip("raw", short(record.raw_score, true)));
  if (record.gold !== null) chips.append(chip("gold", short(record.gold, true)));
  if (record.kl !== null) chips.append(chip("KL", short(record.kl)));
  chips.append(chip("tokens", String(record.own.length)), el("span", {}, record.finish === "stop" ? "stopped" : "cut at the budget"));
  if (why) chips.append(el("span", { class: "why" }, why));
  return [chips, textOf(record)];
}

// The records that the controls choose, in order: each a list of those that stand side by side.
function chosen() {
  const both = state.source === "held-out" && state.when === "both";
  const some = state.source === "rollout" ? records.filter((record) => record.source === "rollout" && record.iteration === iterations[state.step]) : both ? moments.after : moments[state.when];
  measureApart(some);
  const words = state.search.toLowerCase();
  const holds = (record) => !words || wholeText(record).toLowerCase().includes(words);
  const [, key] = SORTS[state.sort];
  const groups = some.map((record) => (both ? [moments.before.find((other) => other.row === record.row), record].filter(Boolean) : [record]));
  const shown = groups.filter((group) => group.some(holds)).sort((a, b) => key(a.at(-1)) - key(b.at(-1)) || a[0].row - b[0].row);
  return { shown, total: some.length };
}

const wholeText = (record) => record.ids.map((id) => data.vocabulary[id][0]).join("");

function drawResponses() {
  const { shown, total } = chosen(), why = SORTS[state.sort][2];
  const cards = shown.map((group) => {
    if (group.length === 1) return el("article", { class: "card" }, ...cardBody(group[0], why?.(group[0])));
    const sides = group.map((record, at) => el("div", { class: "side" }, el("h4", {}, at ? "after" : "before"), ...cardBody(record, at ? why?.(record) : null)));
    return el("article", { class: "card pair" }, ...sides);
  });
  $("responses").replaceChildren(...cards);
  $("count").textContent = `${shown.length} of ${total} responses.`;
  repaint();
}

function repaint() {
  const tokens = [...document.querySelectorAll(".own")];
  const seen = [...new Set(tokens.map((token) => records[token.dataset.record]))];
  const scale = scaleOf(state.color, state.fixed ? records : seen), [label, , signed] = QUANTITIES[state.color];
  for (const token of tokens) {
    paint(token, records[token.dataset.record].numbers[state.color]?.[token.dataset.token], scale);
  }
  $("responses").classList.toggle("with-numbers", state.numbers);
  $("legend").replaceChildren(
    el("span", {}, label, " ", short(signed ? -scale.high : scale.low, signed), el("span", { class: `bar ${signed ? "signed" : "plain"}` }), short(scale.high, signed)),
    el("span", {}, signed ? "The underline is as thick as the number is large, and dashed below zero." : "The underline is as thick as the number is high."),
  );
  const active = document.querySelector(".own.active");
  if (active) detail(active);
}

function select(token) {
  for (const old of document.querySelectorAll(".own.active")) {
    old.classList.remove("active");
    old.setAttribute("aria-selected", "false");
  }
  token.classList.add("active");
  token.setAttribute("aria-selected", "true");
  state.at = `${token.dataset.record}.${token.dataset.token}`;
  detail(token);
  remember();
}

// The numbers of one token.
function detail(token) {
  const record = records[token.dataset.record], at = Number(token.dataset.token), id = record.ids[record.own[at]];
  const name = data.vocabulary[id][0];
  token.setAttribute("aria-label", `${visible(name)}, ${QUANTITIES[state.color][0]} ${full(record.numbers[state.color]?.[at])}`);
  const rows = colors.filter((number) => number in record.numbers).map((number) =>
    el("tr", { class: number === state.color ? "chosen" : "", title: QUANTITIES[number][1] }, el("th", { scope: "row" }, QUANTITIES[number][0]), el("td", { "data-number": number }, full(record.numbers[number][at]))));
  const place = `token ${at + 1} of ${record.own.length} · id ${id} · response ${record.row + 1}`;
  $("detail").replaceChildren(
    el("h3", {}, el("bdi", {}, visible(name).replaceAll(" ", "␣"))),
    el("p", { class: "dim" }, place),
    el("table", {}, el("tbody", {}, ...rows)),
    strip(record, at),
    el("p", { class: "dim more" }, `${QUANTITIES[state.color][0]}: ${QUANTITIES[state.color][1]}. Above: along the response.`),
  );
}

// Bars of the chosen quantity along a response.
function strip(record, here) {
  const values = record.numbers[state.color] ?? [], width = 280, height = 70;
  const low = Math.min(0, ...values), high = Math.max(0, ...values), size = high - low || 1;
  const y = (value) => 3 + ((high - value) / size) * (height - 6), each = width / values.length;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  values.forEach((value, at) => {
    const top = Math.min(y(value ?? 0), y(0)), tall = Math.max(Math.abs(y(value ?? 0) - y(0)), 0.7);
    picture.append(svg("rect", { class: at === here ? "here" : "", x: at * each, y: top, width: Math.max(each - 0.8, 0.4), height: tall }));
  });
  return picture;
}
