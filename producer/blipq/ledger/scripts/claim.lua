-- Takes a job under a lease. ARGV: id, worker, lease ms, contract, nonce.
-- A claim that is repeated with its nonce is the same claim: its answer was lost.
-- Returns {'claimed', field, value, ...} or {reason}: unknown, ended, busy, newer.
local id, worker, lease, contract = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local nonce = ARGV[5]

local function claimed(job)
  return {'claimed', 'token', fence(job), 'attempts', job.attempts, 'kind', job.kind,
    'model', job.model, 'queue', job.queue, 'request', job.request, 'output', job.output or '',
    'solo', job.solo or '0', 'retries', job.retries or '0', 'deadline', job.deadline, 'now', now,
    'created_at', job.created_at}
end

local job = load(id)
if not job then return {'unknown'} end
if ended(job) then return {'ended'} end
if tonumber(job.deadline) <= now then
  end_job(id, job, 'expired', {})
  return {'ended'}
end
if job.status == 'running' then
  -- Only the reconciler judges a lease that ran out.
  if job.nonce ~= nonce then return {'busy'} end
  index(RUNNING, now + lease, id)
  return claimed(job)
end
-- A question that arrives after its claim was given back or withdrawn: nobody hears the answer.
local is_late = job.nonce == nonce or redis.call('EXISTS', withdrawn_key(nonce)) == 1
if is_late then return {'busy'} end
-- A retry waits for its time even if an older message of the job turns up.
if redis.call('ZSCORE', DELAYED, id) then return {'busy'} end
if tonumber(job.contract) > contract then return {'newer'} end

-- The newest claim of the queue tells the reconciler which older messages must have been lost. Of a
-- job that was published again the first message may be the one that came.
local published_at = tonumber(redis.call('ZSCORE', again_key(job.queue), id)
  or redis.call('ZSCORE', queued_key(job.queue), id) or now)
local newest = tonumber(redis.call('GET', claimed_key(job.queue)) or 0)
redis.call('SET', claimed_key(job.queue), math.max(newest, published_at), 'PX', INDEX_TTL)
redis.call('SET', taken_key(job.queue), now, 'PX', INDEX_TTL)
unqueue(id, job)

local key = job_key(id)
local first = not job.started_at
job.token = redis.call('HINCRBY', key, 'token', 1)
job.attempts = redis.call('HINCRBY', key, 'attempts', 1)
job.status, job.nonce, job.started_at = 'running', nonce, job.started_at or now
redis.call('HSET', key, 'status', 'running', 'worker', worker, 'nonce', nonce,
  'started_at', job.started_at)
if job.solo then redis.call('HSET', key, 'waiting', 1) end
index(RUNNING, now + lease, id)
local event = first and post_event(id, job, 'job.running')
if event then keep_snapshot(event, job) end
return claimed(job)
