-- Deletes a dead letter and its job. ARGV: id. Returns 1, or 0 if it is no dead letter.
local id = ARGV[1]
if redis.call('ZREM', DEAD_LETTERS, id) == 0 then return 0 end
local job = load(id)
if job then unlist_job(id, job, job.status) end
redis.call('DEL', job_key(id))
return 1
