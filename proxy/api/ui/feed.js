// Snapshots from the gateway, for as long as the page is open. EventSource cannot send a header, so it is fetch.

const WAITS = [1, 2, 4, 8, 15]; // seconds before the next try
const SILENCE = 10; // seconds without a frame after which the connection is dead, whatever TCP thinks
const KEY = "penstock-admin-key";

// The events in what was read so far, and the rest that is not whole yet. Lines that begin with a colon say nothing.
export function parse(text) {
  const blocks = text.split("\n\n");
  const rest = blocks.pop();
  const events = [];
  for (const block of blocks) {
    let name = "message";
    let data = "";
    for (const line of block.split("\n")) {
      if (line.startsWith("event:")) name = line.slice(6).trim();
      else if (line.startsWith("data:")) data += line.slice(5);
    }
    if (data) events.push({ name, data });
  }
  return { events, rest };
}

// Calls `show` with each snapshot and `tell` with (state, seconds until the next try). States: connecting, live, lost,
// stopped, key, refused. Returns a function that takes the key once the state is key or refused.
export function follow(url, show, tell) {
  let given = () => {};
  run();
  return (key) => {
    sessionStorage.setItem(KEY, key);
    given();
  };

  async function run() {
    for (let failures = 0; ; failures += 1) {
      const end = await listen(() => { failures = 0; });
      if (end === 401) {
        const tried = sessionStorage.getItem(KEY);
        sessionStorage.removeItem(KEY);
        const key = new Promise((resolve) => { given = resolve; });
        tell(tried ? "refused" : "key");
        await key;
        failures = -1;
        continue;
      }
      const wait = WAITS[Math.min(failures, WAITS.length - 1)] * (0.75 + Math.random() / 2);
      tell(end, wait);
      await new Promise((resolve) => { setTimeout(resolve, 1000 * wait); });
    }
  }

  // Returns how it ended: stopped (the gateway said so), lost, or 401.
  async function listen(alive) {
    const abort = new AbortController();
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), 1000 * SILENCE);
    };
    try {
      tell("connecting");
      heard();
      const key = sessionStorage.getItem(KEY);
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const answer = await fetch(url, { headers, cache: "no-store", signal: abort.signal });
      if (answer.status === 401) return 401;
      if (!answer.ok) return "lost";
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; ; ) {
        const { value, done } = await reader.read();
        if (done) return "lost";
        heard();
        const { events, rest } = parse(text + value);
        text = rest;
        const last = events.findLast((event) => event.name === "message"); // the newest says all there is to say
        if (last) {
          alive();
          tell("live");
          show(JSON.parse(last.data));
        }
        if (events.some((event) => event.name === "bye")) return "stopped";
      }
    } catch (error) {
      if (error instanceof TypeError || error.name === "AbortError") return "lost"; // what fetch and its body throw
      throw error;
    } finally {
      clearTimeout(silence);
      abort.abort();
    }
  }
}
