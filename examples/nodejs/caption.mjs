// Sends a job and waits for its result, with nothing of blipq but Redis:
//
//   npm install ioredis
//   eval "$(blipq env)"     # the local stack's; else: export BLIPQ_REDIS_URL=redis://...
//   node caption.mjs s3://photos/cat.jpg
//
// Prints the result as JSON, or the error with exit code 1.
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import Redis from "ioredis";

const ENDED = ["succeeded", "failed", "cancelled", "expired"];

/** Enqueues a job; its id. `kind` is caption, vqa, match, embed, describe or search. */
async function submit(redis, kind, request, options = {}) {
  const { model = "default", priority = "normal" } = options;
  const queue = `blipq.${model}.${priority}`;
  const id = `job_${randomUUID()}`;
  const message = {
    headers: { lang: "js", task: `blipq.${kind}`, id },
    properties: {
      correlation_id: id,
      delivery_mode: 2,
      delivery_info: { exchange: "", routing_key: queue },
      delivery_tag: randomUUID(),
      priority: 0,
    },
    "content-type": "application/json",
    "content-encoding": "utf-8",
    body: JSON.stringify([[id, request, options], {}, {}]),
  };
  await redis.lpush(queue, JSON.stringify(message));
  return id;
}

/** Waits for a job to end; its record. A lost notification costs a poll, no more. */
async function ended(redis, subscriber, id, timeoutMs) {
  const until = Date.now() + timeoutMs;
  for (let pause = 50; Date.now() < until; pause = Math.min(pause * 1.5, 1000)) {
    const job = await redis.hgetall(`blipq:job:${id}`);
    if (ENDED.includes(job.status)) return job;
    await told(subscriber, id, Math.round(pause));
  }
  throw new Error(`job ${id} has not ended after ${timeoutMs} ms: it goes on`);
}

/** Resolves when the end of the job is told, or the time is up. */
async function told(subscriber, id, withinMs) {
  const signal = AbortSignal.timeout(withinMs);
  try {
    for (;;) if ((await once(subscriber, "message", { signal }))[1] === id) return;
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

const redis = new Redis(process.env.BLIPQ_REDIS_URL);
const subscriber = redis.duplicate();
try {
  await subscriber.subscribe("blipq:ended:foreign");
  const id = await submit(redis, "caption", { image: process.argv[2] }, { expires_in: "10m" });
  const job = await ended(redis, subscriber, id, 60_000);
  console.log(job.result ?? job.error);
  process.exitCode = job.status === "succeeded" ? 0 : 1;
} finally {
  redis.disconnect();
  subscriber.disconnect();
}
