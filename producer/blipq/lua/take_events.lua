-- Takes due events under a lease, a few of each host. ARGV: limit, lease ms, most of one host,
-- dead event ttl ms, then host, room pairs of hosts that have less room than that.
-- Returns {event, token, attempts, event as JSON, job as JSON or ''} of each.
local limit, lease, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local dead_ttl = tonumber(ARGV[4])
local room = {}
for i = 5, #ARGV, 2 do room[ARGV[i]] = tonumber(ARGV[i + 1]) end
local taken = {}

local function job_of(record)
  if record.body then return '' end
  if record.job then return record.job end
  local job, told = load(record.id), {}
  if not job then return nil end
  for _, field in ipairs(TOLD) do told[field] = job[field] end
  told.result = job.result
  return cjson.encode(told)
end

local function take(host, event)
  local record = load_event(event)
  local job = record and job_of(record)
  if not job then
    redis.call('ZREM', outbox_key(host), event)
    redis.call('DEL', event_key(event))
    count('lost')
    return
  end
  if redis.call('EXISTS', stopped_key(record.url)) == 1 then
    count('stopped')
    bury_event(event, record, dead_ttl, 'stopped', 'the URL answered 410 before')
    return
  end
  local key = event_key(event)
  local token = redis.call('HINCRBY', key, 'token', 1)
  -- Counted before anything is sent: an attempt that kills its sender is one, too.
  local attempts = redis.call('HINCRBY', key, 'attempts', 1)
  -- Due again when the lease is over: that is all a sender's death needs.
  index(outbox_key(host), now + lease, event)
  taken[#taken + 1] = {event, token, attempts, cjson.encode(record), job}
end

local known = (#ARGV - 4) / 2
for _, host in ipairs(redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', now, 'LIMIT', 0, limit + known)) do
  local free = math.min(room[host] or most, limit - #taken)
  if free > 0 then
    local due = redis.call('ZRANGEBYSCORE', outbox_key(host), '-inf', now, 'LIMIT', 0, free)
    for _, event in ipairs(due) do take(host, event) end
    local next = redis.call('ZRANGE', outbox_key(host), 0, 0, 'WITHSCORES')
    if next[2] then redis.call('ZADD', OUTBOX, next[2], host) else redis.call('ZREM', OUTBOX, host) end
  end
end
return taken
