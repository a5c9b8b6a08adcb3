let data, spans;

const countOf = (side, token) => data[`holders${side}`][token];

function describe(token, side) {
  const lines = [`${quoted(data.sides[side].pieces[token])} at position ${token}${token < data.prompt ? " (prompt)" : ""}`];
  if (token >= data.common) return [...lines, "the texts have parted"].join("\n");
  data.sides.forEach(({ name, heads }, i) => lines.push(`${name}: held by ${countOf(i, token)} of ${heads} heads`));
  return lines.join("\n");
}

function drawTexts() {
  data.sides.forEach((side, i) => {
    const kept = new Set(side.kept);
    spans[i].forEach((span, token) => {
      unpaint(span);
      if (token >= data.common) {
        span.className = token === data.common ? "new first" : "new";
      } else if (!countOf(i, token)) {
        span.className = "lost";
      } else {
        const share = countOf(i, token) / side.heads;
        paintShare(span, share);
        span.className = kept.has(token) ? "kept" : isFew(share) ? "few" : "";
      }
    });
  });
}

// Tokens with the heads that hold them in both caches.
function list(parent, tokens) {
  parent.replaceChildren(...tokens.map((token) => {
    const item = document.createElement("li"), word = document.createElement("code");
    const pieces = data.sides[0].pieces;
    word.textContent = pieces[token].trim() || JSON.stringify(pieces[token]);
    const counts = data.sides.map(({ name, heads }, i) => `${name} ${countOf(i, token)}/${heads}`);
    item.append(word, ` at ${token}: ${counts.join(", ")}`);
    item.dataset.at = token;
    return item;
  }));
}

function writeSide(side, i) {
  let lost = 0, few = 0, held = 0;
  for (let token = 0; token < data.common; token++) {
    lost += !countOf(i, token);
    few += isFew(countOf(i, token) / side.heads);
    held += countOf(i, token) / side.heads;
  }
  element(`name${i}`).textContent = side.name;
  element(`about${i}`).textContent = side.about;
  element(`facts${i}`).textContent = `${many(side.length, "token")} in all. Where the texts part, after ${many(side.round, "round")} `
    + `of eviction, ${few} of ${many(data.common, "token")} are held by fewer than half of the heads, ${lost} of these by none. `
    + `A token is held by ${percent(held / Math.max(data.common, 1))} of the heads on average.`;
  const written = side.pieces[data.common];
  element(`next${i}`).textContent = written === undefined ? `${side.name} ends here`
    : `${side.name} writes ${quoted(written)} next, which ${side.sources.length ? "had stood before at" : "had not stood before"}`;
  list(element(`sources${i}`), side.sources);
  element(`kept${i}`).textContent = `Kept by most heads of ${side.name} alone: ${many(side.kept.length, "token")}`;
  list(element(`list${i}`), side.kept);
}

// Scroll a text so that a token stands at this share of its height.
function scrollTo(text, place, share) {
  text.scrollTop = place.offsetTop - text.clientHeight * share;
}

function mark(token) {
  for (const marked of document.querySelectorAll(".marked")) marked.classList.remove("marked");
  if (token === undefined) return;
  for (const side of spans) if (side[token] && (token < data.common)) side[token].classList.add("marked");
}

function listen() {
  for (const i of [0, 1]) {
    for (const parent of ["text", "list", "sources"].map((name) => element(name + i))) {
      parent.addEventListener("mousemove", (event) => {
        const token = event.target.closest("[data-at]")?.dataset.at;
        mark(token);
        if (token === undefined) hideHint();
        else showHint(describe(Number(token), i), event);
      });
      parent.addEventListener("mouseleave", () => { mark(); hideHint(); });
    }
    for (const parent of [element(`list${i}`), element(`sources${i}`)]) {
      parent.addEventListener("click", (event) => {
        const token = event.target.closest("[data-at]")?.dataset.at;
        if (token !== undefined) spans.forEach((side, k) => scrollTo(element(`text${k}`), side[token], 0.4));
      });
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readScale(); drawLegends(); drawTexts(); });
}

const shareTicks = () => [0, 0.25, 0.5, 1].map((share) => [share, percent(share)]);

async function start() {
  data = await readData();
  ready();
  readScale();
  drawLegends();
  spans = data.sides.map((side, i) => writeText(element(`text${i}`), side.pieces, data.prompt));
  data.sides.forEach(writeSide);
  const written = data.common - data.prompt, names = data.sides.map((side) => side.name);
  document.title = `${names[0]} and ${names[1]}`;
  element("verdict").textContent = data.isSame
    ? `The texts do not part: both are the same ${many(written, "token")} behind the prompt.`
    : `The texts are the same for ${many(written, "token")} behind the prompt, and part at position ${data.common}.`;
  drawTexts();
  listen();
  for (const i of [0, 1]) {
    const place = spans[i][data.common];
    if (place) scrollTo(element(`text${i}`), place, 0.75);
  }
  document.body.dataset.ready = "yes";
}

start();
