-- Shared by the scripts of webhook events, behind common.lua.

local function count(outcome)
  redis.call('HINCRBY', EVENT_COUNTS, outcome, 1)
  redis.call('PEXPIRE', EVENT_COUNTS, INDEX_TTL)
end

-- A job that has ended is kept no longer for the sake of its last event, but a day after it:
-- its receiver may want to read more.
local function release_job(event, id)
  local job = load(id)
  if not job or not job.keep_until or event_id(id, job, 'job.' .. job.status) ~= event then return end
  -- Less than a day only where the job is not to be kept for one.
  local keep_until = tonumber(job.keep_until)
  local longer = math.min(DAY, keep_until - tonumber(job.completed_at))
  redis.call('PEXPIREAT', job_key(id), math.max(keep_until, now + longer))
end

local function keep_job(id, ttl)
  local left = redis.call('PTTL', job_key(id))
  if left >= 0 and left < ttl then redis.call('PEXPIRE', job_key(id), ttl) end
end

-- An event that is sent no more. It stays listed, and can be replayed.
local function bury_event(event, record, ttl, outcome, detail)
  redis.call('ZREM', outbox_key(record.host), event)
  redis.call('ZREMRANGEBYSCORE', DEAD_EVENTS, '-inf', now - ttl)
  index(DEAD_EVENTS, now, event)
  redis.call('HSET', event_key(event), 'outcome', outcome, 'detail', detail, 'dead_at', now)
  redis.call('PEXPIRE', event_key(event), ttl)
  if record.body then release_job(event, record.id) else keep_job(record.id, ttl) end
end

local function load_event(event)
  local flat = redis.call('HGETALL', event_key(event))
  if #flat == 0 then return nil end
  local record = {}
  for i = 1, #flat, 2 do record[flat[i]] = flat[i + 1] end
  return record
end
