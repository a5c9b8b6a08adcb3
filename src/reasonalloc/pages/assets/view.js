// What the page shows, and where it stands: a round, one head or all of them, the token under the pointer.
let data, rounds, layers, heads, perHead, gone, born, held, spans = [];
let round = 0, chosen = null, pointed = null, playing = null;
const LEFT = 48, TOP = 6, BOTTOM = 32, RIGHT = 14;
const LABEL = 34; // width of a label of the time axis
const OWN = 0.55; // the colour of what the chosen head holds

// Arrays count from 1, and 0 stands for a layer that has not routed yet.
const at = (numbers, r, layer, head) => numbers[(r * layers + layer) * heads + head] - 1;

function prepare() {
  [rounds, layers, heads] = data.kept.shape;
  perHead = data.recordsTokens ? data.lived.shape[2] : 0;
  if (!data.recordsTokens) return;
  // gone[head * perHead + token]: the round that evicted the token; as many as there are rounds: it never was.
  const never = data.lived.BYTES_PER_ELEMENT === 1 ? 255 : 65535;
  born = new Uint32Array(perHead);
  for (let token = 0, r = 0; token < perHead; token++) {
    while (data.seen[r] <= token) r++;
    born[token] = r;
  }
  gone = new Uint16Array(layers * heads * perHead);
  // held[r * perHead + token]: how many heads hold the token after round r.
  held = new Uint16Array(rounds * perHead);
  const ends = new Uint16Array((rounds + 1) * perHead);
  for (let head = 0; head < layers * heads; head++) {
    for (let token = 0; token < perHead; token++) {
      const i = head * perHead + token;
      gone[i] = data.lived[i] === never ? rounds : born[token] + data.lived[i];
      ends[gone[i] * perHead + token]++;
    }
  }
  for (let token = 0; token < perHead; token++) {
    let left = layers * heads;
    for (let r = 0; r < rounds; r++) {
      left -= ends[r * perHead + token];
      held[r * perHead + token] = left;
    }
  }
}

const routed = (r, layer) => at(data.budgets, r, layer, 0) >= 0;
const holders = (token) => (token < perHead ? held[round * perHead + token] : layers * heads);
const isHeld = (layer, head, token) => gone[(layer * heads + head) * perHead + token] > round;

// ---- the two maps ----

const rowHeight = () => Math.max(4, Math.min(30, Math.floor(270 / layers)));
const mapWidth = () => Math.min(296, window.innerWidth - 108); // of a phone's screen, what the frame leaves
const cellWidth = () => Math.max(5, Math.min(44, Math.floor(mapWidth() / heads)));
const columnWidth = () => mapWidth() / rounds;
let most = 1, mostMean = 1, means = [];

function measure() {
  for (const kept of data.kept) most = Math.max(most, kept - 1);
  for (let r = 0; r < rounds; r++) {
    for (let layer = 0; layer < layers; layer++) {
      let sum = 0;
      for (let head = 0; head < heads; head++) sum += at(data.kept, r, layer, head);
      means.push(sum / heads);
      mostMean = Math.max(mostMean, sum / heads);
    }
  }
}

// Rounds that the time axis names: the last one, and others as far as there is room.
function labelledRounds() {
  const every = Math.ceil(LABEL / columnWidth()), found = [];
  for (let r = rounds - 1; r >= 0; r -= every) found.unshift(r);
  return found;
}

function labelLayers(pen) {
  pen.fillStyle = styleValue("--soft");
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil(14 / rowHeight());
  for (let layer = 0; layer < layers; layer += every) {
    pen.fillText(`${layer ? "" : "layer "}${layer}`, LEFT - 6, TOP + (layer + 0.5) * rowHeight());
  }
}

function drawHeads() {
  const width = cellWidth(), height = rowHeight(), left = LEFT;
  const pen = sized(element("heads"), left + heads * width + 4, TOP + layers * height + BOTTOM);
  labelLayers(pen);
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const kept = at(data.kept, round, layer, head), x = left + head * width, y = TOP + layer * height;
      pen.fillStyle = kept < 0 ? styleValue("--none") : colour(kept / most);
      pen.fillRect(x, y, width - 1, height - 1);
      if (pointed !== null && pointed < data.seen[round] && isHeld(layer, head, pointed)) {
        pen.fillStyle = kept < 0 ? styleValue("--ink") : inkOn(kept / most);
        pen.beginPath();
        pen.arc(x + width / 2 - 0.5, y + height / 2 - 0.5, Math.min(width, height) / 6 + 0.8, 0, 7);
        pen.fill();
      } else if (pointed === null && width >= 30 && height >= 14 && kept >= 0) {
        pen.fillStyle = inkOn(kept / most);
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.fillText(kept, x + width / 2, y + height / 2);
      }
      if (chosen && chosen[0] === layer && chosen[1] === head) {
        pen.strokeStyle = styleValue("--lost");
        pen.lineWidth = 2;
        pen.strokeRect(x, y, width - 1, height - 1);
      }
    }
  }
  pen.fillStyle = styleValue("--soft");
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const every = Math.ceil(20 / width);
  for (let head = 0; head < heads; head += every) pen.fillText(head, left + (head + 0.5) * width, TOP + layers * height + 3);
  pen.fillText("head", left + (heads * width) / 2, TOP + layers * height + 16);
}

function drawLayers() {
  const height = rowHeight(), left = LEFT, width = columnWidth();
  const pen = sized(element("layers"), left + rounds * width + RIGHT, TOP + layers * height + BOTTOM);
  labelLayers(pen);
  for (let r = 0; r < rounds; r++) {
    for (let layer = 0; layer < layers; layer++) {
      const mean = means[r * layers + layer];
      pen.fillStyle = mean < 0 ? styleValue("--none") : colour(mean / mostMean);
      pen.fillRect(left + r * width, TOP + layer * height, Math.ceil(width) - (width > 6 ? 1 : 0), height - 1);
    }
  }
  pen.strokeStyle = styleValue("--lost");
  pen.lineWidth = 1.5;
  pen.strokeRect(left + round * width - 1, TOP - 2, Math.max(width + 1, 3), layers * height + 3);
  pen.fillStyle = styleValue("--soft");
  pen.textBaseline = "top";
  pen.textAlign = "center";
  for (const r of labelledRounds()) {
    const middle = left + (r + 0.5) * width;
    pen.fillRect(middle, TOP + layers * height + 1, 1, 3);
    pen.fillText(data.seen[r], middle, TOP + layers * height + 5);
  }
  pen.fillText("tokens read", left + (rounds * width) / 2, TOP + layers * height + 18);
}

const layerAt = (event) => Math.floor((event.offsetY - TOP) / rowHeight());

function cellAt(event) {
  const head = Math.floor((event.offsetX - LEFT) / cellWidth()), layer = layerAt(event);
  return head >= 0 && head < heads && layer >= 0 && layer < layers ? [layer, head] : null;
}

function roundAt(event) {
  const r = Math.floor((event.offsetX - LEFT) / columnWidth());
  return r >= 0 && r < rounds ? r : null;
}

function describeHead([layer, head]) {
  const lines = [`layer ${layer}, head ${head}`];
  const kept = at(data.kept, round, layer, head), threshold = data.threshold[round][layer];
  if (routed(round, layer)) {
    lines.push(`budget: ${at(data.budgets, round, layer, head)} tokens`);
    lines.push(`held: ${kept} after the round`, `held before its last eviction: ${at(data.before, round, layer, head)}`);
    if (threshold !== null) lines.push(`score that a token of the layer needed: ${threshold}`);
  } else {
    lines.push("nothing evicted yet", kept < 0 ? "held: all tokens read" : `held: ${kept}`);
  }
  return lines.join("\n");
}

// ---- the text ----

// What is said of tokens that the model had not read at this round.
const laterWords = () => (round === rounds - 1 ? "written after the last round" : "not read yet at this round");

function describeToken(token) {
  const name = data.pieces ? quoted(data.pieces[token]) : "token";
  const lines = [`${name} at position ${token}${data.pieces && token < data.prompt ? " (prompt)" : ""}`];
  if (token >= data.seen[round]) return [...lines, laterWords()].join("\n");
  const all = layers * heads, count = holders(token);
  lines.push(`held by ${count} of ${all} heads (${percent(count / all)})`);
  if (chosen) lines.push(`layer ${chosen[0]}, head ${chosen[1]}: ${fate(token)}`);
  const score = data.scores[round * perHead + token];
  lines.push(score === 255 ? "score: not ranked in this round" : `score: ${score} % (0: the worst of its head, 100: the best)`);
  if (!count) {
    let r = 0;
    while (held[r * perHead + token]) r++;
    lines.push(`the last head let go of it in round ${r + 1}`);
  }
  return lines.join("\n");
}

function fate(token) {
  const r = gone[(chosen[0] * heads + chosen[1]) * perHead + token];
  return r >= rounds ? "held to the end" : `evicted in round ${r + 1}`;
}

function drawText() {
  const all = layers * heads;
  spans.forEach((span, token) => {
    const isRead = token < data.seen[round];
    const count = isRead ? holders(token) : 0;
    const isOwn = !chosen || (count && isHeld(...chosen, token));
    span.className = !isRead ? "later" : !count ? "lost" : !isOwn ? "gone" : !chosen && isFew(count / all) ? "few" : "";
    if (!count || !isOwn) unpaint(span);
    else if (chosen) paint(span, OWN);
    else paintShare(span, count / all);
  });
}

// ---- the state of the page ----

function describeForgotten() {
  const seen = data.seen[round], all = layers * heads;
  let lost = 0, few = 0;
  for (let token = 0; token < seen; token++) {
    lost += !holders(token);
    few += isFew(holders(token) / all);
  }
  return `${few} of ${many(seen, "token")} (${percent(few / seen)}) are held by fewer than half of the heads, ${lost} of these by none.`;
}

const average = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;

// The mean of the heads' budgets; null while a layer has not routed.
function meanBudget() {
  const budgets = Array.from(data.budgets.subarray(round * layers * heads, (round + 1) * layers * heads));
  return budgets.includes(0) ? null : average(budgets) - 1;
}

// Bytes of what all heads hold; where a layer has not routed, that is all that was read.
function describeBytes() {
  const seen = data.seen[round];
  const held = means.slice(round * layers, (round + 1) * layers).reduce((sum, mean) => sum + (mean < 0 ? seen : mean) * heads, 0);
  return `Held keys and values take ${size(held * data.entryBytes)}; a full cache would take ${size(seen * layers * heads * data.entryBytes)}.`;
}

function describeHeld() {
  const seen = data.seen[round], budget = meanBudget();
  const mean = average(means.slice(round * layers, (round + 1) * layers).map((held) => (held < 0 ? seen : held)));
  const share = `A head holds ${Math.round(mean)} of ${many(seen, "token")} on average (${percent(mean / seen)})`;
  if (budget === null) return `${share}.`;
  const [held, allowed] = [mean, budget].map(Math.round);
  if (!data.isPromptBeside) return `${share}; the budget is ${allowed}.`;
  if (data.prompt && held === allowed + data.prompt) return `${share}: ${held} = prompt ${data.prompt} + budget ${allowed}.`;
  return `${share}; the budget is ${allowed}, beside the prompt${data.prompt ? `'s ${many(data.prompt, "token")}` : ""}.`;
}

function show() {
  element("round").value = round;
  element("round").setAttribute("aria-valuetext", `round ${round + 1} of ${rounds}`);
  element("where").textContent = `round ${round + 1} of ${rounds} \u00b7 ${many(data.seen[round], "token")} read`;
  const parts = data.recordsTokens ? [describeForgotten()] : [];
  parts.push(describeHeld());
  if (data.entryBytes) parts.push(describeBytes());
  if (chosen) {
    const own = at(data.kept, round, ...chosen);
    parts.push(`Layer ${chosen[0]}, head ${chosen[1]} holds ${own < 0 ? "all of them" : own}.`);
  }
  element("summary").textContent = parts.join(" ");
  element("later").textContent = laterWords();
  element("textTitle").textContent = !data.recordsTokens || !chosen
    ? "Text" : `Text as layer ${chosen[0]}, head ${chosen[1]} holds it`;
  element("shares").hidden = Boolean(chosen);
  for (const part of document.querySelectorAll(".ofHead")) part.hidden = !chosen;
  paint(element("own"), OWN);
  drawHeads();
  drawLayers();
  drawText();
}

// The address says where the page stands, so that a link leads there: #round=30&head=3.1 (rounds from 1).
function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const wanted = Number(parts.get("round"));
  if (wanted) round = Math.min(Math.max(Math.round(wanted), 1), rounds) - 1;
  const [layer, head] = (parts.get("head") || "").split(".").map(Number);
  chosen = layer >= 0 && layer < layers && head >= 0 && head < heads ? [layer, head] : null;
}

function writeAddress() {
  const head = chosen ? `&head=${chosen.join(".")}` : "";
  history.replaceState(null, "", `#round=${round + 1}${head}`);
}

function go(to) {
  round = Math.min(Math.max(to, 0), rounds - 1);
  writeAddress();
  show();
}

function choose(cell) {
  chosen = cell && chosen && cell[0] === chosen[0] && cell[1] === chosen[1] ? null : cell;
  writeAddress();
  show();
}

function stop() {
  clearInterval(playing);
  playing = null;
  element("play").textContent = "Play";
}

function play() {
  if (playing) return stop();
  if (round === rounds - 1) go(0);
  element("play").textContent = "Pause";
  playing = setInterval(() => (round < rounds - 1 ? go(round + 1) : stop()), Math.max(120, Math.min(600, 12000 / rounds)));
}

function point(token) {
  if (token === pointed) return;
  pointed = token;
  drawHeads();
}

function listen() {
  element("round").addEventListener("input", (event) => go(Number(event.target.value)));
  element("play").addEventListener("click", play);
  const map = element("heads"), time = element("layers"), text = element("text");
  map.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) choose(cell); });
  map.addEventListener("mousemove", (event) => {
    const cell = cellAt(event);
    if (cell) showHint(describeHead(cell), event);
    else hideHint();
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, head] = chosen || [0, -step[1]];
    chosen = null;
    choose([(layer + step[0] + layers) % layers, (head + step[1] + heads) % heads]);
  });
  time.addEventListener("click", (event) => { const r = roundAt(event); if (r !== null) go(r); });
  time.addEventListener("mousemove", (event) => {
    const r = roundAt(event), layer = layerAt(event);
    if (r === null || layer < 0 || layer >= layers) return hideHint();
    const mean = means[r * layers + layer];
    const what = mean < 0 ? "nothing evicted yet" : `held: ${mean.toFixed(1)} tokens a head`;
    showHint(`layer ${layer}, round ${r + 1} (${many(data.seen[r], "token")} read)\n${what}`, event);
  });
  text.addEventListener("mousemove", (event) => {
    const token = event.target.dataset.at;
    if (token === undefined) { hideHint(); return point(null); }
    showHint(describeToken(Number(token)), event);
    point(Number(token));
  });
  text.addEventListener("mouseleave", () => point(null));
  for (const one of [map, time, text]) one.addEventListener("mouseleave", hideHint);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });
  window.addEventListener("hashchange", () => { readAddress(); show(); });
  window.addEventListener("resize", () => { drawHeads(); drawLayers(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readScale(); drawLegends(); show(); });
}

function shareTicks() {
  const all = layers * heads;
  return [...new Set([1, Math.round(all / 4) || 1, Math.ceil(all / 2), all])].map((count) => [count / all, `${count}`]);
}

function writeWords() {
  element("title").textContent = data.title || data.about || "Look at a cache";
  document.title = element("title").textContent;
  const facts = [data.title && data.about, data.file, `${many(layers, "layer")} of ${many(heads, "key/value head")}`];
  element("about").textContent = facts.filter(Boolean).join(" \u00b7 ");
  element("most").textContent = `${most} tokens`;
  element("mostMean").textContent = `${Math.round(mostMean)} tokens a head`;
  element("unrouted").hidden = !data.kept.includes(0);
  element("round").max = rounds - 1;
  if (!data.recordsTokens) {
    element("textLegend").hidden = true;
    element("textNote").textContent = "This record does not say which tokens were evicted. To see the text, record with "
      + "Recorder(tokens=True), or with `reasonalloc generate --record`.";
    return;
  }
  if (!data.pieces) element("textNote").textContent = "This record has no text, so tokens are shown by their position: "
    + "call recorder.set_text(tokenizer, ids, attention_mask) before saving.";
  const pieces = data.pieces || Array.from({ length: perHead }, (_, i) => `${i} `);
  spans = writeText(element("text"), pieces, data.prompt);
}

async function start() {
  data = await readData();
  prepare();
  measure();
  readScale();
  round = rounds - 1;
  readAddress();
  writeWords();
  ready();
  drawLegends();
  listen();
  show();
  document.body.dataset.ready = "yes";
}

start();
