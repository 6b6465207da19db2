// The expert view: tokens in the colours of the experts that computed them, and how much each expert had to do.

const GOLDEN = 137.508;
export const ALL = "all";

export function colour(expert, alpha = 1) {
  return `hsl(${(expert * GOLDEN) % 360} 62% var(--light) / ${alpha})`;
}

// One span a token. `layer` is a number, or ALL: then a token shows a stripe for each layer.
export function paint(span, token, layer) {
  span.className = `token ${token.draft || ""}`;
  const rows = token.experts;
  if (!rows) return;
  if (layer === ALL) {
    const height = 100 / rows.length;
    const stripes = rows.map((row, i) => `${colour(row[0])} ${i * height}% ${(i + 1) * height}%`);
    span.style.background = rows.length > 1 ? `linear-gradient(${stripes.join(",")})` : colour(rows[0][0]);
  } else {
    const row = rows[layer] || [];
    const width = 100 / row.length;
    span.style.background = `linear-gradient(90deg, ${row.map((e, i) => `${colour(e)} ${i * width}% ${(i + 1) * width}%`).join(",")})`;
  }
}

// Every token can be seen and picked, also one that is half a character, a control character or the end of a line.
const visible = (text) => text.replaceAll("\n", "↵\n").replace(/^\p{C}*$/u, "·");

export function tokenSpan(token, layer, onPick) {
  const span = document.createElement("span");
  span.textContent = visible(token.text);
  span.token = token;
  span.tabIndex = -1;
  paint(span, token, layer);
  for (const kind of ["mouseenter", "click", "focus"]) span.addEventListener(kind, () => onPick(token));
  return span;
}

export function describe(token) {
  const guess = { accepted: "guessed ahead, rightly", rejected: "guessed ahead, wrongly" }[token.draft] || "not guessed ahead";
  const layers = (token.experts || []).map((row, i) => `layer ${i + 1}: ${row.join(", ")}`).join(" · ");
  return `${JSON.stringify(token.text)}: ${guess}. ${layers}`;
}

// `[layers][experts]` counts.
export function loads(tokens, layers, experts) {
  const counts = Array.from({ length: layers }, () => new Array(experts).fill(0));
  for (const token of tokens) (token.experts || []).forEach((row, layer) => row.forEach((expert) => { counts[layer][expert]++; }));
  return counts;
}

export function drawBars(box, counts, layer) {
  const row = layer === ALL ? (counts[0] || []).map((_, e) => counts.reduce((sum, one) => sum + one[e], 0)) : counts[layer] || [];
  const most = Math.max(1, ...row);
  box.replaceChildren(...row.map((count, expert) => {
    const bar = document.createElement("div");
    bar.style.height = `${(100 * count) / most}%`;
    bar.style.background = colour(expert);
    bar.title = `expert ${expert}: ${count}`;
    if (row.length <= 16) {
      const label = document.createElement("span");
      label.textContent = count;
      bar.append(label);
    }
    return bar;
  }));
}

export function drawMap(canvas, counts) {
  const layers = counts.length, experts = counts[0]?.length || 0;
  canvas.hidden = !layers || !experts;
  if (canvas.hidden) return;
  canvas.width = experts;
  canvas.height = layers;
  canvas.style.height = `${Math.max(40, Math.min(260, layers * 14))}px`;
  const context = canvas.getContext("2d");
  counts.forEach((row, y) => {
    const most = Math.max(1, ...row);
    row.forEach((count, x) => {
      context.fillStyle = `hsl(187 70% ${8 + (62 * count) / most}%)`;
      context.fillRect(x, y, 1, 1);
    });
  });
}

export function facts(tokens, counts) {
  const guessed = tokens.filter((token) => token.draft);
  const right = guessed.filter((token) => token.draft === "accepted").length;
  const worst = counts.map((row) => {
    const mean = row.reduce((a, b) => a + b, 0) / Math.max(row.length, 1);
    return mean ? Math.max(...row) / mean : 0;
  });
  const parts = [`${tokens.length} tokens`];
  if (guessed.length) parts.push(`${right} of ${guessed.length} guesses right (${Math.round((100 * right) / guessed.length)}%)`);
  if (tokens.length && worst.length) parts.push(`busiest expert ${Math.max(...worst).toFixed(1)}x the mean`);
  return parts.join(" · ");
}
