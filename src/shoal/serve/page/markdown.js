// Markdown to DOM nodes. Nothing a model writes is ever parsed as HTML.

const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;  // the row below the head of a table
const DEEPEST = 20;  // quotes within quotes

const shown = new WeakMap();  // nodes, to the text in them and the lines where its blocks begin

// Shows `text` in `node`. Where it is what was there and more, what may have changed is made again: the last block, and the one before
// it, whose end the last line may move. Selections and buttons in the others stay.
export function showMarkdown(node, text) {
  const before = shown.get(node);
  const grown = before && node.childElementCount === before.starts.length && text.startsWith(before.text);
  const starts = grown ? before.starts.slice(0, -2) : [];
  const from = grown ? before.starts.at(-2) ?? 0 : 0;
  while (node.childNodes.length > starts.length) node.lastChild.remove();
  starts.push(...blocks(node, text.split("\n"), from, 0));
  shown.set(node, { text, starts });
}

// Appends the blocks from line `i` on to `root`, one element each; the lines where they begin.
function blocks(root, lines, i, depth) {
  const starts = [];
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    starts.push(i);
    i = block(root, lines, i, depth);
  }
  return starts;
}

// Appends the block that begins with line `i`; the line behind it.
function block(root, lines, i, depth) {
  const isTable = (i) => lines[i].includes("|") && DELIMITERS.test(lines[i + 1] || "");
  const line = lines[i];
  const fence = line.match(/^\s*(```+|~~~+)\s*(\S*)/);
  if (fence) {
    const body = [];
    for (i++; i < lines.length && !lines[i].trim().startsWith(fence[1]); i++) body.push(lines[i]);
    root.append(code(body.join("\n"), fence[2]));
    return i + 1;
  }
  if (/^#{1,6}\s/.test(line)) {
    const level = line.match(/^#+/)[0].length;
    root.append(element(`h${Math.min(level, 4)}`, line.slice(level).trim()));
    return i + 1;
  }
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
    root.append(document.createElement("hr"));
    return i + 1;
  }
  if (/^\s*>/.test(line) && depth < DEEPEST) {
    const body = [];
    for (; i < lines.length && /^\s*>/.test(lines[i]); i++) body.push(lines[i].replace(/^\s*> ?/, ""));
    const quote = document.createElement("blockquote");
    blocks(quote, body, 0, depth + 1);
    root.append(quote);
    return i;
  }
  if (/^\s*([-*+]|\d+[.)])\s/.test(line)) return list(root, lines, i);
  if (isTable(i)) return table(root, lines, i);
  const body = [];
  for (; i < lines.length && lines[i].trim() && !/^\s*(```|~~~|#{1,6}\s|>|([-*+]|\d+[.)])\s)/.test(lines[i]) && !isTable(i); i++) body.push(lines[i]);
  if (!body.length) body.push(lines[i++]);
  root.append(element("p", body.join("\n")));
  return i;
}

function list(root, lines, i) {
  const ordered = /^\s*\d/.test(lines[i]);
  const node = document.createElement(ordered ? "ol" : "ul");
  if (ordered) node.start = Number(lines[i].match(/\d+/)[0]);  // steps may have code between them
  const indent = lines[i].match(/^\s*/)[0].length;
  while (i < lines.length && /^\s*([-*+]|\d+[.)])\s/.test(lines[i])) {
    const depth = lines[i].match(/^\s*/)[0].length;
    if (depth < indent) break;
    if (depth > indent + 1 && node.lastChild) {
      i = list(node.lastChild, lines, i);
      continue;
    }
    node.append(element("li", lines[i].replace(/^\s*([-*+]|\d+[.)])\s+/, "")));
    i++;
  }
  root.append(node);
  return i;
}

function table(root, lines, i) {
  const node = document.createElement("table");
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, kind) => {
    const tr = document.createElement("tr");
    for (const cell of cells(line)) tr.append(element(kind, cell.trim()));
    node.append(tr);
  };
  row(lines[i], "th");
  for (i += 2; i < lines.length && lines[i].includes("|"); i++) row(lines[i], "td");
  root.append(node);
  return i;
}

function code(text, language) {
  const box = document.createElement("div");
  box.className = "code";
  const bar = document.createElement("div");
  bar.className = "bar";
  const name = document.createElement("span");
  name.textContent = language || "code";
  bar.append(name, copyButton(() => text));
  const pre = document.createElement("pre");
  const inner = document.createElement("code");
  inner.textContent = text;
  pre.append(inner);
  box.append(bar, pre);
  return box;
}

export function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      const area = document.createElement("textarea");  // pages without TLS have no clipboard
      area.value = text();
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1200);
  });
  return button;
}

function element(name, text) {
  const node = document.createElement(name);
  inline(node, text);
  return node;
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^*]+)\*\*|(?<!\w)__([^_]+)__(?!\w)|\*([^*\s](?:[^*]*[^*\s])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(node, text) {
  let match;
  while ((match = text.match(INLINE))) {
    node.append(text.slice(0, match.index));
    let child;
    if (match[2] !== undefined) {
      child = document.createElement("code");
      child.textContent = match[2];
    } else if (match[7] !== undefined) {
      child = document.createElement("a");
      child.href = match[7];
      child.rel = "noreferrer noopener";
      child.target = "_blank";
      inline(child, match[6]);
    } else {
      child = document.createElement(match[5] === undefined ? "strong" : "em");
      inline(child, match[3] ?? match[4] ?? match[5]);
    }
    node.append(child);
    text = text.slice(match.index + match[0].length);
  }
  node.append(text);
}
