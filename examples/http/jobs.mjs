// Uploads a picture, and has a job of each kind done, with Node.js alone:
//
//   blipq up &  blipq api &
//   node jobs.mjs cat.png
//
// BLIPQ_URL names another door, and BLIPQ_KEY is sent as its key. Prints each result as a line of
// JSON; exit code 1 with the problem if one fails.
import { readFile } from "node:fs/promises";

const URL_ = process.env.BLIPQ_URL ?? "http://127.0.0.1:8321";
const KEY = process.env.BLIPQ_KEY ? { Authorization: `Bearer ${process.env.BLIPQ_KEY}` } : {};
const LONGEST_WAIT_MS = 300_000;

async function call(method, path, type, body) {
  const headers = { ...KEY, ...(type ? { "Content-Type": type } : {}) };
  const signal = AbortSignal.timeout(90_000);
  const answer = await fetch(URL_ + path, { method, headers, body, signal });
  const told = await answer.json();
  if (!answer.ok) throw new Error(`${told.code}: ${told.detail}`);
  return told;
}

/** Submits a job, and waits for its end. */
async function run(job) {
  const body = JSON.stringify(job);
  let info = await call("POST", "/v1/jobs?wait=30", "application/json", body);
  const until = Date.now() + LONGEST_WAIT_MS;
  while (["queued", "running"].includes(info.status) && Date.now() < until) {
    info = await call("GET", `/v1/jobs/${info.id}?wait=30`);
  }
  if (info.status !== "succeeded") throw new Error(`${info.id} ${info.status}`);
  return info.result;
}

try {
  const picture = await readFile(process.argv[2]);
  const { uri: image } = await call("POST", "/v1/uploads", "image/png", picture);
  const jobs = [
    { kind: "caption", image },
    { kind: "vqa", image, questions: ["what color is it?"] },
    { kind: "match", image, texts: ["a red square", "a dog"] },
    { kind: "describe", image, questions: ["what is it?"] },
    { kind: "embed", image, index: "example-node" },
    { kind: "search", index: "example-node", text: "a red square" },
  ];
  for (const job of jobs) console.log(JSON.stringify(await run(job)));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
