// OpenAI's Node SDK through the gateway. tests/e2e/test_openai_node_sdk.py starts both sides and runs this file:
//   GATEWAY   the gateway's base_url             KEY   a caller's key
//   PROVIDER  the simulated provider's own one, whose bytes the gateway's are compared with
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";
import { File } from "node:buffer";

globalThis.File ??= File; // Node 18 has it here only
const { default: OpenAI, toFile } = await import("openai");

const client = new OpenAI({ baseURL: process.env.GATEWAY, apiKey: process.env.KEY, maxRetries: 0 });
const straight = new OpenAI({ baseURL: process.env.PROVIDER, apiKey: process.env.KEY, maxRetries: 0 });
const model = "gpt-4o-mini";
const messages = [{ role: "user", content: "hello" }];
const SAID = "echo: hello runs down the";
const sound = randomBytes(3 << 20); // more than what the gateway keeps of a form
const schema = {
  type: "object",
  properties: { of: { type: "string" }, in: { type: "string", enum: ["m", "ft"] } },
  required: ["of", "in"],
  additionalProperties: false,
};
const FITS = { of: SAID, in: "m" };
const tools = [{ type: "function", function: { name: "height", strict: true, parameters: schema } }];
const bytes = async (response) => Buffer.from(await response.arrayBuffer());

async function gathered(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

// ── chat ──

test("a chat is answered, and its id is the header's", async () => {
  const { data, response } = await client.chat.completions.create({ model, messages }).withResponse();
  assert.equal(data.choices[0].message.content, SAID);
  assert.deepEqual([data.usage.prompt_tokens, data.usage.completion_tokens], [1, 4]);
  assert.equal(data._request_id, response.headers.get("x-request-id"));
  assert.match(response.headers.get("server-timing"), /queue;dur=/);
});

test("a chat is streamed, and tells its usage where it is asked for", async () => {
  const plain = await gathered(await client.chat.completions.create({ model, messages, stream: true }));
  assert.equal(plain.map((part) => part.choices[0].delta.content ?? "").join(""), SAID);
  assert.equal(plain.at(-1).choices[0].finish_reason, "stop");
  const told = await gathered(
    await client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } }),
  );
  assert.equal(told.at(-1).usage.completion_tokens, 4);
});

test("the streaming helper gathers a chat", async () => {
  const final = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
  assert.equal(final.choices[0].message.content, SAID);
});

test("a tool is called, whole and streamed", async () => {
  const asked = { model, messages, tools, tool_choice: "required" };
  const whole = await client.chat.completions.create(asked);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  for (const { choices } of [whole, streamed]) {
    const [{ function: called }] = choices[0].message.tool_calls;
    assert.equal(choices[0].finish_reason, "tool_calls");
    assert.deepEqual([called.name, JSON.parse(called.arguments)], ["height", FITS]);
  }
});

test("a structured answer fits its schema, whole and streamed", async () => {
  const asked = { model, messages, response_format: { type: "json_schema", json_schema: { name: "height", schema } } };
  const whole = await client.chat.completions.parse(asked);
  const parts = await gathered(await client.chat.completions.create({ ...asked, stream: true }));
  assert.deepEqual(JSON.parse(whole.choices[0].message.content), FITS);
  assert.deepEqual(JSON.parse(parts.map((part) => part.choices[0].delta.content ?? "").join("")), FITS);
});

test("a stream can be left in its middle", async () => {
  const stream = await client.chat.completions.create({ model: "slow", messages, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});

test("embeddings are unpacked by the SDK", async () => {
  const packed = await client.embeddings.create({ model, input: ["one", "two"], dimensions: 8 });
  const plain = await client.embeddings.create({ model, input: "two", dimensions: 8, encoding_format: "float" });
  assert.equal(packed.data.length, 2);
  packed.data[1].embedding.forEach((value, at) => assert.ok(Math.abs(value - plain.data[0].embedding[at]) < 1e-6));
});

test("models are listed and found", async () => {
  const listed = await gathered(client.models.list());
  assert.ok(listed.some((found) => found.id === model));
  assert.equal((await client.models.retrieve(model)).id, model);
});

// ── responses ──

const textOf = (response) => response.output[0].content[0].text;

test("a response is answered, streamed, gone on from, shown and deleted", async () => {
  const whole = await client.responses.create({ model, input: "hello" });
  const events = await gathered(await client.responses.create({ model, input: "hello", stream: true }));
  const final = await client.responses.stream({ model, input: "hello" }).finalResponse();
  const more = await client.responses.create({ model, input: "again", previous_response_id: whole.id });
  const items = await gathered(client.responses.inputItems.list(whole.id));
  assert.equal(whole.output_text, SAID);
  assert.deepEqual([events[0].type, events.at(-1).type], ["response.created", "response.completed"]);
  assert.equal(textOf(final), SAID);
  assert.equal(more.previous_response_id, whole.id);
  assert.equal(items[0].content[0].text, "hello");
  assert.equal((await client.responses.retrieve(whole.id)).output_text, SAID);
  await client.responses.delete(whole.id);
  await assert.rejects(client.responses.retrieve(whole.id), OpenAI.NotFoundError);
});

test("a response calls a tool and fits a schema, and can be cancelled in the background", async () => {
  const [{ function: flat }] = tools;
  const called = await client.responses.create({
    model,
    input: "hello",
    tools: [{ type: "function", ...flat }],
    tool_choice: "required",
  });
  const text = { format: { type: "json_schema", name: "height", schema } };
  const fitting = await client.responses.stream({ model, input: "hello", text }).finalResponse();
  const queued = await client.responses.create({ model, input: "hello", background: true });
  assert.deepEqual([called.output[0].name, JSON.parse(called.output[0].arguments)], ["height", FITS]);
  assert.deepEqual(JSON.parse(textOf(fitting)), FITS);
  assert.equal((await client.responses.cancel(queued.id)).status, "cancelled");
});

// ── sound and pictures ──

test("speech is the provider's own bytes, whole and as they come", async () => {
  const asked = { model, voice: "alloy", input: "hello" };
  const own = await bytes(await straight.audio.speech.create(asked));
  const streamed = await client.audio.speech.create(asked);
  assert.equal(streamed.headers.get("content-type"), "audio/mpeg");
  assert.deepEqual(Buffer.concat(await gathered(streamed.body)), own);
  assert.deepEqual(await bytes(await client.audio.speech.create(asked)), own);
});

test("sound is heard as it was sent, whole and streamed", async () => {
  const digest = createHash("sha256").update(sound).digest("hex");
  const asked = async () => ({ model, file: await toFile(sound, "a.wav") });
  const whole = await client.audio.transcriptions.create(await asked());
  const events = await gathered(await client.audio.transcriptions.create({ ...(await asked()), stream: true }));
  const other = await client.audio.translations.create(await asked());
  assert.ok(whole.text.startsWith(`echo: ${sound.length} bytes of a.wav, ${digest}`));
  assert.deepEqual([events.at(-1).type, events.at(-1).text], ["transcript.text.done", whole.text]);
  assert.equal(other.text, whole.text);
});

test("pictures are painted and edited, whole and streamed", async () => {
  const asked = { model, prompt: "a pipe", size: "256x256" };
  const own = await straight.images.generate(asked);
  const made = await client.images.generate(asked);
  const events = await gathered(await client.images.generate({ ...asked, stream: true, partial_images: 1 }));
  const edited = await client.images.edit({ model, prompt: "x", image: await toFile(sound, "a.png") });
  assert.equal(made.data[0].b64_json, own.data[0].b64_json);
  assert.equal(events.at(-1).b64_json, own.data[0].b64_json);
  assert.equal(events[0].type, "image_generation.partial_image");
  assert.deepEqual(Buffer.from(edited.data[0].b64_json, "base64"), sound);
});

test("texts are moderated", async () => {
  const told = await client.moderations.create({ model: "omni-moderation-latest", input: ["fine", "violence"] });
  assert.deepEqual(told.results.map((result) => result.flagged), [false, true]);
});

// ── files ──

test("a file is kept by the provider as it was sent", async () => {
  const made = await client.files.create({ file: await toFile(sound, "größe.bin"), purpose: "user_data" });
  assert.deepEqual([made.filename, made.bytes], ["größe.bin", sound.length]);
  assert.deepEqual(made, await straight.files.retrieve(made.id));
  assert.deepEqual(await bytes(await client.files.content(made.id)), sound);
  assert.ok((await gathered(client.files.list())).some((file) => file.id === made.id));
  assert.equal((await client.files.delete(made.id)).deleted, true);
  await assert.rejects(straight.files.retrieve(made.id), OpenAI.NotFoundError);
});

test("a file of a batch is kept by the gateway", async () => {
  const line = JSON.stringify({ custom_id: "1", method: "POST", url: "/v1/chat/completions", body: { model, messages } });
  const made = await client.files.create({ file: await toFile(Buffer.from(line), "in.jsonl"), purpose: "batch" });
  const listed = await gathered(client.files.list({ purpose: "batch" }));
  assert.ok(listed.some((file) => file.id === made.id));
  assert.equal((await client.files.retrieve(made.id)).filename, "in.jsonl");
  assert.equal((await bytes(await client.files.content(made.id))).toString(), line);
  assert.equal((await client.files.delete(made.id)).deleted, true);
  await assert.rejects(client.files.retrieve(made.id), OpenAI.NotFoundError);
});

test("a large file is uploaded in parts", async () => {
  const said = { bytes: sound.length, filename: "a.bin", mime_type: "text/plain", purpose: "user_data" };
  const upload = await client.uploads.create(said);
  const halves = [sound.subarray(0, 1 << 20), sound.subarray(1 << 20)];
  const parts = [];
  for (const half of halves) parts.push(await client.uploads.parts.create(upload.id, { data: await toFile(half) }));
  const done = await client.uploads.complete(upload.id, { part_ids: parts.map((part) => part.id) });
  assert.deepEqual([done.status, done.file.bytes], ["completed", sound.length]);
  assert.deepEqual(await bytes(await straight.files.content(done.file.id)), sound);
});

// ── errors are the SDK's own ──

const refused = (kind, status, code) => (error) => {
  assert.ok(error instanceof kind, `${error}`);
  assert.deepEqual([error.status, error.code], [status, code]);
  assert.match(error.requestID ?? "", /^req_/);
  return true;
};

test("errors come as the SDK's classes, with their codes", async () => {
  const wrong = new OpenAI({ baseURL: process.env.GATEWAY, apiKey: "sk-wrong", maxRetries: 0 });
  const ask = (by, more) => by.chat.completions.create({ model, messages, ...more });
  await assert.rejects(ask(wrong), refused(OpenAI.AuthenticationError, 401, "invalid_api_key"));
  await assert.rejects(ask(client, { model: "unknown" }), refused(OpenAI.NotFoundError, 404, "model_not_found"));
  await assert.rejects(ask(client, { model: "" }), refused(OpenAI.BadRequestError, 400, "missing_model"));
  await assert.rejects(ask(client, { model: "poor" }), refused(OpenAI.RateLimitError, 429, "insufficient_quota"));
  await assert.rejects(ask(client, { model: "down" }), refused(OpenAI.InternalServerError, 500, null));
});

test("a stream that breaks off is an error, never an end", async () => {
  const stream = await client.chat.completions.create({ model: "breaking", messages, stream: true });
  await assert.rejects(gathered(stream), (error) => error instanceof OpenAI.APIError && error.code === "stream_truncated");
});
