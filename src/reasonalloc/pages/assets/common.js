"use strict";

const element = (id) => document.getElementById(id);

// The data of the page: facts (JSON) and arrays of whole numbers, each deflated.
async function unpack(entry) {
  const bytes = Uint8Array.from(atob(entry.deflated), (letter) => letter.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = await new Response(inflated).arrayBuffer();
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
  const numbers = new kinds[entry.kind](content);
  numbers.shape = entry.shape;
  return numbers;
}

async function readData() {
  if (!window.DecompressionStream) {
    element("waiting").textContent = "This page needs a browser of 2023 or later.";
    throw new Error("no DecompressionStream");
  }
  await new Promise((done) => setTimeout(done)); // a moment for the browser to show that it is unpacking
  const data = JSON.parse(document.getElementById("data").textContent);
  const facts = JSON.parse(new TextDecoder().decode(await unpack(data.facts)));
  for (const name in data.arrays) facts[name] = await unpack(data.arrays[name]);
  return facts;
}

function styleValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Colours from few (0) to many (1), as [red, green, blue]; made anew when light turns to dark.
let scale = [];
function readScale() {
  const stops = styleValue("--scale").split(",").map((stop) => parseInt(stop.trim().slice(1), 16));
  scale = stops.map((number) => [number >> 16, (number >> 8) & 255, number & 255]);
}

function rgb(share) {
  const at = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
  const low = Math.min(Math.floor(at), scale.length - 2);
  return scale[low].map((value, i) => Math.round(value + (scale[low + 1][i] - value) * (at - low)));
}

const colour = (share) => `rgb(${rgb(share).join(",")})`;

function inkOn(share) {
  const [red, green, blue] = rgb(share);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#14181b" : "#ffffff";
}

// A canvas of so many CSS pixels, sharp on every screen.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  return pen;
}

// A bar of colours, with words below it: [share of its width, word] each.
function drawBar(canvas, width, shareAt, ticks) {
  const pen = sized(canvas, width, ticks.length ? 26 : 10);
  for (let x = 0; x < width; x++) {
    pen.fillStyle = colour(shareAt((x + 0.5) / width));
    pen.fillRect(x, 0, 1, 10);
  }
  pen.fillStyle = styleValue("--soft");
  pen.textBaseline = "top";
  for (const [share, word] of ticks) {
    const x = share * width, half = pen.measureText(word).width / 2;
    pen.fillRect(Math.min(x, width - 1), 10, 1, 3);
    pen.textAlign = "center";
    pen.fillText(word, Math.min(Math.max(x, half), width - half), 14);
  }
}

function drawLegends() {
  for (const canvas of document.querySelectorAll(".legend .amount")) drawBar(canvas, 90, (share) => share, []);
  drawBar(element("shareBar"), 200, tone, shareTicks());
}

function showHint(text, event) {
  const hint = element("hint");
  hint.textContent = text;
  const { clientX: x, clientY: y } = event;
  const left = x + 16 + hint.offsetWidth > window.innerWidth ? x - hint.offsetWidth - 12 : x + 16;
  hint.style.left = `${Math.max(4, left)}px`;
  hint.style.top = `${y + 18 + hint.offsetHeight > window.innerHeight ? y - hint.offsetHeight - 12 : y + 18}px`;
}

const hideHint = () => { element("hint").textContent = ""; };

// One span for each token; a heading before the prompt and before the answer.
function writeText(parent, pieces, prompt) {
  const spans = pieces.map((piece, i) => {
    const span = document.createElement("span");
    span.textContent = piece || "\u00b7";
    span.dataset.at = i;
    return span;
  });
  const heading = (words) => {
    const found = document.createElement("b");
    found.textContent = words;
    return found;
  };
  const parts = [];
  if (prompt) parts.push(heading("Prompt"), ...spans.slice(0, prompt), heading("Answer"));
  parent.replaceChildren(...parts, ...spans.slice(prompt));
  return spans;
}

// A token's colour, by the share of heads that hold it: pale below half of them, with a step there.
const isFew = (share) => share < 0.5;
const tone = (share) => (isFew(share) ? 0.5 * share : share);

function paint(span, share) {
  span.style.background = colour(share);
  span.style.color = inkOn(share);
}

// A token in the colour of its holders, dimmed if they are few.
function paintShare(span, share) {
  paint(span, tone(share));
  if (isFew(share)) span.style.color = `color-mix(in srgb, ${inkOn(tone(share))} 68%, ${colour(tone(share))})`;
}

function unpaint(span) {
  span.style.background = span.style.color = "";
}

const quoted = (piece) => `\u201c${piece.trim() || JSON.stringify(piece).slice(1, -1)}\u201d`;
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

function size(bytes) {
  const power = bytes < 1024 ? 0 : Math.min(Math.floor(Math.log2(bytes) / 10), 3);
  const count = bytes / 1024 ** power;
  return `${power && count < 100 ? count.toFixed(1) : Math.round(count)}\u00a0${["B", "KiB", "MiB", "GiB"][power]}`;
}

// The page has its words: show it in place of the notice.
function ready() {
  element("waiting").hidden = true;
  element("content").hidden = false;
}

const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
