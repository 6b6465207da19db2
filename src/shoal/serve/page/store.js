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

export function saveConversations(conversations) {
  const kept = conversations.filter((one) => one.messages.length || one.text).map(({ id, title, messages, text }) => ({
    id, title, text, messages: messages.map(({ role, content, reasoning, error }) => ({ role, content, reasoning, error })),
  }));
  while (kept.length) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(kept));
      return;
    } catch {
      kept.pop();  // the store is full: the oldest goes
    }
  }
  localStorage.removeItem(CONVERSATIONS);
}

export function fresh() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", messages: [], text: "", tokens: [] };
}
