-- Records a job once. ARGV: id, digest, idempotency key or '', expires_in ms, retention ms,
-- max open jobs, then field/value pairs.
-- Returns {'created' | 'exists' | 'conflict' | 'full', id}.
local id, digest, idempotency_key = ARGV[1], ARGV[2], ARGV[3]
local expires_in, retention, max_open = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function known(existing)
  local same = redis.call('HGET', job_key(existing), 'digest')
  if not same then
    -- A record without a digest was made for a message that could not be run.
    if redis.call('EXISTS', job_key(existing)) == 1 then return {'conflict', existing} end
    return nil
  end
  return {same == digest and 'exists' or 'conflict', existing}
end

local idempotency_record = idempotency_key ~= '' and 'blipq:idempotency:' .. idempotency_key
if idempotency_record then
  local existing = redis.call('GET', idempotency_record)
  local answer = existing and known(existing)
  if answer then return answer end
end
local answer = known(id)
if answer then return answer end
if redis.call('ZCARD', OPEN) >= max_open then return {'full', id} end

local fields = {}
for i = 7, #ARGV do fields[#fields + 1] = ARGV[i] end
local key = job_key(id)
redis.call('HSET', key, 'digest', digest, 'status', 'queued', 'created_at', now,
  'deadline', now + expires_in, unpack(fields))
redis.call('PEXPIRE', key, expires_in + retention)
if idempotency_record then
  redis.call('SET', idempotency_record, id, 'PX', expires_in + retention)
end
local queue = redis.call('HGET', key, 'queue')
index(OPEN, now + expires_in, id)
index(queued_key(queue), now, id)
index(QUEUES, now, queue)
return {'created', id}
