-- Records a job that cannot be run, so that whoever sent it can read why. ARGV: id, ttl ms, then
-- field/value pairs. Returns 1, or 0 if the id is known already.
local id, ttl = ARGV[1], tonumber(ARGV[2])
if redis.call('EXISTS', job_key(id)) == 1 then return 0 end
local fields = {}
for i = 3, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('HSET', job_key(id), 'status', 'failed', 'created_at', now, 'completed_at', now,
  'deadline', now + ttl, unpack(fields))
redis.call('PEXPIRE', job_key(id), ttl)
local job = {created_at = now}
for i = 3, #ARGV, 2 do job[ARGV[i]] = ARGV[i + 1] end
list_job(id, job, 'failed', ttl)
return 1
