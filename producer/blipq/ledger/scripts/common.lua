-- Shared by every script, in front of it. The names of keys stand in front of this: see keys.py.
-- All time is Redis' own clock in milliseconds, so no host's clock can break a lease.
-- Keys are made here, from ids: the ledger lives on one Redis (Sentinel or managed), as Celery's
-- Redis transport does, never on a Redis Cluster.

local DAY = 86400 * 1000
local INDEX_TTL = 41 * DAY         -- longer than any job can stay open
local OUTBOX_TTL = 14 * DAY        -- how long an event waits for a sender, counted from each attempt

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Renewed once a day: to read what is left costs less than to write it, which goes to the AOF, too.
local function keep(key)
  if redis.call('PTTL', key) < INDEX_TTL - DAY then redis.call('PEXPIRE', key, INDEX_TTL) end
end

local function index(key, score, member)
  redis.call('ZADD', key, score, member)
  keep(key)
end

local function load(id)
  local flat = redis.call('HGETALL', job_key(id))
  if #flat == 0 then return nil end
  local job = {}
  for i = 1, #flat, 2 do job[flat[i]] = flat[i + 1] end
  return job
end

local function ended(job)
  local status = job.status
  return status == 'succeeded' or status == 'failed' or status == 'cancelled' or status == 'expired'
end

-- Counts a job by its shape among those of its model that are open, or that a worker holds: what the
-- prediction of work starts from. A record of an earlier version has no shape, and is not counted.
local function tally(key, shape, by)
  if not shape then return end
  local count = redis.call('HINCRBY', key, shape, by)
  if count <= 0 then
    redis.call('HDEL', key, shape)
  elseif count == by then
    keep(key)  -- it may be new; workers keep it from then on
  end
end

-- Lists for people: of the jobs of an hour, tenant, model, kind and status, by when they were
-- submitted. A status is 'open' until a job has ended. A list ends with the last of its records, as
-- far as their times to live show, and LISTS has the names of all.
local HOUR = 3600 * 1000

local function list_of(job, status)
  return string.format('%d:%s:%s:%s:%s', math.floor(job.created_at / HOUR), job.tenant or '',
    job.model, job.kind, status)
end

-- A name goes with its list. Ten are looked at for each new one, so that none is left for long.
local function add_list(name, hour, ttl)
  if redis.call('ZADD', LISTS, hour, name) == 1 then
    for _, old in ipairs(redis.call('ZRANGE', LISTS, 0, 9)) do
      if redis.call('EXISTS', listed_key(old)) == 0 then redis.call('ZREM', LISTS, old) end
    end
  end
  if redis.call('PTTL', LISTS) < ttl then redis.call('PEXPIRE', LISTS, ttl) end
end

-- ttl: ms that the record is kept. An hour more is given, so that it is written rarely.
local function list_job(id, job, status, ttl)
  local name = list_of(job, status)
  local key = listed_key(name)
  redis.call('ZADD', key, job.created_at, id)
  if redis.call('PTTL', key) < ttl then
    --RARELY add_list
    redis.call('PEXPIRE', key, ttl + HOUR)
    add_list(name, math.floor(job.created_at / HOUR), ttl + HOUR)
  end
end

local function unlist_job(id, job, status)
  redis.call('ZREM', listed_key(list_of(job, status)), id)
end

-- A tenant's open jobs. A tenant is listed as its set is made, and once a day from then on.
local function add_to_tenant(id, tenant)
  local key = tenant_key(tenant)
  redis.call('ZADD', key, now, id)
  if redis.call('PTTL', key) < INDEX_TTL - DAY then
    redis.call('PEXPIRE', key, INDEX_TTL)
    index(TENANTS, now, tenant)
  end
end

-- The most open jobs of a tenant and the most that it may submit a second, each nil without a limit.
-- '*' is of all that have no limits of their own.
local function limits_of(tenant)
  local found = redis.call('HMGET', LIMITS, tenant, '*')
  local open, rate = string.match(found[1] or found[2] or '', '^(%S+) (%S+)$')
  return tonumber(open), tonumber(rate)
end

local function is_at_most(tenant, most)
  return most and redis.call('ZCARD', tenant_key(tenant)) >= most
end

-- A rate is kept as the time until when the jobs so far use it up. At most BURST ms of it lie ahead,
-- or one job's: so many may be submitted at once.
local BURST = 2000

-- What lies further ahead was used at a lower rate, or before Redis' clock was set back: there is room
-- for one job, which sets it right. 1 ms is for what is lost by rounding.
local function used_until(tenant, rate)
  local till = math.max(now, tonumber(redis.call('GET', rate_key(tenant)) or 0))
  local most = now + math.max(BURST, 1000 / rate)
  return till <= most + 1 and till or most - 1000 / rate
end

-- Why a tenant may submit no further job now: 'open_jobs' or 'rate', the limit, and in how many ms to
-- try again; or nil. Then its rate, if it has one.
local function limit_met(tenant)
  local open, rate = limits_of(tenant)
  if is_at_most(tenant, open) then return string.format('open_jobs %d 1000', open) end
  if not rate then return nil end
  local wait = used_until(tenant, rate) + 1000 / rate - now - math.max(BURST, 1000 / rate)
  if wait > 0 then return string.format('rate %.10g %d', rate, math.ceil(wait)) end
  return nil, rate
end

local function use_rate(tenant, rate)
  local till = used_until(tenant, rate) + 1000 / rate
  redis.call('SET', rate_key(tenant), string.format('%.3f', till), 'PX', math.ceil(till - now) + 1)
end

-- Which cell has, or will have, a job that this one does not know: its place on the job's way (see
-- Cells.path) and its name, or nil where this cell is to record it. name: of the job's key or id. place:
-- of this cell on the caller's way. onward: the next place and cell, or ''. What is left here sends on
-- whoever comes with a lower place and would record the job here: whoever comes first, one cell alone
-- has it. It is kept for as long as the record of whoever comes last, and MOVES for longer than any.
local function moved_to(name, place, onward, ttl)
  local key = moved_key(redis.sha1hex(name))
  local moved = redis.call('GET', key)
  local is_ahead = moved and tonumber(string.match(moved, '^%d+')) > tonumber(place)
  if not is_ahead and onward == '' then return nil end
  moved = is_ahead and moved or onward
  local kept = math.max(ttl, redis.call('PTTL', key))
  if redis.call('PTTL', MOVES) < kept then redis.call('SET', MOVES, 1, 'PX', kept + HOUR) end
  redis.call('SET', key, moved, 'PX', kept)
  return moved
end

-- Out of its queue. Only a job that was published again is in the second set.
local function unqueue(id, job)
  redis.call('ZREM', queued_key(job.queue), id)
  redis.call('ZREM', again_key(job.queue), id)
end

-- Out of all that lists open jobs. A claim has taken one that runs out of its queue.
local function forget(id, job)
  redis.call('ZREM', OPEN, id)
  redis.call('ZREM', RUNNING, id)
  if job.tenant then redis.call('ZREM', tenant_key(job.tenant), id) end
  unlist_job(id, job, 'open')
  tally(work_key(job.model), job.work, -1)
  if job.status == 'running' then
    tally(working_key(job.model), job.work, -1)
  else
    --RARELY unqueue
    redis.call('ZREM', DELAYED, id)
    unqueue(id, job)
  end
end

-- Nobody takes a job from a paused queue: its message is dropped, and the job waits in the ledger.
local function is_paused(queue)
  return redis.call('GET', paused_key(queue)) == '0'
end

-- Fields that nobody reads once a job has ended: for most of its life a record is one of those. A
-- job that has no result may be tried again, which takes the others.
local OPEN_ONLY = {'worker', 'published_at', 'again', 'due', 'waiting', 'withdrawn', 'crashes',
  'losses', 'retries', 'last_error'}
local FOR_RETRY = {'contract', 'result_ttl', 'failed_ttl', 'solo', 'work', 'rights', 'nonce',
  'token', 'traceparent'}

local function shed(id, job, status)
  local names = {}
  for _, fields in ipairs({OPEN_ONLY, status == 'succeeded' and FOR_RETRY or {}}) do
    for _, name in ipairs(fields) do
      if job[name] then names[#names + 1] = name end
    end
  end
  if #names > 0 then redis.call('HDEL', job_key(id), unpack(names)) end
end

-- What a worker shows to prove that a claim is its own: the nonce of that claim. Workers of earlier
-- versions show ``token`` alone, which counts their claims, and those of jobs that they have claimed.
local function fence(job)
  return (job.token or '') .. '-' .. (job.nonce or '')
end

-- A host has a queue of its own, so that one that hangs is passed over at no cost.
local function schedule(host, event, due)
  index(outbox_key(host), due, event)
  redis.call('ZADD', OUTBOX, 'LT', due, host)
  redis.call('PEXPIRE', OUTBOX, INDEX_TTL)
end

local function event_id(id, job, event)
  -- A dead letter that is tried again has further events, which are not those from before.
  return id .. '/' .. event .. (job.revivals and '/' .. job.revivals or '')
end

-- Puts one event of a job into the outbox if the job has a webhook for it: in the same script as the
-- change of status, so that no outcome is without its webhook, whatever dies. Returns its id.
local function post_event(id, job, event)
  if not job.webhook_events or not string.find(job.webhook_events, event, 1, true) then
    return false
  end
  local name = event_id(id, job, event)
  local host = string.lower(string.match(job.webhook_url, '^%a+://([^/?]+)') or '?')
  local optional = {}
  for _, field in ipairs({'tenant', 'traceparent'}) do
    if job[field] then
      optional[#optional + 1] = field
      optional[#optional + 1] = job[field]
    end
  end
  redis.call('HSET', event_key(name), 'id', id, 'type', event, 'url', job.webhook_url,
    'host', host, 'at', now, unpack(optional))
  redis.call('PEXPIRE', event_key(name), OUTBOX_TTL)
  schedule(host, name, now)
  return name
end

-- The fields of a job in an event, without its result.
local IN_EVENTS = {'kind', 'model', 'status', 'created_at', 'started_at', 'completed_at', 'deadline',
  'attempts', 'error', 'receipt', 'metadata', 'output', 'result_uri'}

-- The request in an event: its image alone, as JSON, or nil.
local function image_of(job)
  local sound, request = pcall(cjson.decode, job.request or '')
  if not sound or type(request) ~= 'table' or not request.image then return nil end
  return cjson.encode({image = request.image})
end

-- For an event whose job goes on to change: it holds the job as it is now.
local function keep_snapshot(event, job)
  local snapshot = {request = image_of(job)}
  for _, field in ipairs(IN_EVENTS) do snapshot[field] = job[field] and tostring(job[field]) end
  redis.call('HSET', event_key(event), 'job', cjson.encode(snapshot))
end

-- The result of a job that may do without it, once somebody else has it. Its status, digest and keys
-- keep their time: they are what a repeated submit meets.
local function drop_result(id, job, delivered)
  if not job.drop or job.result_uri then return end
  if job.output then
    redis.call('HSET', job_key(id), 'result_uri', job.output)
  elseif delivered then
    redis.call('HSET', job_key(id), 'delivered', 1)
  else
    return
  end
  redis.call('HDEL', job_key(id), 'result')
end

-- The one way a job ends. The caller has checked that it has not ended yet.
local function end_job(id, job, status, fields)
  local key = job_key(id)
  shed(id, job, status)  -- first: a hash that has grown does not shrink
  redis.call('HSET', key, 'status', status, 'completed_at', now, unpack(fields))
  forget(id, job)
  local ttl = tonumber(status == 'failed' and job.failed_ttl or job.result_ttl)
  list_job(id, job, status, ttl)
  local has_event = false
  if job.webhook_events then
    --RARELY post_event OUTBOX_TTL
    has_event = post_event(id, job, 'job.' .. status)
    if has_event then
      redis.call('HSET', key, 'keep_until', now + ttl)
      ttl = math.max(ttl, OUTBOX_TTL)
    end
  end
  if job.drop and status == 'succeeded' and not has_event then
    --RARELY drop_result
    drop_result(id, job, false)
  end
  redis.call('PEXPIRE', key, ttl)
  redis.call('PUBLISH', job.notify, id)
end

local function bury(id, job, ttl)
  list_job(id, job, 'failed', ttl)
  redis.call('ZREMRANGEBYSCORE', DEAD_LETTERS, '-inf', now - ttl)
  index(DEAD_LETTERS, now, id)
  local key = job_key(id)
  if redis.call('HEXISTS', key, 'keep_until') == 1 then
    redis.call('HSET', key, 'keep_until', now + ttl)
    ttl = math.max(ttl, OUTBOX_TTL)
  end
  redis.call('PEXPIRE', key, ttl)
end

-- Back to the queue: seen by the reconciler from now on, and to be published by the caller.
local function enqueue(id, job, published_at)
  redis.call('HSET', job_key(id), 'status', 'queued', 'published_at', published_at)
  redis.call('HDEL', job_key(id), 'due', 'again')
  if job.status == 'running' then tally(working_key(job.model), job.work, -1) end
  redis.call('ZREM', RUNNING, id)
  redis.call('ZREM', DELAYED, id)
  redis.call('ZREM', again_key(job.queue), id)
  index(queued_key(job.queue), published_at, id)
  index(QUEUES, now, job.queue)
end

-- Out of its queue for a while. A message that turns up meanwhile is too early (see claim).
local function delay_job(id, job, delay)
  redis.call('HSET', job_key(id), 'due', now + delay)
  unqueue(id, job)
  index(DELAYED, now + delay, id)
end

-- A lease ran out: its worker crashed or hung. Returns true if the job is to be published again.
local function crashed(id, job, max_crashes, dead_letter_ttl)
  if job.waiting then  -- for its turn to run alone: whatever it was, it was not this job
    redis.call('HINCRBY', job_key(id), 'attempts', -1)
    enqueue(id, job, now)
    return true
  end
  local crashes = redis.call('HINCRBY', job_key(id), 'crashes', 1)
  if crashes >= max_crashes then
    local message = 'the worker died or hung ' .. crashes .. ' times while it ran this job'
    end_job(id, job, 'failed', {
      'error', cjson.encode({code = 'attempts_exhausted', message = message, retryable = false})})
    bury(id, job, dead_letter_ttl)
    return false
  end
  redis.call('HSET', job_key(id), 'solo', 1, 'last_error', cjson.encode({
    code = 'internal', message = 'the worker died or hung while it ran this job', retryable = true}))
  enqueue(id, job, now)
  return true
end

local function live_workers(model)
  return redis.call('ZCOUNT', serving_key(model), '(' .. now, '+inf')
end

-- Whether jobs may name a model: one that no worker has served for as long as this key lives would
-- only make keys, and a queue that nobody reads. DECLARED: further names, between spaces.
local function is_known(model, declared)
  return model == 'default' or redis.call('EXISTS', serving_key(model)) == 1
    or string.find(declared, ' ' .. model .. ' ', 1, true) ~= nil
end

-- What workers serve, for people: 'name=live workers' of the models that were served last.
local function served_models()
  local served = {}
  for _, model in ipairs(redis.call('ZREVRANGE', MODELS, 0, 19)) do
    served[#served + 1] = model .. '=' .. live_workers(model)
  end
  return table.concat(served, ' ')
end
