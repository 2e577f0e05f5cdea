-- Takes a job under a lease. ARGV: id, worker, lease ms, contract, nonce.
-- A claim that is repeated with its nonce is the same claim: its answer was lost.
-- Returns {'claimed', field, value, ...}, or {reason}: unknown, ended, busy, newer, paused.
local id, worker, lease, contract = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local nonce = ARGV[5]

local function claimed(job)
  local answer = {'claimed', 'token', fence(job), 'attempts', job.attempts, 'kind', job.kind,
    'model', job.model, 'queue', job.queue, 'request', job.request, 'output', job.output or '',
    'solo', job.solo or '0', 'retries', job.retries or '0', 'deadline', job.deadline, 'now', now,
    'created_at', job.created_at, 'work', job.work or '', 'tenant', job.tenant or '',
    'rights', job.rights or '',
    'webhook_url', job.rights and job.webhook_url or ''}
  if job.traceparent then
    -- It has waited since it was submitted, or since its message was published anew.
    local published_at = tonumber(job.published_at or 0)
    local since = published_at > 0 and published_at or tonumber(job.created_at)
    for _, part in ipairs({'traceparent', job.traceparent, 'waited', now - since}) do
      answer[#answer + 1] = part
    end
  end
  return answer
end

local job = load(id)
if not job then return {'unknown'} end
if ended(job) then return {'ended'} end
if tonumber(job.deadline) <= now then
  --RARELY end_job
  end_job(id, job, 'expired', {})
  return {'ended'}
end
if job.status == 'running' then
  -- Only the reconciler judges a lease that ran out.
  if job.nonce ~= nonce then return {'busy'} end
  index(RUNNING, now + lease, id)
  return claimed(job)
end
-- A claim that arrives after it was given back or withdrawn: no one waits for the reply.
local is_late = job.nonce == nonce
  or (job.withdrawn and redis.call('EXISTS', withdrawn_key(nonce)) == 1)
if is_late then return {'busy'} end
-- A retry waits for its time even if an older message of the job turns up.
if tonumber(job.due or 0) > now then return {'busy'} end
if tonumber(job.contract) > contract then return {'newer'} end

local seen = redis.call('MGET', claimed_key(job.queue), taken_key(job.queue), paused_key(job.queue))
if seen[3] == '0' then return {'paused'} end

-- The newest claim of the queue shows the reconciler which older messages must have been lost. Of a
-- job that was published again the first message may be the one that came. It needs to know within
-- a grace, so a busy queue does not write it at each claim.
local GRAIN = 100  -- ms
local published_at = tonumber(job.published_at or job.created_at)
local newest, taken = tonumber(seen[1] or 0), tonumber(seen[2] or 0)
if published_at - newest >= GRAIN or now - taken >= GRAIN then
  redis.call('SET', claimed_key(job.queue), math.max(newest, published_at), 'PX', INDEX_TTL)
  redis.call('SET', taken_key(job.queue), now, 'PX', INDEX_TTL)
end
redis.call('ZREM', queued_key(job.queue), id)
if job.again then redis.call('ZREM', again_key(job.queue), id) end
if job.due then redis.call('ZREM', DELAYED, id) end

local first = not job.started_at
job.attempts = string.format('%d', (job.attempts or 0) + 1)
job.status, job.nonce, job.started_at = 'running', nonce, job.started_at or now
local changed = {'status', 'running', 'worker', worker, 'nonce', nonce,
  'started_at', job.started_at, 'attempts', job.attempts}
-- A worker of an earlier version, which had the job before, must not end this claim with its token.
if job.token then
  job.token = string.format('%d', job.token + 1)
  changed[#changed + 1] = 'token'
  changed[#changed + 1] = job.token
end
if job.solo then
  changed[#changed + 1] = 'waiting'
  changed[#changed + 1] = 1
end
redis.call('HSET', job_key(id), unpack(changed))
tally(working_key(job.model), job.work, 1)
index(RUNNING, now + lease, id)
if first and job.webhook_events then
  --RARELY post_event keep_snapshot
  local event = post_event(id, job, 'job.running')
  if event then keep_snapshot(event, job) end
end
return claimed(job)
