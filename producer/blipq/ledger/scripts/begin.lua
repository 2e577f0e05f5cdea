-- A job that had to wait for its turn to run alone begins: from now on a crash is its own.
-- ARGV: id, token. Returns 1, or 0 if it is no longer this worker's.
local id, token = ARGV[1], ARGV[2]
local job = load(id)
if not job or job.status ~= 'running' or fence(job) ~= token then return 0 end
redis.call('HDEL', job_key(id), 'waiting')
return 1
