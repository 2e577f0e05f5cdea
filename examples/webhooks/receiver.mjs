// A receiver of blipq's webhooks: npm install standardwebhooks; node receiver.mjs [PORT]
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const seen = new Set(); // in a real service, a table with a unique column

createServer(async (request, response) => {
  // The signature covers these very bytes: verify before parsing, and never re-encode.
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks).toString("utf8");
  let event;
  try {
    event = webhook.verify(body, request.headers);
  } catch (error) {
    response.writeHead(401).end(error.message);
    return;
  }
  const id = request.headers["webhook-id"];
  if (!seen.has(id)) {
    handle(event); // quickly, or put it into a queue of your own: 15 s are all there is
    seen.add(id);
  }
  response.writeHead(204).end();
}).listen(Number(process.argv[2] ?? 8000), "127.0.0.1");

function handle({ type, data: job }) {
  console.log(type, job.id, JSON.stringify(job.result ?? job.error));
}
