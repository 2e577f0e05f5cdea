-- An operator's change of many jobs: of a chunk of all records those that match, or of the ids.
-- ARGV: change (match, cancel, retry or move), its options as JSON, filter as JSON, then cursor and
-- how many records to go through, or 'ids' and the ids.
-- Options: dry (nothing is changed), priority (of move), dead (retry dead letters alone),
-- expires_in ms, retention ms and max_open (of retry).
-- Returns {next cursor ('0': none are left), 1 if too many jobs are open, ids of the jobs that are
-- changed, or would be, {kind, id, queue, ... of those to publish}, 'tenant limit' of the last tenant
-- that has all the open jobs that it may have, or ''}.
local change, options, filter = ARGV[1], cjson.decode(ARGV[2]), cjson.decode(ARGV[3])
local full, limited, changed, publish = 0, '', {}, {}

local function queue_at(job, priority)
  return (string.gsub(job.queue, '%a+$', priority))
end

local function enqueue_and_publish(id, job)
  enqueue(id, job, now)
  for _, part in ipairs({job.kind, id, job.queue}) do publish[#publish + 1] = part end
end

local function revive(id, job)
  local key, expires_in = job_key(id), options.expires_in
  local event = event_id(id, job, 'job.' .. job.status)
  if redis.call('EXISTS', event_key(event)) == 1 then keep_snapshot(event, job) end
  redis.call('HINCRBY', key, 'revivals', 1)
  redis.call('ZREM', DEAD_LETTERS, id)
  -- Its next claim is the first of these tries: it has an event, and what is left is predicted from it.
  redis.call('HDEL', key, 'error', 'receipt', 'started_at', 'completed_at', 'keep_until',
    unpack(OPEN_ONLY))
  redis.call('HSET', key, 'deadline', now + expires_in)
  redis.call('PEXPIRE', key, expires_in + options.retention)
  if job.idempotency_key then
    redis.call('PEXPIRE', idempotency_key(job.idempotency_key), expires_in + options.retention)
  end
  unlist_job(id, job, job.status)
  list_job(id, job, 'open', expires_in + options.retention)
  index(OPEN, now + expires_in, id)
  if job.tenant then add_to_tenant(id, job.tenant) end
  tally(work_key(job.model), job.work, 1)
  enqueue_and_publish(id, job)
end

-- Each of these returns whether the change is for a job, and makes it unless the run is dry.
local changes = {}

function changes.match()
  return true
end

function changes.cancel(id, job)
  if ended(job) then return false end
  if not options.dry then end_job(id, job, 'cancelled', {}) end
  return true
end

function changes.retry(id, job)
  -- A record of a message that could not be run has no contract; one that is closed is being erased.
  local is_retryable = ended(job) and job.status ~= 'succeeded' and job.contract and not job.closed
  if not is_retryable then return false end
  if options.dead and not redis.call('ZSCORE', DEAD_LETTERS, id) then return false end
  if options.dry then return true end
  if redis.call('ZCARD', OPEN) >= options.max_open then
    full = 1
    return false
  end
  local most = job.tenant and limits_of(job.tenant)
  if is_at_most(job.tenant, most) then
    limited = job.tenant .. ' ' .. string.format('%d', most)  -- others may go on
    return false
  end
  revive(id, job)
  return true
end

function changes.move(id, job)
  if job.status ~= 'queued' then return false end  -- one that was refused has no queue
  local queue = queue_at(job, options.priority)
  if queue == job.queue then return false end
  if options.dry then return true end
  unqueue(id, job)
  job.queue = queue
  redis.call('HSET', job_key(id), 'queue', queue)
  -- One that waits for a retry goes on to wait.
  if redis.call('ZSCORE', DELAYED, id) then return true end
  enqueue_and_publish(id, job)
  -- The message that is claimed may be the one in its former queue, which proves nothing about the
  -- messages of this one (see claim).
  redis.call('HSET', job_key(id), 'published_at', 0)
  return true
end

local function has_metadata(job)
  local pairs_of = job.metadata and cjson.decode(job.metadata) or {}
  for name, value in pairs(filter.metadata) do
    if pairs_of[name] ~= value then return false end
  end
  return true
end

local function matches(job)
  for _, field in ipairs({'status', 'kind', 'model', 'tenant'}) do
    if filter[field] and filter[field] ~= job[field] then return false end
  end
  -- A job that was refused has no queue.
  local queue = job.queue or ''
  if filter.priority and (queue == '' or queue_at(job, filter.priority) ~= queue) then return false end
  if filter.code and not (job.error and cjson.decode(job.error).code == filter.code) then
    return false
  end
  return not filter.metadata or has_metadata(job)
end

-- What decides whether a job matches: a result may be large.
local LOOKED_AT = {'status', 'deadline', 'kind', 'model', 'queue', 'metadata', 'tenant', 'error',
  'erased'}

local function found(id)
  local values, job = redis.call('HMGET', job_key(id), unpack(LOOKED_AT)), {}
  if not values[1] then return nil end
  for i, field in ipairs(LOOKED_AT) do job[field] = values[i] or nil end
  if job.erased then return nil end  -- what is left of it is no job (see forget)
  if not ended(job) and tonumber(job.deadline) <= now then
    end_job(id, load(id), 'expired', {})
    job.status = 'expired'
  end
  return job
end

local function consider(id)
  local job = found(id)
  if not job or not matches(job) then return end
  if change ~= 'match' then job = load(id) end
  if changes[change](id, job) then changed[#changed + 1] = id end
end

if ARGV[4] == 'ids' then
  for i = 5, #ARGV do consider(ARGV[i]) end
  return {'0', full, changed, publish, limited}
end
local page = redis.call('SCAN', ARGV[4], 'MATCH', job_key('*'), 'COUNT', ARGV[5])
local prefix = #job_key('')
for _, key in ipairs(page[2]) do
  if full == 0 then consider(string.sub(key, prefix + 1)) end
end
return {page[1], full, changed, publish, limited}
