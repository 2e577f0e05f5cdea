-- Takes back, uncounted, claims whose answers their worker has not heard. ARGV: nonce, id pairs.
-- A question that arrives after its withdrawal is refused by its nonce (see claim).
-- Returns kind, id, queue of each of these jobs that waits now: to be published.
local waiting = {}
for i = 1, #ARGV, 2 do
  local nonce, id = ARGV[i], ARGV[i + 1]
  local job = load(id)
  if job and job.status == 'running' and job.nonce == nonce then
    redis.call('HINCRBY', job_key(id), 'attempts', -1)
    enqueue(id, job, now)
    job.status = 'queued'
  end
  if job and job.status == 'queued' then
    redis.call('HSET', job_key(id), 'nonce', nonce)
    waiting[#waiting + 1] = job.kind
    waiting[#waiting + 1] = id
    waiting[#waiting + 1] = job.queue
  end
end
return waiting
