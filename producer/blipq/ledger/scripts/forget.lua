-- Erases jobs, in two steps: what lies outside of Redis is deleted in between, by their records.
-- ARGV: 'close' (open ones end, and only waiting clients are notified), 'close ended' (open ones
-- stay as they are) or 'erase', then ids.
-- Returns {id, status, request, output, place of the result, events that wait or are kept, tenant} of
-- each job that is known, and of 'close ended' has ended.
local step = ARGV[1]
local closed = {}

-- First, as it needs no memory: behind such a write a full Redis lets a script go on, and what is
-- erased here makes room.
local KEPT_FOR = 60 * 60 * 1000  -- ms until every worker that has an image has read the list
redis.call('ZREMRANGEBYSCORE', FORGOTTEN, '-inf', now - KEPT_FOR)

local EVENTS = {'running', 'succeeded', 'failed', 'cancelled', 'expired'}

local function drop_event(name)
  local host = redis.call('HGET', event_key(name), 'host')
  if not host then return 0 end
  redis.call('ZREM', outbox_key(host), name)
  redis.call('ZREM', DEAD_EVENTS, name)
  redis.call('DEL', event_key(name))
  return 1
end

-- For each event of a job, from before it was tried again, too; how many.
local function each_event(id, job, act)
  local count = 0
  for _, event in ipairs(EVENTS) do
    count = count + act(id .. '/job.' .. event)
    for n = 1, tonumber(job.revivals or 0) do
      count = count + act(id .. '/job.' .. event .. '/' .. n)
    end
  end
  return count
end

-- From now on it is not tried again: what it left is deleted meanwhile.
local function close(id, job)
  if ended(job) then
    redis.call('HSETNX', job_key(id), 'closed', 'ended')
    return
  end
  job.webhook_events = nil
  redis.call('HSET', job_key(id), 'closed', 1)
  end_job(id, job, 'cancelled', {})
  -- Kept until it is erased, which may have to be tried again.
  redis.call('PEXPIRE', job_key(id), math.max(tonumber(job.deadline) - now, DAY))
end

-- A message that is on its way may hold the whole request, and would be taken for a new job. This
-- record has no content, and keeps it from that. Jobs that were open leave one, and those of foreign
-- clients always do: their message may come again after the job has ended.
local function leave_mark(id, job)
  redis.call('HSET', job_key(id), 'status', 'cancelled', 'erased', 1, 'kind', job.kind,
    'model', job.model, 'created_at', job.created_at, 'completed_at', job.completed_at or now,
    'deadline', job.deadline)
  redis.call('PEXPIRE', job_key(id), math.max(tonumber(job.deadline) - now, DAY))
end

-- Workers drop what they know of the image. Its name is not to be read here, either.
local function forget_image(request)
  local image = cjson.decode(request).image
  if type(image) ~= 'table' or type(image.uri) ~= 'string' then return end
  redis.call('ZADD', FORGOTTEN, now, redis.sha1hex(image.uri))
  redis.call('PEXPIRE', FORGOTTEN, KEPT_FOR)
end

local function erase(id, job)
  if job.request then forget_image(job.request) end
  each_event(id, job, drop_event)
  -- One that has ended is listed and counted among the open ones no more.
  if not ended(job) then forget(id, job) end
  redis.call('ZREM', DEAD_LETTERS, id)
  if ended(job) then unlist_job(id, job, job.status) end
  local key = job.idempotency_key and idempotency_key(job.idempotency_key)
  if key and redis.call('GET', key) == id then redis.call('DEL', key) end
  redis.call('DEL', job_key(id))
  if job.closed == '1' or job.notify == FOREIGN_CHANNEL then leave_mark(id, job) end
end

local function exists(event) return redis.call('EXISTS', event_key(event)) end

for i = 2, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  local is_meant = job and not job.erased and (step ~= 'close ended' or ended(job))
  if is_meant then
    closed[#closed + 1] = {id, job.status, job.request or '', job.output or '', job.result_uri or '',
      each_event(id, job, exists), job.tenant or ''}
    if step == 'erase' then erase(id, job) else close(id, job) end
  end
end
return closed
