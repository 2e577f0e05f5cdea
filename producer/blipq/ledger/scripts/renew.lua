-- Extends the leases a worker holds. ARGV: lease ms, then id, token pairs.
-- Returns the ids it no longer holds: cancelled, expired or taken by another worker.
local lease = tonumber(ARGV[1])
local lost = {}
for i = 2, #ARGV, 2 do
  local id, token = ARGV[i], ARGV[i + 1]
  local found = redis.call('HMGET', job_key(id), 'status', 'token', 'nonce', 'deadline')
  local job = {token = found[2], nonce = found[3]}
  if found[1] ~= 'running' or fence(job) ~= token then
    lost[#lost + 1] = id
  elseif tonumber(found[4]) <= now then
    end_job(id, load(id), 'expired', {})
    lost[#lost + 1] = id
  else
    redis.call('ZADD', RUNNING, 'XX', now + lease, id)
  end
end
return lost
