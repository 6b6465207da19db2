// The server's API: models, and answers as they come.

function headers(key) {
  const result = { "Content-Type": "application/json" };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached: it may have been stopped.");
  }
}

async function complain(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not JSON: the status has to do */ }
  const error = new Error(message);
  error.status = response.status;
  return error;
}

export async function models(key) {
  const response = await reach("/v1/models", { headers: headers(key) });
  if (!response.ok) throw await complain(response);
  return (await response.json()).data;
}

// Calls `onChoice` with every piece and `onUsage` with the count of tokens so far.
export async function stream(path, body, key, signal, onChoice, onUsage) {
  const request = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await reach(path, { method: "POST", headers: headers(key), body: JSON.stringify(request), signal });
  if (!response.ok) throw await complain(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server broke off: it may have been stopped.");
    });
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) onChoice(choice);
      if (chunk.usage) onUsage(chunk.usage);
    }
  }
}
