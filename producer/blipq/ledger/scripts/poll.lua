-- Which of these jobs have ended? Settles what is due. ARGV: the caller's own channel, then ids.
-- Returns three lists: {id, {field, value, ...}} of those that have ended, the ids that are
-- unknown, and {id, channel} of those that notify on another channel; the milliseconds until
-- the last deadline of those that are open; and the ids of those that have ended, too, and do not
-- fit into the reply: no record is added to MOST bytes.
local MOST = 4 * 1024 * 1024
local later, bytes = {}, 0
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
      --RARELY end_job load
      end_job(id, load(id), 'expired', {})
      job.status = 'expired'
    end
    if ended(job) then
      if bytes < MOST then
        local record = redis.call('HGETALL', job_key(id))
        for _, part in ipairs(record) do bytes = bytes + #part end
        done[#done + 1] = {id, record}
      else
        later[#later + 1] = id
      end
    else
      left = math.max(left, tonumber(found[2]) - now)
      if found[3] ~= channel then elsewhere[#elsewhere + 1] = {id, found[3]} end
    end
  end
end
return {done, unknown, elsewhere, left, later}
