-- One chunk of a sweep over what is due, the oldest first and at most LIMIT of each: O(1) with any
-- backlog. ARGV: limit, grace ms, max crashes, dead letter ttl ms, whether this Redis is the broker,
-- too (1 or 0), and then, where workers take turns, whose turn it is, its ttl ms and patience ms.
-- Returns whether more may be due (1 or 0), then {kind, id, queue, ...} of the jobs to publish again.
local limit, grace = tonumber(ARGV[1]), tonumber(ARGV[2])
local max_crashes, dead_letter_ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
local is_broker = ARGV[5] == '1'
local owner, turn_ttl, patience = ARGV[6], ARGV[7], tonumber(ARGV[8])
local publish = {0}

-- How long it has been the owner's turn without a break; nil while it is another's. All of it is
-- known here: a caller may not hear of a turn that it got, and this script may reach Redis long
-- after it was sent.
local function turn_for()
  local held = redis.call('GET', SWEEPER)
  local since, holder = string.match(held or '', '^(%d+) (.*)$')
  if held and holder ~= owner then return nil end
  since = since or string.format('%d', now)
  redis.call('SET', SWEEPER, since .. ' ' .. owner, 'PX', turn_ttl)
  return now - since
end

-- A gap means that Redis was away and leases were not renewed: live workers first renew theirs.
local judges = true
if owner then
  local turn = turn_for()
  if not turn then return publish end
  judges = turn >= patience
end

local function add(id, job)
  publish[#publish + 1] = job.kind
  publish[#publish + 1] = id
  publish[#publish + 1] = job.queue
end

local function due(key)
  local ids = redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, limit)
  if #ids == limit then publish[1] = 1 end
  return ids
end

-- Submits do so at most once a second, and not at all while jobs are published again in each.
keep(OPEN)
for _, id in ipairs(due(OPEN)) do
  local job = load(id)
  if job and not ended(job) then end_job(id, job, 'expired', {}) else redis.call('ZREM', OPEN, id) end
end

for _, id in ipairs(judges and due(RUNNING) or {}) do
  local job = load(id)
  if not job or job.status ~= 'running' then
    redis.call('ZREM', RUNNING, id)
  elseif crashed(id, job, max_crashes, dead_letter_ttl) then
    add(id, job)
  end
end

for _, id in ipairs(due(DELAYED)) do
  local job = load(id)
  if job and job.status == 'queued' then
    enqueue(id, job, now)
    add(id, job)
  else
    redis.call('ZREM', DELAYED, id)
  end
end

-- Where the lists show how many messages are missing, a job is also lost that had its turn: a younger
-- one was claimed a while ago. That is what a worker leaves that died with messages in hand. Returns
-- when the youngest one was published that was claimed at least a third of the grace ago.
local function passed(queue, claimed)
  local at, mark, before = string.match(
    redis.call('GET', passed_key(queue)) or '', '^(%d+) (%d+) (%d+)$')
  if at and now - at < grace / 3 then return tonumber(before) end
  redis.call('SET', passed_key(queue), string.format('%d %d %d', now, claimed, mark or 0),
    'PX', INDEX_TTL)
  return tonumber(mark or 0)
end

-- A queued job's message is lost if a job published a grace later was claimed (queues are first
-- in, first out), or if a worker had room for a whole grace in which nobody took anything from the
-- queue: any other waiting job waits its turn.
local function horizon(queue)
  local seen = redis.call('MGET', claimed_key(queue), taken_key(queue), spare_key(model_of(queue)))
  local claimed, taken = math.min(now, tonumber(seen[1] or 0)), tonumber(seen[2] or 0)
  if seen[3] and taken <= now - grace then return now - grace end
  return math.max(claimed - grace, is_broker and passed(queue, claimed) or 0)
end

-- No more can be lost than the broker's lists lack. They are named as kombu names them: one for the
-- queue, and one for each priority that foreign messages may have.
-- Of a list that is none nothing is: an error here would keep the jobs of all queues.
local function missing(queue, waiting)
  if not is_broker then return waiting end
  local listed = 0
  for _, suffix in ipairs({'', KOMBU_SEPARATOR .. 3, KOMBU_SEPARATOR .. 6, KOMBU_SEPARATOR .. 9}) do
    local length = redis.pcall('LLEN', queue .. suffix)
    if type(length) == 'table' then return 0 end
    listed = listed + length
  end
  return waiting - listed
end

local function lost(queue, waiting)
  local paused = redis.call('GET', paused_key(queue))
  if paused == '0' then
    redis.call('PEXPIRE', paused_key(queue), INDEX_TTL)  -- while there is anyone to heed it
    return {}
  end
  local most = math.min(limit, missing(queue, waiting))
  if most <= 0 then return {} end
  -- Workers dropped the messages that were published before the queue was resumed.
  local before = math.max(tonumber(paused or 0), horizon(queue))
  local ids = redis.call('ZRANGEBYSCORE', queued_key(queue), '-inf', before, 'LIMIT', 0, most)
  if is_broker and #ids == limit then publish[1] = 1 end
  return ids
end

-- An earlier version's sweep does not note ``again`` on the job, so its claim leaves it in the set.
local function tidy(queue)
  for _, id in ipairs(redis.call('ZRANGE', again_key(queue), 0, 9)) do
    if not redis.call('ZSCORE', queued_key(queue), id) then redis.call('ZREM', again_key(queue), id) end
  end
end

local function publish_again(queue, id, job)
  redis.call('HSET', job_key(id), 'again', 1)
  local first = redis.call('ZSCORE', queued_key(queue), id)
  redis.call('ZADD', again_key(queue), 'NX', first, id)
  redis.call('PEXPIRE', again_key(queue), INDEX_TTL)
  index(queued_key(queue), now, id)
  add(id, job)
end

-- A queue is forgotten when long unused, not when it is empty: an earlier version's worker that gives
-- a job back does not list its queue.
redis.call('ZREMRANGEBYSCORE', QUEUES, '-inf', now - INDEX_TTL)
for _, queue in ipairs(redis.call('ZRANGE', QUEUES, 0, -1)) do
  local waiting = redis.call('ZCARD', queued_key(queue))
  tidy(queue)
  for _, id in ipairs(waiting > 0 and lost(queue, waiting) or {}) do
    local job = load(id)
    if job and job.status == 'queued' then
      publish_again(queue, id, job)
    else
      unqueue(id, {queue = queue})
    end
  end
end

-- What a worker of an earlier version ended counts as its tenant's until it is found here: a few jobs
-- of a few tenants in each chunk. Limits are kept while there is anyone to heed them.
for _, tenant in ipairs(redis.call('ZRANDMEMBER', TENANTS, 10)) do
  for _, id in ipairs(redis.call('ZRANDMEMBER', tenant_key(tenant), 20)) do
    if not redis.call('ZSCORE', OPEN, id) then redis.call('ZREM', tenant_key(tenant), id) end
  end
  if redis.call('EXISTS', tenant_key(tenant)) == 0 then redis.call('ZREM', TENANTS, tenant) end
end
if redis.call('PTTL', LIMITS) < INDEX_TTL - DAY then redis.call('PEXPIRE', LIMITS, INDEX_TTL) end
return publish
