-- Puts a dead letter back into its queue with fresh attempts. ARGV: id, expires_in ms, retention ms.
-- Returns 1, or 0 if it is no dead letter.
local id, expires_in, retention = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local job = load(id)
if not job or not redis.call('ZSCORE', DEAD_LETTERS, id) or job.status ~= 'failed' then return 0 end
local key = job_key(id)
local event = event_id(id, job, 'job.failed')
if redis.call('EXISTS', event_key(event)) == 1 then keep_snapshot(event, job) end
redis.call('HINCRBY', key, 'revivals', 1)
redis.call('ZREM', DEAD_LETTERS, id)
redis.call('HDEL', key, 'error', 'receipt', 'completed_at', 'keep_until', 'crashes', 'retries',
  'last_error')
redis.call('HSET', key, 'deadline', now + expires_in)
redis.call('PEXPIRE', key, expires_in + retention)
index(OPEN, now + expires_in, id)
index(QUEUES, now, job.queue)
enqueue(id, job, now)
return 1
