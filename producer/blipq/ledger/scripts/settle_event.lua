-- Records what came of an attempt. ARGV: event, token, verdict, outcome, detail, delay ms,
-- dead event ttl ms. Verdicts: delivered, retry, dead, stop: dead, and so is the URL, and defer:
-- nothing was sent, so that it is no attempt.
-- Returns 1, or 0 if the event is no longer this sender's to settle.
local event, token, verdict, outcome, detail = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local delay, dead_ttl = tonumber(ARGV[6]), tonumber(ARGV[7])
local record = load_event(event)
if not record or record.token ~= token then return 0 end
if not redis.call('ZSCORE', outbox_key(record.host), event) then return 0 end

-- A body with a pointer to this ledger has not delivered the result.
local function drop_delivered(event, record)
  local job = load(record.id)
  if not job or job.status ~= 'succeeded' or not record.body then return end
  if event_id(record.id, job, 'job.succeeded') ~= event then return end
  if string.find(record.body, '"result_omitted"', 1, true) then return end
  drop_result(record.id, job, true)
end

if verdict == 'defer' then
  redis.call('HDEL', event_key(event), 'unsettled')
  redis.call('HINCRBY', event_key(event), 'attempts', -1)
  schedule(record.host, event, now + delay)
  return 1
end

count(outcome)
if verdict == 'delivered' then
  redis.call('ZREM', outbox_key(record.host), event)
  redis.call('DEL', event_key(event))
  drop_delivered(event, record)
  release_job(event, record.id)
elseif verdict == 'retry' then
  redis.call('HDEL', event_key(event), 'unsettled')
  redis.call('HSET', event_key(event), 'outcome', outcome, 'detail', detail, 'last_at', now)
  redis.call('PEXPIRE', event_key(event), delay + OUTBOX_TTL)
  keep_job(record.id, delay + OUTBOX_TTL)
  schedule(record.host, event, now + delay)
else
  if verdict == 'stop' then redis.call('SET', stopped_key(redis.sha1hex(record.url)), event, 'PX', dead_ttl) end
  bury_event(event, record, dead_ttl, outcome, detail)
end
return 1
