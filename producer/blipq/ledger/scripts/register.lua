-- Registers a worker as live. ARGV: worker, ttl ms, spare (1 or 0), info JSON, then its models.
local worker, ttl, spare, info = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
redis.call('SET', worker_key(worker), info, 'PX', ttl)
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', now)
index(WORKERS, now + ttl, worker)
redis.call('ZREMRANGEBYSCORE', MODELS, '-inf', now - INDEX_TTL)
for i = 5, #ARGV do
  index(MODELS, now, ARGV[i])
  local key = serving_key(ARGV[i])
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  index(key, now + ttl, worker)
  redis.call('PEXPIRE', key, 40 * DAY)  -- jobs may name the model for so long
  keep(work_key(ARGV[i]))
  keep(working_key(ARGV[i]))
  if spare == '1' then redis.call('SET', spare_key(ARGV[i]), worker, 'PX', ttl) end
end
