// What test_node.py has done with the AI SDK, through the provider that OpenCode uses: node ai.mjs SCENARIO BASE_URL.
// Prints one line of JSON at the end; a word on a line before it says how far it has come.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [scenario, baseURL, argument] = process.argv.slice(2);

async function watched(...args) {
  const response = await fetch(...args);
  const decoder = new TextDecoder();
  const ear = new TransformStream({
    transform(bytes, controller) {
      if (decoder.decode(bytes, { stream: true }).includes(": portway\n")) console.log("beat");
      controller.enqueue(bytes);
    },
  });
  return new Response(response.body.pipeThrough(ear), response);
}

const portway = createOpenAICompatible({ name: "portway", baseURL, includeUsage: true, fetch: watched });
const model = portway("chat");
const city = { enum: ["Lima", "Oslo"] };
const inputSchema = jsonSchema({ type: "object", properties: { city }, required: ["city"] });
const tools = {
  weather: tool({ inputSchema, execute: async ({ city }) => `It rains in ${city}.` }),
  population: tool({ inputSchema, execute: async ({ city }) => `Many live in ${city}.` }),
};
const prompt = "We walk over the bridge";

// a stream read to its end, with the errors that are parts of it
async function read(result) {
  const parts = [];
  for await (const part of result.fullStream) parts.push(part);
  const all = (type) => parts.filter((part) => part.type === type);
  const text = (type) => all(type).map((part) => part.text).join("");
  return {
    text: text("text-delta"),
    reasoning: text("reasoning-delta"),
    calls: all("tool-call").map(({ toolCallId, toolName, input }) => ({ toolCallId, toolName, input })),
    results: all("tool-result").map((part) => part.output),
    finishReasons: all("finish-step").map((part) => part.finishReason),
    usages: all("finish-step").map((part) => part.usage),
    errors: all("error").map((part) => shown(part.error)),
  };
}

function shown(error) {
  const last = error?.lastError ?? error; // what its retries ended with
  const message = last?.message ?? String(last);
  return { kind: last?.name, status: last?.statusCode, message, body: last?.responseBody };
}

const settled = { temperature: 0, maxOutputTokens: 200 };
const quiet = { onError() {} }; // errors are read from the stream, not written to stderr

const scenarios = {
  async text() {
    const { text, response } = await generateText({ model, prompt });
    return { text, model: response.modelId, servedBy: response.headers["x-served-by"] };
  },

  async stream() {
    return read(streamText({ model, prompt, ...settled, ...quiet }));
  },

  // two calls, both run, and the answer to their results
  async tools() {
    const asked = "Ask weather, then population";
    return read(streamText({ model, tools, prompt: asked, stopWhen: stepCountIs(2), ...quiet }));
  },

  // several calls, none of them run; a tiny model needs some seeds for that
  async calls() {
    const idle = Object.fromEntries(["weather", "population"].map((name) => [name, tool({ inputSchema })]));
    const providerOptions = { portway: { parallel_tool_calls: true } };
    for (let seed = 0; seed < 50; seed++) {
      const sampling = { toolChoice: "required", temperature: 1, seed, providerOptions };
      const said = await read(streamText({ model: portway("tools"), tools: idle, prompt, ...sampling, ...quiet }));
      if (said.calls.length > 1 || said.errors.length > 0) return said;
    }
    throw new Error("no seed gave two calls");
  },

  async reasoning() {
    return read(streamText({ model: portway("thinker"), prompt, ...settled, ...quiet }));
  },

  async embedding() {
    return (await embed({ model: portway.textEmbeddingModel("embed"), value: prompt })).embedding;
  },

  async failure() {
    const { model: name = "chat", maxRetries = 2, words = 5 } = JSON.parse(argument ?? "{}");
    return read(streamText({ model: portway(name), maxRetries, prompt: "over ".repeat(words), ...quiet }));
  },

  // leaves a stream after its first text; then waits for the end of stdin
  async leave() {
    const leaving = new AbortController();
    const result = streamText({ model, prompt, abortSignal: leaving.signal, ...quiet });
    for await (const part of result.fullStream) if (part.type === "text-delta") leaving.abort();
    console.log("left");
    for await (const _ of process.stdin);
    return { aborted: true };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
