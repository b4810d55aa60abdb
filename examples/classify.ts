/**
 * Completes a text and classifies it (question, request, complaint, other) with a local model through Portway.
 *
 *   portway demo                                        # or portway serve, in another terminal
 *   npm install openai tsx && npx tsx examples/classify.ts "Why is my parcel late again?"
 *
 * PORTWAY_URL, PORTWAY_API_KEY and PORTWAY_MODEL choose another server and model.
 */
import OpenAI from "openai";

const LABELS = ["question", "request", "complaint", "other"] as const;
type Label = (typeof LABELS)[number];

const url = process.env.PORTWAY_URL ?? "http://127.0.0.1:11436";
const model = process.env.PORTWAY_MODEL ?? "fast-9b";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.PORTWAY_API_KEY ?? "unused" });

const SCHEMA = {
  type: "object",
  properties: { label: { type: "string", enum: LABELS } },
  required: ["label"],
} as const;

/** One of LABELS, or an error that shows what the model said instead. */
async function classify(text: string): Promise<{ label: Label; servedBy: string | null }> {
  const { data, response } = await client.chat.completions
    .create({
      model,
      temperature: 0,
      max_tokens: 200,
      messages: [
        { role: "system", content: `Classify the user's text as one of: ${LABELS.join(", ")}. Answer in JSON.` },
        { role: "user", content: text },
      ],
      response_format: { type: "json_schema", json_schema: { name: "classification", schema: SCHEMA } },
    })
    .withResponse();
  const said = data.choices[0]?.message.content ?? "";
  const label = labelIn(said);
  if (!label) throw new Error(`the model's answer holds no label: ${said}`);
  return { label, servedBy: response.headers.get("x-served-by") };
}

function labelIn(said: string): Label | undefined {
  try {
    const value: unknown = (JSON.parse(said) as { label?: unknown }).label;
    return LABELS.find((label) => label === value);
  } catch {
    return undefined;
  }
}

/** The model's continuation of a text, written out as it comes. */
async function complete(text: string): Promise<void> {
  const stream = await client.chat.completions.create({
    model,
    stream: true,
    max_tokens: 200,
    messages: [{ role: "user", content: `Continue this text with one sentence: ${text}` }],
  });
  for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  process.stdout.write("\n");
}

async function main(): Promise<void> {
  const text = process.argv.slice(2).join(" ") || "Could you send me the invoice again?";
  await complete(text);
  const { label, servedBy } = await classify(text);
  console.log(`${label} (says ${servedBy})`);
}

main().catch((error: unknown) => {
  if (error instanceof OpenAI.APIConnectionError) {
    console.error(`Nothing answers at ${url}. Start it with \`portway demo\` or \`portway serve\`.`);
  } else {
    console.error(error instanceof Error ? error.message : error);
  }
  process.exitCode = 1;
});
