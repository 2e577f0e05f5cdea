-- Takes back, uncounted, claims whose replies their worker did not receive. ARGV: nonce, id pairs.
-- A question that arrives after its withdrawal is refused by its nonce (see claim), whoever has had
-- the job in between.
-- Returns kind, id, queue of each of these jobs that waits now: to be published.
local LATE = 10 * 60 * 1000  -- ms that a question may be on its way
local waiting = {}
for i = 1, #ARGV, 2 do
  local nonce, id = ARGV[i], ARGV[i + 1]
  local job = load(id)
  redis.call('SET', withdrawn_key(nonce), 1, 'PX', LATE)
  if job and not ended(job) then redis.call('HSET', job_key(id), 'withdrawn', 1) end
  if job and job.status == 'running' and job.nonce == nonce then
    redis.call('HINCRBY', job_key(id), 'attempts', -1)
    enqueue(id, job, now)
    job.status = 'queued'
  end
  if job and job.status == 'queued' then
    waiting[#waiting + 1] = job.kind
    waiting[#waiting + 1] = id
    waiting[#waiting + 1] = job.queue
  end
end
return waiting
