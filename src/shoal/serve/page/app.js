import { models, stream } from "./api.js";
import { ALL, describe, drawBars, drawMap, facts, loads, paint, tokenSpan } from "./experts.js";
import { copyButton, showMarkdown } from "./markdown.js";
import { dropConversation, fresh, keepConversation, loadConversations, loadSettings, saveSettings } from "./store.js";

const $ = (id) => document.getElementById(id);
const settings = loadSettings();
let conversations = loadConversations();
let current = conversations[0] || fresh();
let known = [];      // models of the server
let running = null;  // AbortController of the answer that is coming
let showsExperts = false;
let layer = ALL;
let shown = null;    // conversation that the log shows
let again = 0;       // timer of the next attempt to reach the server

const model = () => known.find((one) => one.id === $("model").value) || known[0];
const about = () => model()?.shoal || {};
const isChat = () => about().chat !== false;

// ---- the server

async function connect() {
  clearTimeout(again);
  try {
    known = await models(settings.key);
  } catch (error) {
    if (error.status === 401) {  // and there it waits: whoever closes the settings connects again
      show("This server wants an API key: enter it in the settings.");
      openPanel("key");
    } else {
      show(error.message);
      again = setTimeout(connect, 3000);
    }
    return;
  }
  if (about().state === "loading") {
    show("The model is being loaded ...");
    again = setTimeout(connect, 1000);
    return;
  }
  const before = $("model").value;
  $("model").replaceChildren(...known.map((one) => new Option(one.id, one.id)));
  if (known.some((one) => one.id === before)) $("model").value = before;
  layerOptions();
  if (!document.querySelector(".edit")) render();
}

function request() {
  const body = { model: model()?.id, max_tokens: Number(settings.max_tokens) || 512 };
  for (const name of ["temperature", "top_p", "min_p", "frequency_penalty"]) body[name] = Number(settings[name]);
  if (settings.seed !== "") body.seed = Number(settings.seed);
  if (showsExperts) body.experts = true;
  return body;
}

// From here on an answer is coming, and what is drawn shows it.
function begin() {
  running = new AbortController();
  busy(true);
  render();
  toEnd();
}

async function answer(path, body, take) {
  const began = performance.now();
  let failure = "", tokens = 0;
  const tell = () => {
    const seconds = (performance.now() - began) / 1000;
    $("speed").textContent = `${tokens} tokens, ${(tokens / seconds).toFixed(0)} tokens/s`;
  };
  $("speed").textContent = "";
  try {
    await stream(path, body, settings.key, running.signal, take, (usage) => {
      tokens = usage.completion_tokens;
      if (performance.now() - began > 200) tell();  // before, it says little
    });
    tell();
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
  }
  running = null;
  busy(false);
  return failure;
}

// ---- a chat

async function ask(text) {
  current.messages.push({ role: "user", content: text });
  current.title ||= text.slice(0, 60);
  await reply();
}

async function reply() {
  const at = current;
  keep(at);
  const message = { role: "assistant", content: "", reasoning: "", tokens: [] };
  const sent = at.messages.filter((one) => !one.error).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) sent.unshift({ role: "system", content: settings.system });
  at.messages.push(message);
  begin();
  const body = { ...request(), messages: sent };
  if (about().thinking_is_optional) body.chat_template_kwargs = { thinking: settings.thinking, enable_thinking: settings.thinking };
  const update = painter(at, message);
  const failure = await answer("/v1/chat/completions", body, (choice) => {
    message.reasoning += choice.delta.reasoning_content || "";
    message.content += choice.delta.content || "";
    message.tokens.push(...(choice.shoal || []));
    if (choice.finish_reason === "length") message.cut = true;
    update();
  });
  if (failure) {
    if (!message.content && !message.reasoning) at.messages.pop();
    at.messages.push({ role: "assistant", content: failure, error: true });
  }
  keep(at);
  if (at !== current) return;
  if (failure) render();
  else fill($("log").lastElementChild, message, false);
  renderList();
  inspect();
}

// Paints an answer that grows, at most once a frame.
function painter(at, message) {
  let due = false;
  return () => {
    if (due || at !== current) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      const node = $("log").lastElementChild;
      if (at !== current || !node) return;
      const follows = nearEnd();
      fill(node, message, running !== null);
      inspect();
      if (follows) toEnd();
    });
  };
}

function fill(node, message, grows) {
  const thought = node.querySelector("details");
  if (thought) {
    thought.hidden = !message.reasoning;
    thought.querySelector("div").textContent = message.reasoning;
    thought.querySelector("summary").textContent = grows && !message.content ? "Thinking ..." : "Thoughts";
  }
  const text = node.querySelector(".text");
  if (showsExperts && message.tokens?.length) {
    let box = text.querySelector(".tokens");
    if (!box) {
      box = document.createElement("div");
      box.className = "tokens";
      text.replaceChildren(box);
    }
    for (let i = box.childElementCount; i < message.tokens.length; i++) box.append(tokenSpan(message.tokens[i], layer, pick));
  } else {
    showMarkdown(text, message.content);
  }
  text.classList.toggle("caret", grows);
  const cut = node.querySelector(".cut");
  if (cut) cut.hidden = grows || !message.cut;
}

function messageNode(message, index) {
  const node = document.createElement("article");
  node.className = `message ${message.role}`;
  if (message.error) {
    const box = document.createElement("div");
    box.className = "error";
    box.setAttribute("role", "alert");
    box.textContent = message.content;
    node.append(box, tools([["Retry", () => retry(index)]]));
    return node;
  }
  const grows = running !== null && index === current.messages.length - 1;
  if (message.role === "assistant") {
    const thought = document.createElement("details");
    thought.className = "thought";
    thought.append(document.createElement("summary"), document.createElement("div"));
    thought.open = grows;
    node.append(thought);
  }
  const text = document.createElement("div");
  text.className = "text";
  text.dir = "auto";
  node.append(text);
  if (message.role === "user") {
    text.textContent = message.content;
    node.append(tools([["Edit", () => edit(node, index)]], () => message.content));
  } else {
    const cut = document.createElement("p");
    cut.className = "fine cut";
    cut.textContent = "Cut off at the longest answer that the settings allow.";
    node.append(cut);
    fill(node, message, grows);
    node.append(tools([["Retry", () => retry(index)]], () => message.content));
  }
  return node;
}

function tools(buttons, text) {
  const row = document.createElement("div");
  row.className = "tools";
  for (const [name, act] of buttons) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => { if (!running) act(); });
    row.append(button);
  }
  if (text) row.append(copyButton(text));
  return row;
}

function retry(index) {
  let from = index;
  while (from > 0 && current.messages[from - 1].role !== "user") from--;
  current.messages.length = from;
  reply();
}

function edit(node, index) {
  const area = document.createElement("textarea");
  area.className = "edit";
  area.setAttribute("aria-label", "Edit message");
  area.value = current.messages[index].content;
  area.rows = Math.min(10, area.value.split("\n").length + 1);
  const send = () => {
    if (!area.value.trim()) return;
    current.messages.length = index;
    ask(area.value);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); render(); }
  });
  node.replaceChildren(area, tools([["Send", send], ["Cancel", render]]));
  area.focus();
}

// ---- completion, for base models

function completionNode() {
  const node = document.createElement("div");
  node.className = "completion";
  const area = document.createElement("textarea");
  area.setAttribute("aria-label", "Text to continue");
  area.placeholder = "This is a base model: write the beginning of a text, and it goes on.";
  area.value = current.text || "";
  area.addEventListener("input", () => { current.text = area.value; current.tokens = []; current.title = area.value.slice(0, 60); });
  area.addEventListener("change", () => keep(current));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); complete(); }
  });
  const tokens = document.createElement("div");
  tokens.className = "tokens";
  tokens.title = "Turn the expert view off to edit";
  node.append(area, tokens, tools([["Retry", () => { if (current.before !== undefined) { current.text = current.before; complete(); } }]], () => current.text));
  fillCompletion(node);
  return node;
}

function fillCompletion(node) {
  const coloured = showsExperts && current.tokens?.length > 0;
  const [area, box] = node.children;
  area.hidden = coloured;
  area.readOnly = running !== null;
  box.hidden = !coloured;
  const end = area.scrollHeight - area.scrollTop - area.clientHeight < 80;
  if (area.value !== (current.text || "")) area.value = current.text || "";
  if (end) area.scrollTop = area.scrollHeight;
  if (!coloured) return;
  if (!box.firstChild) box.append(document.createTextNode(current.before || ""));
  for (let i = box.childElementCount; i < current.tokens.length; i++) box.append(tokenSpan(current.tokens[i], layer, pick));
}

async function complete() {
  const at = current;
  if (running || !at.text) return;
  at.before = at.text;
  at.tokens = [];
  at.title ||= at.text.slice(0, 60);
  begin();
  let due = false;
  const failure = await answer("/v1/completions", { ...request(), prompt: at.text }, (choice) => {
    at.text += choice.text;
    at.tokens.push(...(choice.shoal || []));
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      const node = $("log").querySelector(".completion");
      if (at !== current || !node) return;
      const follows = nearEnd();
      fillCompletion(node);
      inspect();
      if (follows) toEnd();
    });
  });
  keep(at);
  if (at !== current) return;
  fillCompletion($("log").querySelector(".completion"));
  $("go").textContent = goName();
  renderList();
  inspect();
  if (failure) show(failure);
}

const goName = () => (running ? "Stop (Esc)" : "Continue (Ctrl+Enter)");

// ---- the expert view

function layerOptions() {
  const layers = about().moe_layers || 0;
  $("experts").hidden = !layers;
  $("layer").replaceChildren(new Option("All, in stripes", ALL), ...Array.from({ length: layers }, (_, i) => new Option(`MoE layer ${i + 1} of ${layers}`, i)));
  $("layer").value = layer;
}

function shownTokens() {
  if (!isChat()) return current.tokens || [];
  return current.messages.flatMap((message) => message.tokens || []);
}

function inspect() {
  if (!showsExperts) return;
  const tokens = shownTokens();
  const counts = loads(tokens, about().moe_layers || 0, about().experts || 0);
  drawBars($("bars"), counts, layer);
  drawMap($("map"), counts);
  $("facts").textContent = tokens.length ? facts(tokens, counts) : "Answers from now on show their experts.";
}

function pick(token) {
  $("detail").textContent = describe(token);
}

function setLayer(value) {
  layer = value === ALL || value === "all" ? ALL : Number(value);
  $("layer").value = layer;
  for (const span of document.querySelectorAll("#log .token")) paint(span, span.token, layer);
  inspect();
}

function moveLayer(by) {
  const layers = about().moe_layers || 0;
  const place = (layer === ALL ? 0 : layer + 1) + by;
  const wrapped = (place + layers + 1) % (layers + 1);
  setLayer(wrapped === 0 ? ALL : wrapped - 1);
}

function toggleExperts() {
  showsExperts = !showsExperts;
  $("experts").setAttribute("aria-pressed", showsExperts);
  $("inspector").hidden = !showsExperts;
  render();
}

// ---- the frame

function render() {
  const log = $("log");
  const chat = isChat();
  const stays = shown === current && !nearEnd(), top = log.scrollTop;  // whoever reads further up is left there
  shown = current;
  $("composer").hidden = !chat;
  document.querySelector(".keys").hidden = !chat;
  $("thinking-row").hidden = !about().thinking_is_optional;
  if (!chat) {
    const go = document.createElement("button");
    go.id = "go";
    go.textContent = goName();
    go.addEventListener("click", () => (running ? running.abort() : complete()));
    const node = completionNode();
    node.append(go);
    log.replaceChildren(node);
  } else if (!current.messages.length) {
    log.replaceChildren(hello());
  } else {
    log.replaceChildren(...current.messages.map(messageNode));
  }
  if (stays) log.scrollTop = top;
  else if (chat) toEnd();
  renderList();
  inspect();
}

function hello() {
  const node = document.createElement("div");
  node.className = "hello";
  const picture = document.createElement("img");
  picture.src = "icon.svg";
  picture.alt = "";
  picture.width = 56;
  const title = document.createElement("h1");
  title.textContent = model() ? model().id : "Shoal";
  const facts = document.createElement("p");
  const it = about();
  facts.textContent = it.experts ? `${it.experts} experts in ${it.moe_layers} layers, ${it.experts_per_token} for each token. Turn on Experts to watch them work.` : "";
  node.append(picture, title, facts);
  return node;
}

function renderList() {
  const all = conversations.includes(current) ? conversations : [current, ...conversations];
  $("list").replaceChildren(...all.map((one) => {
    const row = document.createElement("div");
    row.className = `entry ${one === current ? "current" : ""}`;
    const name = document.createElement("button");
    name.className = "name";
    name.textContent = one.title || "New conversation";
    if (one === current) name.setAttribute("aria-current", "true");
    name.addEventListener("click", () => open(one));
    const drop = document.createElement("button");
    drop.className = "drop";
    drop.textContent = "✕";
    drop.setAttribute("aria-label", `Delete ${name.textContent}`);
    drop.addEventListener("click", () => {
      conversations = conversations.filter((other) => other !== one);
      one.dropped = true;
      dropConversation(one);
      if (one === current) open(conversations[0] || fresh());
      else renderList();
    });
    row.append(name, drop);
    return row;
  }));
}

function open(conversation) {
  running?.abort();
  current = conversation;
  openMenu(false);
  $("speed").textContent = "";
  render();
  $("input").focus();
}

function keep(conversation) {
  if (conversation.dropped) return;
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  keepConversation(conversation);
}

function show(text) {
  const box = document.createElement("div");
  box.className = "error";
  box.setAttribute("role", "alert");
  box.textContent = text;
  $("log").querySelectorAll(":scope > .error").forEach((old) => old.remove());
  $("log").append(box);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

const nearEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

function setTheme(theme) {
  settings.theme = theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

// Opens the settings at a field, or closes them.
function openPanel(field) {
  $("panel").hidden = !field;
  $("settings").setAttribute("aria-expanded", Boolean(field));
  if (field) $(field).focus();
}

function openMenu(is) {
  $("side").classList.toggle("open", is);
  $("menu").setAttribute("aria-expanded", is);
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

function send() {
  const text = $("input").value;
  if (running || !text.trim() || !model()) return;
  $("input").value = "";
  grow();
  ask(text);
}

for (const name of ["system", "temperature", "top_p", "min_p", "frequency_penalty", "max_tokens", "seed", "key", "thinking"]) {
  const field = $(name), isBox = field.type === "checkbox";
  const tell = () => { const output = field.closest("label").querySelector("output"); if (output) output.textContent = field.value; };
  if (isBox) field.checked = settings[name]; else field.value = settings[name];
  tell();
  field.addEventListener("input", () => {
    settings[name] = isBox ? field.checked : field.value;
    tell();
    saveSettings(settings);
  });
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => open(fresh()));
$("menu").addEventListener("click", () => openMenu(true));
document.addEventListener("pointerdown", (event) => { if (!$("side").contains(event.target)) openMenu(false); });
$("settings").addEventListener("click", () => openPanel($("panel").hidden && "system"));
$("close").addEventListener("click", () => { openPanel(null); connect(); });
$("theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); saveSettings(settings); });
$("experts").addEventListener("click", toggleExperts);
$("model").addEventListener("change", () => { layerOptions(); render(); });
$("layer").addEventListener("change", () => setLayer($("layer").value));
$("earlier").addEventListener("click", () => moveLayer(-1));
$("later").addEventListener("click", () => moveLayer(1));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if ($("side").classList.contains("open")) openMenu(false);
    else if (!$("panel").hidden) openPanel(null);
    else running?.abort();
  }
  if (event.key.toLowerCase() === "e" && (event.ctrlKey || event.metaKey) && about().moe_layers) { event.preventDefault(); toggleExperts(); }
});

// Another tab has changed the conversations; the one that is open here stays what it is here.
addEventListener("storage", () => {
  const mine = new Map([current, ...conversations].map((one) => [one.id, one]));
  conversations = loadConversations().map((one) => (one.id === current.id ? current : Object.assign(mine.get(one.id) ?? {}, one)));
  renderList();
});
addEventListener("pagehide", () => { if (running) keep(current); });

setTheme(settings.theme);
render();
connect();
$("input").focus();
