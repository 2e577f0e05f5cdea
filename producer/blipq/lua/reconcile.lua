-- One sweep over what is due, the oldest first and at most LIMIT of each: O(1) with any backlog.
-- ARGV: limit, grace ms, max crashes, dead letter ttl ms, whether to judge leases (1 or 0).
-- Returns {kind, id, queue, ...} triples of the jobs to publish again.
local limit, grace = tonumber(ARGV[1]), tonumber(ARGV[2])
local max_crashes, dead_letter_ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
local publish = {}

local function add(id, job)
  publish[#publish + 1] = job.kind
  publish[#publish + 1] = id
  publish[#publish + 1] = job.queue
end

local function due(key)
  return redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, limit)
end

for _, id in ipairs(due(OPEN)) do
  local job = load(id)
  if job and not ended(job) then end_job(id, job, 'expired', {}) else redis.call('ZREM', OPEN, id) end
end

for _, id in ipairs(ARGV[5] == '1' and due(RUNNING) or {}) do
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

-- A queued job's message is lost if a job published a grace later was claimed (queues are first
-- in, first out), or if a worker with room sees nothing: any other waiting job waits its turn.
redis.call('ZREMRANGEBYSCORE', QUEUES, '-inf', now - INDEX_TTL)
for _, queue in ipairs(redis.call('ZRANGE', QUEUES, 0, -1)) do
  local model = string.match(queue, '^blipq%.(.+)%.%a+$')
  local newest = tonumber(redis.call('GET', claimed_key(queue)) or 0)
  local idle = redis.call('EXISTS', spare_key(model)) == 1
  local horizon = idle and now - grace or math.min(now, newest) - grace
  local lost = redis.call('ZRANGEBYSCORE', queued_key(queue), '-inf', horizon, 'LIMIT', 0, limit)
  for _, id in ipairs(lost) do
    local job = load(id)
    if job and job.status == 'queued' then
      index(queued_key(queue), now, id)
      add(id, job)
    else
      redis.call('ZREM', queued_key(queue), id)
    end
  end
end
return publish
