-- A job that had to wait for its turn to run alone begins: from now on a crash is its own.
-- ARGV: id, token. Returns 1, or 0 if it is no longer this worker's.
local id, token = ARGV[1], ARGV[2]
local job = redis.call('HMGET', job_key(id), 'status', 'token')
if job[1] ~= 'running' or job[2] ~= token then return 0 end
redis.call('HDEL', job_key(id), 'waiting')
return 1
