-- Sends an event again: a dead one, one that waits, or the end of a job that is still kept.
-- ARGV: event. Returns 1, or 0 for an event that nothing is known of.
local event = ARGV[1]
local record = load_event(event)
if not record then
  local id = string.match(event, '^(.+)/job%.%a+')
  local job = id and load(id)
  if not job or not ended(job) or event_id(id, job, 'job.' .. job.status) ~= event then return 0 end
  if not post_event(id, job, 'job.' .. job.status) then return 0 end
  redis.call('HSET', event_key(event), 'at', job.completed_at)
  keep_job(id, OUTBOX_TTL)
  return 1
end
-- A person decided: a URL that wanted no more is tried again.
redis.call('DEL', stopped_key(redis.sha1hex(record.url)))
redis.call('ZREM', DEAD_EVENTS, event)
redis.call('HDEL', event_key(event), 'attempts', 'unsettled', 'dead_at')
redis.call('PEXPIRE', event_key(event), OUTBOX_TTL)
keep_job(record.id, OUTBOX_TTL)
-- A sender that is at it now must not settle what is sent anew.
redis.call('HINCRBY', event_key(event), 'token', 1)
schedule(record.host, event, now)
return 1
