"use strict";
const run = JSON.parse(document.getElementById("data").textContent);
const shown = {step: 0, slot: null, tint: "push"};     // what the reader looks at

// ------------------------------------------------------------------------------------------------
// Elements. What a model wrote may hold any text, so text only ever becomes a text node: nothing
// here is parsed as HTML.

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") {
      for (const [property, text] of Object.entries(value)) node.style.setProperty(property, text);
    } else if (name.startsWith("on")) {
      node.addEventListener(name.slice(2), value);
    } else {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

function byId(id) { return document.getElementById(id); }

// A text from the run: isolated, so that right-to-left text in it cannot reorder the page's own.
function quoted(text) { return element("bdi", {}, visible(text)); }

// ------------------------------------------------------------------------------------------------
// Numbers and characters

function count(n) { return n.toLocaleString("en"); }

function number(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1000) return count(Math.round(x));
  if (size < 0.0001) return x.toExponential(1).replace("e", " e").replace("-", "−");
  return String(Number(x.toPrecision(3))).replace("-", "−");
}

function signed(x) { return x > 0 ? "+" + number(x) : number(x); }

function share(x) { return x === null ? "–" : number(100 * x) + "%"; }

function probability(p) {
  if (p > 0.9995) return "above 0.999";
  return p < 0.001 ? "below 0.001" : p.toFixed(3);
}

function plural(n, word) { return `${count(n)} ${word}${n === 1 ? "" : "s"}`; }

// Characters without a shape of their own are given one; the joiners inside emoji stay.
const SHAPELESS = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

function visible(text) {
  return text.replace(SHAPELESS, (character) => {
    const code = character.codePointAt(0);
    if (character === "\n") return "↵\n";
    if (character === "\t") return "⇥\t";
    if (code < 32) return String.fromCodePoint(0x2400 + code);     // ␀ and the like
    return "\\u" + code.toString(16).padStart(4, "0");
  });
}

// ------------------------------------------------------------------------------------------------
// Curves

const RL = run.curves.rl;
const PHASES = {
  encode: ["--green", "frames to vision tokens, where they are not cached"],
  rollout: ["--up", "sampling the completions"],
  verify: ["--down", "checking the answers"],
  train: ["--violet", "learning from the groups that were kept"],
};
const PANELS = [                   // `major`: shown on a narrow screen before all are asked for
  {title: "Loss of the supervised stages", log: true, supervised: true, axis: "step", series: [
    {name: "align: learn to see", colour: "--green", points: run.curves.align.loss},
    {name: "cold start: imitate a teacher", colour: "--violet",
      points: run.curves.sft.loss.map(([step, loss]) => [step + run.done.align, loss])}]},
  {title: "Reward and its parts", major: true, series: [
    {name: "reward", colour: "--ink", points: RL.reward},
    {name: "accuracy", colour: "--up", points: RL.accuracy},
    {name: "format", colour: "--down", points: RL.format}]},
  {title: "Accuracy on held-out videos", major: true, dots: true, first: 0, from: 0, to: 1,
    format: share, axis: "RL step (0: after the cold start)",
    about: "Greedy: the most probable token each time, nothing is sampled.",
    series: [
      {name: "right, greedy", colour: "--up", points: heldOut()}]},
  {title: "Length of a completion", from: 0, series: [
    {name: "tokens", colour: "--up", points: RL.length}]},
  {title: "Entropy: how undecided it is", from: 0,
    about: "In nats: 0 is sure of the next token, 0.69 (ln 2) torn between two.", series: [
    {name: "nats per token", colour: "--violet", points: RL.entropy}]},
  {title: "Groups without signal", from: 0, format: share, series: [
    {name: "of the groups", colour: "--down", points: RL.invalid_rate}]},
  {title: "Answers forced or cut off", from: 0, format: share,
    about: "Forced: it thought too long, so its answer was begun for it. Cut off: its tokens ran " +
      "out before its end.", series: [
    {name: "forced", colour: "--grey", points: RL.forced},
    {name: "cut off", colour: "--down", points: RL.truncated}]},
  {title: "Tokens clipped", from: 0, format: share, series: [
    {name: "up far enough", colour: "--up", points: RL.clip_high},
    {name: "down far enough", colour: "--down", points: RL.clip_low}]},
  {title: "Seconds of a step", from: 0, series: Object.entries(PHASES).map(
    ([phase, [colour]]) => ({name: phase, colour, points: RL[phase + "_s"]}))},
];

function heldOut() {
  const before = run.curves.sft.eval_accuracy.map(([, accuracy]) => [0, accuracy]);
  return [...before, ...RL.eval_accuracy];
}

const WIDE = 300;                  // of a picture; the browser scales it
const HIGH = 155;
const LEFT = 44;                   // margins
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;

// What turns a panel's steps and values into places in its picture, and back.
function scales(panel) {
  const points = panel.series.flatMap((series) => series.points);
  const values = points.map(([, value]) => value).filter((value) => value !== null);
  const low = panel.from ?? extreme(Math.min, values);
  let high = panel.to ?? extreme(Math.max, values);
  if (high === low) high = low + 0.1 * Math.max(1, Math.abs(low));         // a flat curve
  const first = panel.first ?? 1;
  const end = panel.supervised ? extreme(Math.max, points.map(([step]) => step)) : run.done.rl;
  const last = Math.max(first + 1, end);
  const bend = panel.log ? (value) => Math.log10(Math.max(value, 1e-9)) : (value) => value;
  const width = WIDE - LEFT - RIGHT;
  const height = HIGH - TOP - BOTTOM;
  return {
    low, high, first, last,
    x: (step) => LEFT + width * (step - first) / (last - first),
    y: (value) => TOP + height * (bend(high) - bend(value)) / (bend(high) - bend(low)),
    step: (x) => first + (last - first) * (x - LEFT) / width,
  };
}

function extreme(choose, numbers) { return numbers.reduce((a, b) => choose(a, b)); }

function ticks({low, high}, log) {
  if (log) return [low, Math.sqrt(low * high), high];
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= 0.99 * rough);
  const all = [];
  for (let n = Math.ceil(low / size - 1e-9); n * size <= high * (1 + 1e-9); n++) all.push(n * size);
  return all;
}

// An SVG path; a value that is null (it was not finite) leaves a gap.
function path(points, scale) {
  let text = "";
  let pen = "M";
  for (const [step, value] of points) {
    if (value === null) {
      pen = "M";
    } else {
      text += `${pen}${scale.x(step).toFixed(1)} ${scale.y(value).toFixed(1)}`;
      pen = "L";
    }
  }
  return text;
}

// A panel as a list of one element, or of none if its curves have no value.
function drawPanel(panel) {
  panel.series = panel.series.filter(({points}) => points.some(([, value]) => value !== null));
  if (!panel.series.length) return [];
  panel.format ??= number;
  const figure = element("figure", {class: `card chart ${panel.major ? "" : "minor"}`},
    element("h3", {}, panel.title));
  const about = panel.about ? [element("figcaption", {}, panel.about)] : [];
  if (panel.series.every(({points}) => finite(points).length === 1)) {
    figure.append(...panel.series.map(singleValue(panel)), ...about);
    return [figure];
  }
  const scale = scales(panel);
  const picture = svg("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img",
    "aria-label": panel.title});
  drawAxes(picture, panel, scale);
  for (const series of panel.series) drawSeries(picture, series, scale, panel.dots);
  const keys = element("div", {class: "keys"});
  answerPointer(picture, panel, scale, keys);
  figure.append(picture, keys, ...about);
  return [figure];
}

function finite(points) { return points.filter(([, value]) => value !== null); }

// One value is no curve: it is told in words.
function singleValue(panel) {
  return ({name, points}) => {
    const [[step, value]] = finite(points);
    const where = panel.supervised ? "" : `, at RL step ${count(step)}`;
    return element("p", {class: "single"}, `One value so far: ${name} `,
      element("b", {}, panel.format(value)), where + ".");
  };
}

// As many charts stand in a row of a wide screen as leave no empty place, if that can be.
function layOut(charts) {
  const holder = byId("charts");
  const across = charts.length < 3 ? 2 : charts.length % 4 === 0 ? 4 : 3;
  holder.style.setProperty("--across", across);
  holder.append(...charts);
  const button = byId("all-charts");
  if (!holder.querySelector(".chart:not(.minor)")) holder.classList.add("all");
  button.hidden = holder.classList.contains("all") || !holder.querySelector(".minor");
  const name = () => {
    const all = holder.classList.contains("all");
    button.textContent = all ? "show fewer curves" : `show all ${charts.length} curves`;
  };
  button.addEventListener("click", () => { holder.classList.toggle("all"); name(); });
  name();
}

function drawAxes(picture, panel, scale) {
  for (const tick of ticks(scale, panel.log)) {
    const y = scale.y(tick);
    picture.append(
      svg("line", {x1: LEFT, x2: WIDE - RIGHT, y1: y, y2: y, stroke: "var(--line)"}),
      svg("text", {x: LEFT - 6, y: y + 4, "text-anchor": "end"}, panel.format(tick)));
  }
  const below = (x, anchor, text) => picture.append(
    svg("text", {x, y: HIGH - 6, "text-anchor": anchor}, text));
  below(LEFT, "start", count(scale.first));
  below((LEFT + WIDE - RIGHT) / 2, "middle", panel.axis ?? "RL step");
  below(WIDE - RIGHT, "end", count(scale.last));
}

function drawSeries(picture, series, scale, dots) {
  const colour = `var(${series.colour})`;
  picture.append(svg("path", {d: path(series.points, scale), fill: "none", stroke: colour,
    "stroke-width": 1.6, "stroke-linejoin": "round"}));
  if (!dots && series.points.length > 1) return;
  for (const [step, value] of series.points) {
    if (value === null) continue;
    picture.append(svg("circle", {cx: scale.x(step), cy: scale.y(value), r: 3.5, fill: colour}));
  }
}

// Pointing at the picture shows the values there, a click chooses the step. `panel.mark` marks the
// chosen step; it is called whenever another one is chosen.
function answerPointer(picture, panel, scale, keys) {
  const upright = (look) => svg("line",
    {y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden", ...look});
  const chosen = upright({stroke: "var(--soft)", "stroke-dasharray": "2 3"});
  const pointer = upright({stroke: "var(--ink)"});
  picture.append(chosen, pointer);
  const ofRL = !panel.supervised && run.steps.length > 0;
  panel.mark = () => {
    const step = ofRL ? run.steps[shown.step].step : scale.last;
    if (ofRL) place(chosen, scale.x(step));
    showKeys(panel, keys, step);
  };
  const stepAt = (event) => {
    const box = picture.getBoundingClientRect();
    const step = scale.step((event.clientX - box.left) * WIDE / box.width);
    return Math.min(scale.last, Math.max(scale.first, step));
  };
  picture.addEventListener("pointermove", (event) => {
    place(pointer, scale.x(showKeys(panel, keys, stepAt(event))));
  });
  picture.addEventListener("pointerleave", () => {
    pointer.setAttribute("visibility", "hidden");
    panel.mark();
  });
  if (!ofRL) return;
  picture.classList.add("click");
  picture.addEventListener("click", (event) => chooseStep(nearestRecorded(stepAt(event))));
}

function place(line, x) {
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
  line.setAttribute("visibility", "visible");
}

// The values nearest to a step, as the legend under the curves. Returns the step of the nearest.
function showKeys(panel, keys, wanted) {
  const found = panel.series.map((series) => nearest(series.points, wanted));
  const at = nearest(found, wanted)[0];
  keys.replaceChildren(...panel.series.map((series, i) => {
    const [step, value] = found[i];                    // of another stage, it has no value here
    return element("span", {}, element("i", {style: {background: `var(${series.colour})`}}),
      series.name + " ", element("b", {}, step === at ? panel.format(value) : ""));
  }), element("span", {}, `at step ${count(at)}`));
  return at;
}

function nearest(points, wanted) {
  return points.reduce((best, point) =>
    Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
}

function nearestRecorded(wanted) {
  const places = run.steps.map((record, place) => [record.step, place]);
  return nearest(places, wanted)[1];
}

// ------------------------------------------------------------------------------------------------
// The chosen step

const TIERS = ["0  hardly ever right", "1  seldom", "2  about half, or not known yet", "3  often",
  "4  nearly always"];
const FATES = {
  "kept": ["✓", "Kept", "their answers differ: trained on"],
  "no signal": ["=", "No signal", "all answers alike: dropped"],
  "cut by balance": ["✂\ufe0e", "Cut by balance",
    "they differ, but enough groups nearer to half right were there"],
  "not graded": ["?", "Not graded", "the answers could not be checked: left out"],
  "dropped": ["✕", "Dropped", "the question cannot be used"],
};

function chooseStep(place) {
  shown.step = Math.min(run.steps.length - 1, Math.max(0, place));
  const record = run.steps[shown.step];
  const slider = byId("slider");
  slider.value = shown.step;
  slider.setAttribute("aria-valuetext", `RL step ${record.step}`);
  byId("chosen").textContent = `RL step ${count(record.step)} of ${count(run.done.rl)}`;
  for (const panel of PANELS) if (panel.mark) panel.mark();
  byId("step-body").replaceChildren(
    sentence(record), element("div", {class: "pair"}, timeCard(record), tierCard(record)),
    ...groupLists(record));
  chooseGroup(record.shown.length ? record.shown[0].slot : null);
}

function sentence(record) {
  const parts = [];
  for (const [fate, [, title]] of Object.entries(FATES)) {
    const n = record.groups.filter((group) => group.fate === fate).length;
    if (n) parts.push(`${count(n)} ${title.toLowerCase()}`);
  }
  if (record.groups_left_out) parts.push(`${count(record.groups_left_out)} not listed here`);
  return element("p", {style: {"margin-top": "14px"}},
    `${plural(record.asked, "question")} asked, to find ${plural(record.wanted, "group")} to ` +
    `learn from: ${parts.join(", ")}.`);
}

function timeCard(record) {
  const card = element("div", {class: "card"}, element("h3", {}, "Where the seconds went"));
  const seconds = Object.entries(PHASES).filter(([phase]) => phase in record.seconds);
  const total = seconds.reduce((sum, [phase]) => sum + record.seconds[phase], 0);
  if (!total) {
    card.append(element("p", {class: "soft"}, "metrics.jsonl does not have them."));
    return card;
  }
  const bar = element("div", {class: "bar"});
  const list = element("dl", {class: "facts"});
  for (const [phase, [colour, about]] of seconds) {
    const part = record.seconds[phase];
    bar.append(element("span", {style: {background: `var(${colour})`, "flex-grow": part}}));
    const share = part < total / 100 ? "under 1%" : `${Math.round(100 * part / total)}%`;
    list.append(element("dt", {}, swatch(colour), phase), element("dd", {},
      `${number(part)} s, ${share}: `, element("span", {class: "soft"}, about)));
  }
  card.append(bar, list, element("p", {class: "small soft"}, `${number(total)} s in all.`));
  return card;
}

function swatch(colour) {
  return element("i", {style: {background: `var(${colour})`, display: "inline-block",
    width: "9px", height: "9px", "border-radius": "2px", "margin-right": "7px"}});
}

function tierCard(record) {
  const first = run.steps[0];
  const changes = record.tiers.map((n, tier) => n - first.tiers[tier]);
  const rows = element("div", {class: "tiers"});
  TIERS.forEach((name, tier) => {
    const change = changes[tier] ? signedCount(changes[tier]) : "";
    rows.append(element("span", {}, name),
      element("span", {class: "number"}, count(record.tiers[tier])),
      element("span", {class: "change"}, change));
  });
  const moved = (sign) => record.groups.filter(({tier}) => sign * (tier[1] - tier[0]) > 0).length;
  return element("div", {class: "card"},
    element("h3", {}, "The curriculum: questions in each tier"), rows,
    element("p", {class: "small soft", style: {margin: "8px 0 0"}},
      `As the step begins. ${tierSentence(record, first, changes)} Of the questions asked in ` +
      `this step, ${count(moved(1))} then moved up and ${count(moved(-1))} down.`));
}

function signedCount(n) { return n === 0 ? "0" : (n > 0 ? "+" : "−") + count(Math.abs(n)); }

function tierSentence(record, first, changes) {
  if (record === first) return "Later steps show what changed since this one.";
  const [lower, upper] = [changes[0] + changes[1], changes[3] + changes[4]].map(signedCount);
  return `Since step ${count(first.step)}: ${lower} in the two tiers that are seldom right, ` +
    `${signedCount(changes[2])} in the middle, ${upper} in the two that are mostly right.`;
}

function groupLists(record) {
  const lists = [element("h3", {}, "The groups of this step"), groupLegend()];
  for (const [fate, [sign, title, about]] of Object.entries(FATES)) {
    const groups = record.groups.filter((group) => group.fate === fate);
    if (!groups.length) continue;
    lists.push(element("h4", {}, `${sign} ${title} (${count(groups.length)}) `,
      element("span", {class: "soft", style: {"font-weight": 400}}, about)));
    lists.push(...chipList(record, groups));
  }
  return lists;
}

const MOST_CHIPS = 60;             // of one fate, before all are asked for

// Those that can be opened come first: they are never among those that are hidden.
function chipList(record, groups) {
  const recorded = (group) => record.shown.some((whole) => whole.slot === group.slot);
  const sorted = [...groups.filter(recorded), ...groups.filter((group) => !recorded(group))];
  const chips = (some) => some.map((group) => chip(record, group, recorded(group)));
  const list = element("div", {class: "chips"}, ...chips(sorted.slice(0, MOST_CHIPS)));
  if (groups.length <= MOST_CHIPS) return [list];
  const button = element("button", {style: {"margin-top": "6px"}, onclick: () => {
    list.append(...chips(sorted.slice(MOST_CHIPS)));
    button.remove();
  }}, `show all ${count(groups.length)}`);
  return [list, button];
}

function groupLegend() {
  return element("div", {class: "legend soft"},
    element("span", {class: "marks"}, element("i", {class: "right"}), "right"),
    element("span", {class: "marks"}, element("i", {class: "partly"}), "partly"),
    element("span", {class: "marks"}, element("i"), "wrong"),
    element("span", {}, "0.5 → 0.61: the estimate of how often it is right, before and after"),
    element("span", {}, "a box with “open” shows the group below, token by token"));
}

// A group in short. Those that the run recorded whole are buttons.
function chip(record, group, recorded) {
  const right = group.accuracies.filter((accuracy) => accuracy === 1).length;
  const [before, after] = group.tier;
  const move = before === after ? `tier ${after}` : `tier ${before} → ${after}`;
  const parts = [
    element("div", {class: "name"}, quoted(group.id),
      group.accuracies.length ? element("b", {}, `${right}/${group.accuracies.length}`) : ""),
    element("div", {class: "marks"}, ...group.accuracies.map((accuracy) =>
      element("i", {class: accuracy === 1 ? "right" : accuracy > 0 ? "partly" : "wrong"}))),
    element("div", {class: "move"},
      `${group.rate[0].toFixed(2)} → ${group.rate[1].toFixed(2)} · ${move}`)];
  if (group.why) parts.push(element("div", {class: "soft"}, quoted(group.why)));
  if (!recorded) return element("div", {class: "chip"}, ...parts);
  parts.push(element("div", {class: "open"}, "open ↓"));
  return element("button", {class: "chip", "data-slot": group.slot, "aria-pressed": "false",
    onclick: () => { chooseGroup(group.slot); byId("group").scrollIntoView(); }}, ...parts);
}

// ------------------------------------------------------------------------------------------------
// The chosen group

function chooseGroup(slot) {
  shown.slot = slot;
  hideTip();
  for (const button of document.querySelectorAll(".chip[data-slot]")) {
    button.setAttribute("aria-pressed", String(button.dataset.slot === String(slot)));
  }
  const record = run.steps[shown.step];
  const whole = record.shown.find((candidate) => candidate.slot === slot);
  byId("group").hidden = !whole;
  if (!whole) return;
  const group = record.groups.find((candidate) => candidate.slot === slot);
  const focus = document.activeElement.dataset.focus;    // of a button that is now drawn again
  byId("group-body").replaceChildren(
    groupTabs(record),
    element("p", {class: "question"}, quoted(whole.question)),
    element("p", {}, "The right (gold) answer: ", element("b", {}, quoted(whole.answer)),
      element("span", {class: "soft"}, " · video ", quoted(whole.video), " · domain ",
        quoted(group.domain))),
    ...frameStrip(whole.frames), ...packedSequence(whole),
    element("p", {style: {"margin-top": "16px"}}, element("b", {},
      `${FATES[group.fate][0]} ${FATES[group.fate][1]}. `), reason(record, group, whole),
    " " + rewardsOf(whole)),
    tokenLegend(whole, record),
    element("div", {class: "completions"}, ...completionCards(whole, record)));
  if (focus) document.querySelector(`[data-focus="${focus}"]`)?.focus();
}

function groupTabs(record) {
  return element("div", {class: "row", style: {margin: "8px 0 12px"}},
    ...record.shown.map(({slot}) => {
      const group = record.groups.find((candidate) => candidate.slot === slot);
      const [sign, title] = FATES[group.fate];
      return element("button", {"aria-pressed": String(slot === shown.slot),
        "data-focus": `group ${slot}`, onclick: () => chooseGroup(slot)},
      `${sign} ${title}: `, quoted(group.id));
    }));
}

// Why the group was trained on or not, in plain words.
function reason(record, group, whole) {
  const all = group.accuracies.length;
  if (group.fate === "kept") {
    const update = whole.update === null ? "" : `, in update ${whole.update + 1} of this step ` +
      "(a step changes the weights in one or more updates, each with groups of its own)";
    return `${verdicts(group)}, so they can be compared. The group was trained on${update}.`;
  }
  if (group.fate === "no signal") {
    const verdict = {0: "wrong", 1: "right"}[group.accuracies[0]] ?? "equally right";
    return `All ${all} answers are ${verdict}, so none is better than another and comparing them ` +
      "teaches nothing. The group was dropped; only the curriculum notes the result.";
  }
  if (group.fate === "cut by balance") {
    return `${verdicts(group)}, so there is a signal. But more groups had one than the ` +
      `${record.wanted} wanted, and those nearest to half right were kept.`;
  }
  return visible(group.why);
}

function verdicts({accuracies}) {
  const right = accuracies.filter((accuracy) => accuracy === 1).length;
  const partly = accuracies.filter((accuracy) => accuracy > 0 && accuracy < 1).length;
  const rest = partly ? `, ${partly} partly` : "";
  return `${right} of ${accuracies.length} answers are right${rest}`;
}

// What the advantages are computed from: the mean and the deviation of the group's rewards.
function rewardsOf(whole) {
  const rewards = whole.completions.map((completion) => completion.reward);
  if (rewards.every((reward) => reward === rewards[0])) {
    return "All rewards are equal: every advantage is 0.";
  }
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  const squares = rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0);
  const deviation = Math.sqrt(squares / (rewards.length - 1));
  const text = `Advantage = (reward − mean) / standard deviation; here the mean is ` +
    `${number(mean)}, the deviation ${number(deviation)}.`;
  if (whole.update !== null) return text;
  const accuracies = whole.completions.map((completion) => completion.accuracy);
  const alike = accuracies.every((accuracy) => accuracy === accuracies[0]);
  return text + (alike ? " The rewards differ only by the form of the answers." : "") +
    " The group was not trained on.";
}

// The video as the model was shown it. All pictures stand side by side in one image.
function frameStrip(frames) {
  if (!frames) return [element("p", {class: "soft"}, "The video could not be read again.")];
  const n = frames.seconds.length;
  const scale = Math.max(1, Math.round(84 / frames.width));        // tiny frames are enlarged
  const figures = frames.seconds.map((seconds, i) => element("figure", {},
    element("div", {class: "frame", role: "img", "aria-label": `frame at ${number(seconds)} s`,
      style: {width: `${scale * frames.width}px`, height: `${scale * frames.height}px`,
        "background-image": `url("${frames.strip}")`, "background-size": `${100 * n}% 100%`,
        "background-position": `${n > 1 ? 100 * i / (n - 1) : 0}% 0`,
        "image-rendering": scale > 1 ? "pixelated" : "auto"}}),
    element("figcaption", {}, `${number(seconds)} s`)));
  let about = `The model was shown ${plural(frames.of, "frame")}`;
  if (n < frames.of) about += `; ${count(n)} of them, evenly spaced, are pictured`;
  return [element("div", {class: "strip", role: "group", "aria-label": "frames"},
    ...figures), element("p", {class: "small soft"}, about + ".")];
}

// [prefix | completion 1 | ... | completion G], to scale.
function packedSequence(whole) {
  const text = whole.prefix - whole.vision;
  const lengths = whole.completions.map((completion) => completion.length);
  const written = lengths.reduce((sum, length) => sum + length, 0);
  const all = whole.prefix + written;
  const g = lengths.length;
  const part = (kind, tokens, words) => element("span", {class: kind,
    title: `${words}: ${plural(tokens, "token")}`, style: {"flex-grow": tokens}},
  60 * tokens / all > words.length ? words : "");      // the words only where they fit
  const parts = [part("vision", whole.vision, "vision tokens"), part("text", text, "question")];
  whole.completions.forEach((completion, i) => {
    const kind = ["worse", "neither", "better"][Math.sign(completion.advantage) + 1];
    parts.push(part(kind, completion.length, `${i + 1}`));
  });
  return [element("div", {class: "packed-names"}, element("b", {}, "prefix"),
    element("b", {}, `${g} completions`)),
  element("div", {class: "packed", role: "img", "aria-label": "the packed sequence"},
    ...parts),
  element("p", {class: "small soft", style: {"margin-top": "6px"}},
    `To scale. The prefix (green) is ${plural(whole.prefix, "token")}: ${count(whole.vision)} ` +
    `vision tokens, encoded once, and ${count(text)} of text. All ${g} completions ` +
    `${whole.completions.some(({advantage}) => advantage) ? SIDES : ""}begin from it, and each ` +
    `sees only the prefix and itself. In one sequence these are ${plural(all, "token")}; one ` +
    `completion at a time they would be ${count(g * whole.prefix + written)}.`)];
}

const SIDES = "(blue: above the mean, orange: below) ";

// ------------------------------------------------------------------------------------------------
// The completions

const TINTS = {                    // what the colour of a token means
  push: {name: "contribution", about: "how strongly the loss pushes it"},
  surprise: {name: "surprise", about: "how unlikely the sampler found it"},
  entropy: {name: "entropy", about: "how undecided the model was there"},
};

// Of a group that was not trained on only the surprise is known.
function tintOf(whole) { return whole.update === null ? "surprise" : shown.tint; }

function tokenLegend(whole, record) {
  const tint = tintOf(whole);
  const trained = whole.update !== null;
  const buttons = Object.entries(TINTS).map(([key, {name}]) => element("button",
    {"aria-pressed": String(key === tint),
      "data-focus": `tint ${key}`,
      onclick: () => { shown.tint = key; chooseGroup(shown.slot); }}, name));
  const example = (kind, style, text) => element("span", {class: "token " + kind, style}, text);
  const examples = {
    push: [example("", {"--tint": "var(--up)", "--strength": "45%"}, "pushed up"),
      example("", {"--tint": "var(--down)", "--strength": "45%"}, "pushed down")],
    surprise: [example("", {"--tint": "var(--violet)", "--strength": "45%"}, "unlikely"), "likely"],
    entropy: [example("", {"--tint": "var(--violet)", "--strength": "45%"}, "undecided"), "sure"],
  };
  const notes = {
    push: " A token contributes advantage × ratio / sampled tokens of its completion. Clipped: " +
      `its ratio is already above ${record.clip[1]} and it is pushed up, or below ` +
      `${record.clip[0]} and pushed down: it gets no gradient.`,
    surprise: trained ? "" :
      " This group was not trained on, so no token was pushed and its entropy is not kept.",
    entropy: " In nats: 0 is sure.",
  };
  const marks = [example("forced", {}, "forced, no loss")];
  if (trained) marks.unshift(example("clipped", {}, "clipped"));
  return element("div", {class: "card"},
    element("div", {class: "legend"}, element("b", {}, trained ? "Colour:" : "Colour: surprise"),
      ...(trained ? buttons : []), ...examples[tint], ...marks,
      element("span", {class: "soft"}, "Point at a token, tap it, or use the arrow keys.")),
    element("p", {class: "small soft", style: {margin: "8px 0 0"}},
      `The colour shows ${TINTS[tint].about}.${notes[tint]}`),
    ...absent(whole, "forced"), ...(trained ? absent(whole, "clipped") : []));
}

// Whether a token that is shown of the group was forced, or clipped.
function has(whole, record, kind) {
  return whole.completions.some((completion) =>
    tokenFacts(completion, record).some((fact) => fact[kind]));
}

const WITH = {};                   // {kind: [[step, its place, slot], ...]} of all recorded groups

function groupsWith(kind) {
  WITH[kind] ??= run.steps.flatMap((record, place) => record.shown
    .filter((whole) => has(whole, record, kind))
    .map(({slot}) => [record.step, place, slot]));
  return WITH[kind];
}

// If no token of the group is of a kind that the page explains: where the nearest one is.
function absent(whole, kind) {
  const record = run.steps[shown.step];
  if (has(whole, record, kind)) return [];
  const parts = [`No token was ${kind} in this group`];
  if (whole.completions.some(({left_out}) => left_out)) parts[0] += ", of those shown";
  if (groupsWith(kind).length) {
    const [step, place, slot] = nearest(groupsWith(kind), record.step);
    const {id} = run.steps[place].groups.find((candidate) => candidate.slot === slot);
    parts.push("; ", element("button", {"data-kind": kind, onclick: () => {
      chooseStep(place);
      chooseGroup(slot);
      byId("group").scrollIntoView();
    }}, `step ${count(step)}, group `, quoted(id), " has one"));
  } else {
    parts.push(". No recorded group has one.");
  }
  return [element("p", {class: "small soft absent"}, ...parts)];
}

function completionCards(whole, record) {
  const facts = whole.completions.map((completion) => tokenFacts(completion, record));
  const tint = tintOf(whole);
  const sizes = facts.flat().map((fact) => Math.abs(fact[tint]));
  const most = sizes.length ? extreme(Math.max, sizes) : 0;        // has the strongest colour
  const colouring = {tint, most};
  return whole.completions.map((completion, i) =>
    completionCard(completion, i, facts[i], colouring));
}

function completionCard(completion, i, tokens, colouring) {
  const verdict = completion.accuracy === 1 ? ["✓ right", "up"] :
    completion.accuracy > 0 ? ["◪ partly right", ""] : ["✗ wrong", "down"];
  const facts = [
    ["answer", completion.predicted === null ? element("i", {}, "none found") :
      quoted(completion.predicted)],
    ["reward", `${number(completion.reward)} (accuracy ${number(completion.accuracy)}, ` +
      `format ${number(completion.format)})`],
    ["advantage", element("b", {class: sideOf(completion.advantage)},
      signed(completion.advantage))],
    ["length", lengthOf(completion)]];
  return element("article", {class: "card completion", "aria-label": `completion ${i + 1}`},
    element("div", {class: "head"}, element("span", {class: "soft"}, `Completion ${i + 1}`),
      element("span", {class: verdict[1]}, verdict[0])),
    factList(facts), tokenText(completion, tokens, colouring));
}

function sideOf(x) { return x > 0 ? "up" : x < 0 ? "down" : ""; }

function lengthOf(completion) {
  let text = plural(completion.length, "token");
  if (completion.forced) text += ", answer forced";
  if (completion.truncated) text += ", cut off (it had no tokens left)";
  return text;
}

function factList(facts) {
  return element("dl", {class: "facts"}, ...facts.flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, value)]));
}

// What the page knows of each token that was kept of a completion. A number that was not finite
// is null. "push" is what the token contributes to the loss, the other way round: above 0 it is
// pushed up.
function tokenFacts(completion, record) {
  const [from, left] = completion.left_out ?? [Infinity, 0];
  const forced = completion.sampled.filter((sampled) => !sampled).length;
  return completion.tokens.map((text, i) => {
    const fact = {text, position: i < from ? i + 1 : i + left + 1, forced: !completion.sampled[i],
      trained: completion.new !== null, logprob: completion.logprobs[i], surprise: 0, entropy: 0,
      push: 0, ratio: null, clipped: false};
    if (fact.forced) return fact;
    fact.surprise = -fact.logprob;
    if (!fact.trained) return fact;
    fact.entropy = completion.entropy[i];
    if (fact.logprob === null || completion.new[i] === null) return fact;
    fact.ratio = Math.exp(completion.new[i] - fact.logprob);
    fact.clipped = isClipped(completion.advantage, fact.ratio, record.clip);
    if (!fact.clipped) {
      fact.push = completion.advantage * fact.ratio / (completion.length - forced);
    }
    return fact;
  });
}

function isClipped(advantage, ratio, [low, high]) {
  return (advantage > 0 && ratio > high) || (advantage < 0 && ratio < low);
}

function tokenText(completion, facts, colouring) {
  const text = element("div", {class: "tokens", dir: "ltr"});
  const spans = facts.map((fact, i) => tokenSpan(fact, i, colouring));
  spans.forEach((span, i) => {
    if (completion.left_out && completion.left_out[0] === i) text.append(leftOut(completion));
    text.append(span);
    const last = !(facts[i + 1] && facts[i + 1].forced);
    if (facts[i].forced && last) text.append(element("span", {class: "label"}, "no loss"));
  });
  listen(text, spans, facts, completion);
  return text;
}

function leftOut(completion) {
  const words = ` … ${plural(completion.left_out[1], "token")} not kept … `;
  return element("span", {class: "gap"}, words);
}

const WEAKEST = 22;                // percent of colour in a token that is pushed at all
const STRONGEST = 55;

function strengthOf(fact, {tint, most}) {
  const size = Math.abs(fact[tint]);
  if (size === 0) return 0;
  const least = tint === "push" ? WEAKEST : 0;           // the sign of a push must be seen
  return Math.round(least + (STRONGEST - least) * Math.sqrt(size / most));
}

function tokenSpan(fact, i, colouring) {
  let colour = "--violet";
  if (colouring.tint === "push") colour = fact.push < 0 ? "--down" : "--up";
  const span = element("span", {class: "token", dir: "auto", tabindex: i ? -1 : 0, "data-token": i,
    style: {"--tint": `var(${colour})`, "--strength": `${strengthOf(fact, colouring)}%`}});
  span.classList.toggle("forced", fact.forced);
  span.classList.toggle("clipped", fact.clipped);
  span.classList.toggle("unbroken", /^<[\w|/]{1,24}>$/.test(fact.text));    // <|im_end|>
  // Ends of lines and white space alone are drawn faintly; "" is a part of the next character.
  if (fact.text === "") {
    span.append(element("span", {class: "mark"}, "◦"));
  } else if (/^ +$/.test(fact.text)) {
    span.append(element("span", {class: "mark"}, "␣".repeat(fact.text.length)));
  } else {
    for (const part of visible(fact.text).split(/(↵|⇥)/)) {
      span.append(part === "↵" || part === "⇥" ? element("span", {class: "mark"}, part) : part);
    }
  }
  return span;
}

// One listener for a whole completion. Tab reaches its first token, the arrow keys the others.
function listen(text, spans, facts, completion) {
  const tokenOf = (event) => event.target.closest(".token[data-token]");
  const show = (event) => {
    const span = tokenOf(event);
    if (span) showTip(span, facts[span.dataset.token], completion);
  };
  text.addEventListener("pointerover", show);
  text.addEventListener("focusin", show);
  text.addEventListener("click", show);
  text.addEventListener("pointerleave", hideTip);
  text.addEventListener("focusout", hideTip);
  text.addEventListener("keydown", (event) => {
    const span = tokenOf(event);
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === "Escape") hideTip();
    if (!span || !move) return;
    event.preventDefault();
    const to = spans[Number(span.dataset.token) + move];
    if (!to) return;
    span.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}

function showTip(span, fact, completion) {
  const name = fact.text === "" ? "(part of the next character)" : JSON.stringify(fact.text);
  const tip = byId("tip");
  tip.replaceChildren(element("b", {class: "mono"}, quoted(name)), element("span", {class: "soft"},
    `  token ${count(fact.position)} of ${count(completion.length)}`), factList(tipFacts(fact)));
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth - size.width - 8;
  const below = box.bottom + 8;
  const above = Math.max(8, box.top - size.height - 8);
  tip.style.left = `${Math.min(Math.max(8, box.left), right)}px`;
  tip.style.top = `${below + size.height < window.innerHeight ? below : above}px`;
}

function tipFacts(fact) {
  if (fact.forced) return [["forced", "written for the model, which did not choose it: no loss"]];
  const known = fact.logprob !== null;
  const facts = [["probability", known ? `${probability(Math.exp(fact.logprob))}, when it was ` +
    "sampled" : "not a number"]];
  if (!fact.trained) return [...facts, ["contribution", "0: the group was not trained on"]];
  facts.push(["entropy", `${number(fact.entropy)} nats (0: sure)`]);
  if (fact.ratio === null) return [...facts, ["ratio", "not a number"]];
  const clipped = fact.clipped ? "clipped" : "not clipped";
  return [...facts,
    ["ratio", `${fact.ratio.toFixed(3)}, ${clipped}: its probability in training, divided by that`],
    ["contribution", fact.clipped ? "0: clipped, no gradient" : signed(fact.push)]];
}

function hideTip() { byId("tip").hidden = true; }

// ------------------------------------------------------------------------------------------------
// The page

function resultSentence() {
  const {align, sft, rl} = run.done;
  const parts = [];
  if (align) parts.push(`${plural(align, "step")} of learning to see (align)`);
  if (sft) parts.push(`${plural(sft, "step")} of imitating a teacher (cold start)`);
  if (rl) parts.push(`${plural(rl, "step")} of reinforcement learning (RL)`);
  const measured = heldOut();
  let text = `So far: ${parts.join(", ") || "no step"}.`;
  if (measured.length > 1) {
    text += ` On held-out videos ${share(measured[0][1])} of the answers were right at first, ` +
      `and ${share(measured.at(-1)[1])} at the end.`;
  }
  return text;
}

function problems() {
  const lines = run.cut_short.map((name) => `The last line of ${name} is incomplete and was left ` +
    "out: the run was stopped, or is still writing.");
  if (!run.steps.length) {
    lines.push(run.done.rl ? "This run kept no rollouts (rollouts.jsonl): there are only curves." :
      "This run has no RL step yet: there are only curves.");
  }
  return lines.join(" ");
}

// What the words at the top say of this run.
function explain() {
  const groups = run.steps.flatMap((record) => record.shown);
  if (groups.length) byId("group-size").textContent = count(groups[0].completions.length);
  if (!run.steps.length) return;
  const [low, high] = run.steps.at(-1).clip;
  byId("clip-words").textContent = `already above ${high} and pushed up, or below ${low} and ` +
    "pushed down";
}

function switchTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.style.colorScheme || (dark ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
}

function start() {
  byId("theme").addEventListener("click", switchTheme);
  byId("result").textContent = resultSentence();
  byId("problem").textContent = problems();
  byId("problem").hidden = !problems();
  explain();
  layOut(PANELS.flatMap(drawPanel));
  byId("click-hint").hidden = !run.steps.length;
  if (!run.steps.length) {
    for (const panel of PANELS) if (panel.mark) panel.mark();
    return;
  }
  byId("step").hidden = false;
  byId("slider").max = run.steps.length - 1;
  byId("slider").addEventListener("input", (event) => chooseStep(Number(event.target.value)));
  byId("earlier").addEventListener("click", () => chooseStep(shown.step - 1));
  byId("later").addEventListener("click", () => chooseStep(shown.step + 1));
  document.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const own = event.target.closest("input, .tokens");    // they use the keys themselves
    if (move && !own) chooseStep(shown.step + move);
  });
  chooseStep(run.steps.length - 1);
}

start();
