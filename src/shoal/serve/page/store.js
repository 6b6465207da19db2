// What this browser remembers: conversations and settings. Which experts computed what is not kept: it would soon fill the store.

const CONVERSATIONS = "shoal.conversations", SETTINGS = "shoal.settings";
export const DEFAULTS = { system: "", thinking: false, temperature: 0.8, top_p: 1, min_p: 0, frequency_penalty: 0, max_tokens: 512, seed: "", key: "", theme: "" };

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function loadSettings() {
  return { ...DEFAULTS, ...read(SETTINGS, {}) };
}

export function saveSettings(settings) {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

export function loadConversations() {
  const found = read(CONVERSATIONS, []);
  return Array.isArray(found) ? found : [];
}

// Other tabs may have written in between: what is stored is read again, and only this one changed.
export function keepConversation({ id, title, text, before, messages }) {
  if (!messages.length && !text) return;
  const kept = messages.map(({ role, content, reasoning, cut, error }) => ({ role, content, reasoning, cut, error }));
  const all = loadConversations(), one = { id, title, text, before, messages: kept };
  const at = all.findIndex((other) => other.id === id);
  if (at < 0) all.unshift(one);
  else all[at] = one;
  write(all);
}

export function dropConversation({ id }) {
  write(loadConversations().filter((one) => one.id !== id));
}

function write(conversations) {
  while (conversations.length) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(conversations));
      return;
    } catch {
      conversations.pop();  // the store is full: the oldest goes
    }
  }
  localStorage.removeItem(CONVERSATIONS);
}

export function fresh() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", messages: [], text: "", tokens: [] };
}
