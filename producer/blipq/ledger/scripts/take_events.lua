-- Takes due events under a lease, a few of each host. ARGV: limit, lease ms, most of one host,
-- dead event ttl ms, room for suspects, crashes that make one, most crashes, then host, room pairs of hosts that have less
-- room than that.
-- An event whose lease ran out was with a sender that died. After a few times it is a suspect: only
-- few of these are out at once, so that one that kills its senders takes no neighbour to its end.
-- Returns {event, token, attempts, crashes, event as JSON, job as JSON or ''} of each.
local limit, lease, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local dead_ttl, suspects = tonumber(ARGV[4]), tonumber(ARGV[5])
local suspect_after, most_crashes = tonumber(ARGV[6]), tonumber(ARGV[7])
local FIRST_HOST = 8
local room = {}
for i = FIRST_HOST, #ARGV, 2 do room[ARGV[i]] = tonumber(ARGV[i + 1]) end
local taken = {}
-- Bytes of the reply, beyond which no more are taken: results may be large.
local MOST_BYTES, bytes = 4 * 1024 * 1024, 0

local function job_of(record)
  if record.body then return '' end
  if record.job then return record.job end
  local job, fields = load(record.id), {}
  if not job then return nil end
  for _, field in ipairs(IN_EVENTS) do fields[field] = job[field] end
  fields.result, fields.request = job.result, image_of(job)
  return cjson.encode(fields)
end

local function take(host, event)
  if bytes > MOST_BYTES then return end
  local record = load_event(event)
  local job = record and job_of(record)
  if not job then
    redis.call('ZREM', outbox_key(host), event)
    redis.call('DEL', event_key(event))
    count('lost')
    return
  end
  if redis.call('EXISTS', stopped_key(redis.sha1hex(record.url))) == 1 then
    count('stopped')
    bury_event(event, record, dead_ttl, 'stopped', 'the URL answered 410 before')
    return
  end
  local crashes = tonumber(record.unsettled or 0)
  if crashes >= most_crashes then
    count('crashed')
    bury_event(event, record, dead_ttl, 'crashed', 'its senders died or hung ' .. crashes .. ' times')
    return
  end
  if crashes >= suspect_after then
    if suspects == 0 then return end
    suspects = suspects - 1
  end
  local key = event_key(event)
  redis.call('HINCRBY', key, 'unsettled', 1)
  local token = redis.call('HINCRBY', key, 'token', 1)
  -- Counted before anything is sent: an attempt that kills its sender is one, too.
  local attempts = redis.call('HINCRBY', key, 'attempts', 1)
  -- Due again when the lease is over: that is all a sender's death needs.
  index(outbox_key(host), now + lease, event)
  local line = cjson.encode(record)
  bytes = bytes + #line + #job
  taken[#taken + 1] = {event, token, attempts, crashes, line, job}
end

local known = (#ARGV - FIRST_HOST + 1) / 2
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
