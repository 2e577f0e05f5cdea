-- Pauses a queue or resumes it. ARGV: queue, 'pause' or 'resume', declared models between spaces.
-- A queue that is resumed is published again by the reconciler, as far as the broker lacks messages.
-- Returns {how many jobs wait in it}, or {-1, what workers serve} where nothing waits for a model
-- that nobody knows: it is a typing error.
local queue, wish, declared = ARGV[1], ARGV[2], ARGV[3]
local key, waiting = paused_key(queue), redis.call('ZCARD', queued_key(queue))
if waiting == 0 and not is_paused(queue) and not is_known(model_of(queue), declared) then
  return {-1, served_models()}
end
if wish == 'pause' then
  redis.call('SET', key, 0, 'PX', INDEX_TTL)
  redis.call('ZADD', QUEUES, 'NX', now, queue)  -- so that it is listed
  redis.call('PEXPIRE', QUEUES, INDEX_TTL)
elseif is_paused(queue) then
  redis.call('SET', key, now, 'PX', INDEX_TTL)
  if waiting > 0 then index(QUEUES, now, queue) end
end
return {waiting}
