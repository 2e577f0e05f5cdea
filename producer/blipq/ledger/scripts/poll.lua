-- Which of these jobs have ended? Settles what is due. ARGV: the caller's own channel, then ids.
-- Returns three lists: {id, {field, value, ...}} of those that have ended, the ids that are
-- unknown, and {id, channel} of those that notify on another channel; and the milliseconds until
-- the last deadline of those that are open.
local channel = ARGV[1]
local done, unknown, elsewhere, left = {}, {}, {}, 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local found = redis.call('HMGET', job_key(id), 'status', 'deadline', 'notify')
  local job = {status = found[1]}
  if not job.status then
    unknown[#unknown + 1] = id
  else
    if not ended(job) and tonumber(found[2]) <= now then
      end_job(id, load(id), 'expired', {})
      job.status = 'expired'
    end
    if ended(job) then
      done[#done + 1] = {id, redis.call('HGETALL', job_key(id))}
    else
      left = math.max(left, tonumber(found[2]) - now)
      if found[3] ~= channel then elsewhere[#elsewhere + 1] = {id, found[3]} end
    end
  end
end
return {done, unknown, elsewhere, left}
