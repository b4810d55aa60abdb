// What test_node.py has done with OpenAI's Node SDK: node openai.mjs SCENARIO BASE_URL [ARGUMENT].
// Prints one line of JSON at the end; a word on a line before it says how far it has come.
import OpenAI from "openai";

const [scenario, baseURL, argument] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused" });
const HELLO = [{ role: "user", content: "We walk over the bridge" }];
const TOOLS = ["weather", "population"].map((name) => ({
  type: "function",
  function: {
    name,
    parameters: { type: "object", properties: { city: { enum: ["Lima", "Oslo"] } }, required: ["city"] },
  },
}));
const TWICE = [{ role: "user", content: "Ask weather, then population" }];

async function joined(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const deltas = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta));
  return {
    text: deltas.map((delta) => delta.content ?? "").join(""),
    reasoning: deltas.map((delta) => delta.reasoning_content ?? "").join(""),
    finishReasons: chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.finish_reason)).filter(Boolean),
    models: [...new Set(chunks.map((chunk) => chunk.model))],
    ids: [...new Set(chunks.map((chunk) => chunk.id))],
    usages: chunks.map((chunk) => chunk.usage).filter(Boolean),
    portway: chunks.find((chunk) => chunk.portway)?.portway,
  };
}

// a client that says "beat" when a heartbeat has come through the connection it reads
function listening() {
  const watched = async (...args) => {
    const response = await fetch(...args);
    const decoder = new TextDecoder();
    const ear = new TransformStream({
      transform(bytes, controller) {
        if (decoder.decode(bytes, { stream: true }).includes(": portway\n")) console.log("beat");
        controller.enqueue(bytes);
      },
    });
    return new Response(response.body.pipeThrough(ear), response);
  };
  return new OpenAI({ baseURL, apiKey: "unused", fetch: watched });
}

const scenarios = {
  async chat() {
    const fields = { model: "chat", messages: HELLO, temperature: 0, max_tokens: 200 };
    const { data, response } = await client.chat.completions.create(fields).withResponse();
    return { answer: data, servedBy: response.headers.get("x-served-by") };
  },

  async streams() {
    const fields = { model: "chat", messages: HELLO, temperature: 0, max_tokens: 20 };
    const stream = { ...fields, stream: true };
    const counted = { ...stream, stream_options: { include_usage: true } };
    return {
      plain: (await client.chat.completions.create(fields)).choices[0].message.content,
      silent: await joined(await client.chat.completions.create(stream)),
      counted: await joined(await client.chat.completions.create(counted)),
    };
  },

  // the SDK's own helper joins the pieces of the calls, and throws if they don't fit together
  async tools() {
    for (let seed = 0; seed < 50; seed++) {
      const fields = { tools: TOOLS, tool_choice: "required", parallel_tool_calls: true, seed, temperature: 1 };
      const stream = client.chat.completions.stream({ model: argument, messages: TWICE, ...fields });
      const { choices } = await stream.finalChatCompletion();
      if (choices[0].message.tool_calls?.length > 1) return choices[0];
    }
    throw new Error("no seed gave two calls");
  },

  async reasoning() {
    const fields = { model: "thinker", messages: HELLO, temperature: 0, max_tokens: 200 };
    const plain = await client.chat.completions.create(fields);
    return {
      plain: plain.choices[0].message,
      streamed: await joined(await client.chat.completions.create({ ...fields, stream: true })),
    };
  },

  async embeddings() {
    const input = ["over the bridge", "under the window"];
    const coded = await client.embeddings.create({ model: "embed", input });
    const floats = await client.embeddings.create({ model: "embed", input, encoding_format: "float" });
    return { coded: coded.data.map((item) => item.embedding), floats: floats.data.map((item) => item.embedding) };
  },

  async models() {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model.id);
    return { listed, one: await client.models.retrieve("chat") };
  },

  // the request in ARGUMENT, with the client's own options among its fields, and which class its failure raises
  async failure() {
    const { options, ...fields } = { options: {}, ...JSON.parse(argument) };
    const said = [];
    try {
      const asking = new OpenAI({ baseURL, apiKey: "unused", ...options });
      const answer = await asking.chat.completions.create({ model: "chat", messages: HELLO, ...fields });
      if (fields.stream) for await (const chunk of answer) said.push(chunk.choices[0]?.delta.content ?? "");
    } catch (error) {
      const { status, code, message } = error;
      const isAPIError = error instanceof OpenAI.APIError;
      return { kind: error.constructor.name, isAPIError, status, code, message, said };
    }
    return { kind: null, said };
  },

  async heartbeat() {
    return joined(await listening().chat.completions.create({ model: "chat", messages: HELLO, stream: true }));
  },

  // leaves a stream after its first text, by abort() or by breaking out; then waits for the end of stdin
  async leave() {
    const stream = await client.chat.completions.create({ model: "chat", messages: HELLO, stream: true });
    for await (const chunk of stream) {
      if (!chunk.choices[0]?.delta.content) continue;
      if (argument === "break") break;
      stream.controller.abort();
    }
    console.log("left");
    for await (const _ of process.stdin);
    return { aborted: stream.controller.signal.aborted };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
